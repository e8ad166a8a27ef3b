"""Every `stockpot cache` command once, against `stockpot serve` with the default model and a disk tier."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from stockpot.settings import Settings

KEY = "sesame"
SYSTEM = "You are a patient teacher of geography who answers in one short sentence. " * 30
COMMAND = (sys.executable, "-m", "stockpot")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, user_settings: Settings) -> dict[str, str]:
    """Models and libraries are the user's; everything a cache leaves behind lies in a folder of the test."""
    folder = tmp_path_factory.mktemp("cache")
    for shared in ("models", "engine"):
        (user_settings.cache_dir / shared).mkdir(parents=True, exist_ok=True)
        (folder / shared).symlink_to(user_settings.cache_dir / shared)
    own = {
        "STOCKPOT_CACHE_DIR": str(folder),
        "STOCKPOT_CACHE__DISK__PATH": str(folder / "blocks"),
        "STOCKPOT_ACCESS__ADMIN_KEY": KEY,
        "STOCKPOT_ADMIN_KEY": KEY,
        "COLUMNS": "200",
    }
    return {**os.environ, **own}


@pytest.fixture(scope="module")
def url(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Generator[str, None, None]:
    """The address of a server in a process of its own."""
    process = subprocess.Popen(
        [
            *COMMAND,
            "serve",
            "--port",
            "0",
            "--disk-gib",
            "0.5",
            "--ram-gib",
            "0.25",
            "--log-level",
            "warning",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=tmp_path_factory.mktemp("cwd"),
    )
    assert process.stdout is not None
    # A first start fetches the model and finds its encoding; a server that hangs must not hang the test.
    deadline = threading.Timer(900, process.kill)
    deadline.start()
    try:
        banner = ""
        for line in process.stdout:
            banner += line
            if line.startswith("try: "):
                break
        address = re.search(r"http://127\.0\.0\.1:\d+", banner)
        assert address, banner
        # What it says later must not fill the pipe.
        reader = threading.Thread(target=process.stdout.read, daemon=True)
        reader.start()
        yield address[0]
        process.terminate()
        assert process.wait(timeout=60) == 0
        reader.join(timeout=20)
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


class Operator:
    """Runs commands against the server."""

    def __init__(self, url: str, environment: dict[str, str]) -> None:
        self._url = url
        self._environment = environment

    def run(self, *arguments: str, code: int = 0) -> str:
        """What a command prints."""
        ended = subprocess.run(
            [*COMMAND, "cache", *arguments, "--url", self._url],
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=120,
            check=False,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert KEY not in ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def figures(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))


def chat(url: str, question: str, request_id: str) -> tuple[str, int]:
    """The answer's id, and how many tokens were cached."""
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "max_tokens": 3,
    }
    response = httpx2.post(
        f"{url}/v1/chat/completions", json=body, headers={"x-request-id": request_id}, timeout=120
    )
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["id"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_day_of_an_operator(url: str, environment: dict[str, str], tmp_path: Path) -> None:
    operator = Operator(url, environment)
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([{"role": "system", "content": SYSTEM}]))

    # The second question departs from the first in the middle of a sentence.
    chat(url, "What is the capital of France?", "first-question")
    answer, cached = chat(url, "What is the population of Spain?", "second-question")
    assert cached > 256
    listed = operator.figures("list")
    assert any(entry["tokens"] > cached and "geography" in entry["begins"] for entry in listed)
    assert "patient teacher" in operator.run("list")

    explained = operator.figures("explain", answer)
    assert explained["found_tokens"] == cached == explained["divergence"]["position"]
    assert "capital" in explained["divergence"]["theirs"]
    assert "population" in explained["divergence"]["ours"]
    story = operator.run("explain", "second-question")
    for words in (answer, "brought back from RAM", "never seen here before", "[ population]", "[ capital]"):
        assert words in story, story
    assert answer in operator.run("explain")

    pin = operator.figures("pin", "--messages", str(messages), "--owner", "Bea", "--for", "2h")
    assert 256 < pin["tokens"] <= pin["prefix_tokens"] <= cached
    assert 7000 < pin["expires_s"] - pin["now_s"] <= 7200
    assert [each["pin"] for each in operator.figures("pins")] == [pin["pin"]]
    assert "Bea" in operator.run("pins")
    operator.run("unpin", pin["pin"])
    assert "Nothing is pinned" in operator.run("pins")
    assert "no pin" in operator.run("unpin", pin["pin"], code=1)
    assert "warm it first" in operator.run("pin", "--text", "Something that nobody ever asked.", code=2)

    prompts = tmp_path / "prompts.jsonl"
    told = "A long road leads over the hills to the sea, past three villages and a mill. " * 8
    prompts.write_text(json.dumps({"prompt": told}) + "\n" + "not JSON\n")
    warmed = operator.run("warm", str(prompts), code=1)
    assert "1 prompt warmed" in warmed
    assert "Line 2" in warmed
    again = tmp_path / "again.txt"
    again.write_text(told)
    assert operator.figures("warm", str(again), "--text")["cached_tokens"] > 100

    # What was written to disk so far is checked and copied.
    assert operator.figures("verify")["refused"] == {}
    assert "sound" in operator.run("verify")
    exported = operator.figures("export", str(tmp_path / "exported"))
    assert exported["blocks"] >= 4
    assert list((tmp_path / "exported").glob("*.kv"))
    assert "absolute" in operator.run("export", "relative", code=2)

    dropped = operator.figures("invalidate", "prefix", "--messages", str(messages), "--reason", "new book")
    assert dropped["blocks"] >= 2
    assert not dropped["pending"]
    after, cached_after = chat(url, "What is the population of Spain?", "third-question")
    assert cached_after < cached
    gaps = operator.figures("explain", after)["gaps"]
    assert gaps[0]["cause"] == "invalidated"
    assert "admin key" in gaps[0]["detail"]
    assert "was invalidated" in operator.run("explain", after)

    assert operator.figures("invalidate", "all", "--yes")["blocks"] > 0
    assert "Nothing is in RAM" in operator.run("list")
    assert chat(url, "What is the population of Spain?", "fourth-question")[1] == 0
    stats = operator.run("stats")
    assert "tiers.disk.counts.written_bytes" in stats
    assert "blocks dropped because somebody invalidated them" in stats


def test_without_the_key_nothing_is_told(url: str, environment: dict[str, str]) -> None:
    operator = Operator(url, {**environment, "STOCKPOT_ADMIN_KEY": ""})
    for command in (("stats",), ("list",), ("explain",), ("invalidate", "all", "--yes")):
        assert "STOCKPOT_ADMIN_KEY" in operator.run(*command, code=2)

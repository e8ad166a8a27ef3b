"""Real servers as processes, for tests in which the process matters: killed, stopped, several at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from stockpot.settings import load_settings

READY_S = 120.0
PATIENCE_S = 60.0
SECRET = "a secret of at least 16 bytes"


class Server:
    """`stockpot serve` on a free port, with small context and RAM. What it keeps lies in `folder`; models and
    libraries are those of the user. `settings` are environment variables."""

    def __init__(
        self, folder: Path, *, model: str | None = None, cache: bool = True, **settings: str
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "empty.toml").touch()
        users, own = load_settings(folder / "empty.toml").cache_dir, folder / "cache"
        own.mkdir(exist_ok=True)
        for shared in ("models", "engine"):
            if (users / shared).exists() and not (own / shared).exists():
                (own / shared).symlink_to(users / shared)
        self._environment = {
            **os.environ,
            "STOCKPOT_CACHE_DIR": str(own),
            "STOCKPOT_CACHE__DISK__PATH": str(folder / "kv"),
            "STOCKPOT_CACHE__DISK__CAPACITY_BYTES": str(2**29),
            "STOCKPOT_CACHE__SECRET": SECRET,
            "STOCKPOT_CACHE__BLOCK_TOKENS": "64",
            **settings,
        }
        self._arguments = [
            *(
                "--port",
                "0",
                "--context-tokens",
                "2048",
                "--ram-gib",
                "0.1",
                "--config",
                str(folder / "empty.toml"),
            ),
            *(() if model is None else ("--model", model)),
            *(() if cache else ("--no-cache",)),
        ]
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.client = httpx2.Client()
        self.model = ""
        self.log: list[str] = []

    def start(self) -> Server:
        """Start it and wait until it is ready."""
        program = "from stockpot.cli.main import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
            cwd=self.folder,
        )
        assert self._process.stdout is not None
        url = None
        for line in self._process.stdout:
            self.log.append(line)
            url = url or re.search(r"http://127\.0\.0\.1:\d+", line)
            if line.startswith("try:"):
                break
        assert url is not None, "".join(self.log)
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()
        self.client = httpx2.Client(base_url=url[0], timeout=READY_S)
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]
        return self

    def complete(self, prompt: str, max_tokens: int = 8) -> dict[str, Any]:
        """A greedy completion; the answer's body."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(self, prompt: str) -> tuple[str, dict[str, int]]:
        """The text of a greedy completion, and what was cached, by tier (those that gave something)."""
        body = self.complete(prompt)
        cached = body["stockpot"]["cached_tokens"]
        return body["choices"][0]["text"], {tier: tokens for tier, tokens in cached.items() if tokens}

    def admin(self, method: str, path: str, **body: Any) -> Any:
        answer = self.client.request(method, f"/admin/cache/{path}", json=body or None)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def written(self) -> None:
        """Wait until nothing waits to be written behind."""
        until(lambda: self.admin("GET", "stats")["write_behind_bytes"] == 0)
        time.sleep(0.1)  # the batch being written is not counted

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._reader is not None:
                self._reader.join(PATIENCE_S)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self.client.close()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _drain(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self.log += self._process.stdout


def until(true: Callable[[], bool]) -> None:
    """Wait until it is so. The bound says "never" on any machine."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, "it does not come about"
        time.sleep(0.02)


def story(seed: int, sentences: int = 30) -> str:
    """A prompt of some ten tokens a sentence; those of one seed are the beginnings of each other."""
    names = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gail")
    things = ("a lamp", "the old book", "two apples", "a letter", "his coat")
    told = [
        f"{names[(n * 3 + seed) % 7]} gave {things[n * n % 5]} to {names[(n + 2 * seed) % 7]} on day {n}."
        for n in range(sentences)
    ]
    return " ".join([f"Story {seed}.", *told])

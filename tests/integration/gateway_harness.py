"""The assembled gateway for tests: its parts as `stockpot serve` puts them together, on a real socket.

    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        answer = await gw.chat("hello")
        record = await gw.record()

`gateway` runs in the loop of the test, `Process` is `stockpot serve` as a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2
from tests.mock_upstream import MockUpstream

from stockpot.backends.backend import Backend
from stockpot.clock import SystemClock
from stockpot.records import RequestRecord
from stockpot.serving import open_serving
from stockpot.settings import Settings, load_settings
from stockpot.wire.app import application
from stockpot.wire.server import Server, listen

NEVER_S = 30.0
"""What has not happened by then never will."""

ADMIN = {"authorization": "Bearer the-admin-key"}

PRICES = {"input": 1.0, "output": 2.0}


def backends(kind: str = "openai", **mocks: MockUpstream | dict[str, Any]) -> dict[str, Any]:
    """Sections of backends, all of which serve `m`; a dictionary says more than where one is (`mock`)."""
    sections: dict[str, Any] = {}
    for name, given in mocks.items():
        extra = dict(given) if isinstance(given, dict) else {"mock": given}
        mock = extra.pop("mock")
        assert isinstance(mock, MockUpstream)
        url = mock.url
        common: dict[str, Any] = {"kind": kind, "url": url, "models": ["m"], "idle_timeout_s": 20}
        sections[name] = {**common, "prices": {"m": PRICES}, **extra}
    return sections


@dataclass(slots=True)
class Stream:
    """An answer that came as SSE: its events' payloads, decoded, and whether it was whole (`[DONE]`)."""

    status: int
    events: list[Any] = field(default_factory=list[Any])
    comments: list[str] = field(default_factory=list[str])
    done: bool = False

    @property
    def text(self) -> str:
        choices: list[Any] = [choice for event in self.events for choice in event.get("choices", ())]
        return "".join(choice.get("delta", {}).get("content") or "" for choice in choices)

    @property
    def error(self) -> Any:
        """The error that ended it; None: it ended well."""
        return next((event["error"] for event in self.events if "error" in event), None)


class _Server(Server):
    """Leaves the signals to the test."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class Gateway:
    """A gateway that runs: `records` are what its observers were told, `client` is one of its clients."""

    def __init__(self, settings: Settings, engine: Backend | None, headers_timeout_s: float) -> None:
        clock = SystemClock()
        self.records: list[RequestRecord] = []
        self.serving = open_serving(settings, engine, clock=clock, observers=[self])
        self.service = self.serving.service
        self.metrics = self.service.metrics
        self.server = _Server(
            application(self.service),
            self.serving,
            drain_s=settings.server.drain_s,
            headers_timeout_s=headers_timeout_s,
        )
        self.listener = listen("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx2.AsyncClient(base_url=self.url, timeout=NEVER_S)
        self._known = 0

    def observe_request(self, record: RequestRecord) -> None:
        self.records.append(record)

    def request(self, text: str = "hello there", **fields: Any) -> dict[str, Any]:
        return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}

    async def chat(
        self, text: str = "hello there", *, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx2.Response:
        """One chat request; `fields` are more of its body."""
        body = self.request(text, **fields)
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def stream(
        self, text: str = "hello there", *, headers: dict[str, str] | None = None, **fields: Any
    ) -> Stream:
        """One chat request as a stream, read to its end."""
        body = self.request(text, stream=True, **fields)
        return await self.stream_of("/v1/chat/completions", body, headers=headers)

    async def stream_of(
        self, path: str, body: dict[str, Any], *, headers: dict[str, str] | None = None
    ) -> Stream:
        async with self.client.stream("POST", path, json=body, headers=headers) as response:
            stream = Stream(response.status_code)
            if response.status_code != 200:
                stream.events.append(json.loads(await response.aread()))
                return stream
            async for line in response.aiter_lines():
                if line.startswith(":"):
                    stream.comments.append(line)
                elif line == "data: [DONE]":
                    stream.done = True
                elif line.startswith("data: "):
                    stream.events.append(json.loads(line.removeprefix("data: ")))
        return stream

    async def record(self) -> RequestRecord:
        """The next record, waited for: that of a client that left comes when its backend has been told."""
        await until(lambda: len(self.records) > self._known)
        self._known += 1
        return self.records[self._known - 1]

    async def usage(self, by: str = "", **query: str) -> list[dict[str, Any]]:
        """Rows of `/admin/usage`."""
        answer = await self.client.get(
            "/admin/usage", params={"by": by, **query} if by else query, headers=ADMIN
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["rows"]

    async def create_key(self, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post("/admin/keys", json={"name": "k", **fields}, headers=ADMIN)
        assert answer.status_code == 201, answer.text
        return answer.json()


@asynccontextmanager
async def gateway(
    folder: Path, *, engine: Backend | None = None, headers_timeout_s: float = 60.0, **sections: Any
) -> AsyncGenerator[Gateway]:
    """A gateway with these settings, in the running loop, administered with `ADMIN`; stopped at the end,
    without a drain."""
    sections.setdefault("access", {"admin_key": "the-admin-key"})
    running = Gateway(settings_of(folder, engine is not None, sections), engine, headers_timeout_s)
    await running.serving.start()
    serves = asyncio.create_task(running.server.serve([running.listener]))
    await until(lambda: running.server.started)
    try:
        async with running.client:
            yield running
    finally:
        running.server.should_exit = True
        async with asyncio.timeout(NEVER_S):
            await serves
            await running.serving.stop(drain=False)
        running.listener.close()


def settings_of(folder: Path, engine: bool, sections: dict[str, Any]) -> Settings:
    (folder / "empty.toml").touch()
    sections.setdefault("engine", {"enabled": engine})
    return load_settings(folder / "empty.toml", data_dir=folder / "data", **sections)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what must come."""
    async with asyncio.timeout(NEVER_S):
        while not holds():  # noqa: ASYNC110 - anything may be waited for
            await asyncio.sleep(0.005)


class Process:
    """`stockpot serve` with these settings; killed at the end, if it still runs."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        sections.setdefault("engine", {"enabled": False})
        self.folder = folder
        (folder / "empty.toml").touch()
        self.environment = {
            **os.environ,
            "STOCKPOT_DATA_DIR": str(folder / "data"),
            **{f"STOCKPOT_{name.upper()}": json.dumps(value) for name, value in sections.items()},
        }
        self.url = ""
        self.log: list[str] = []
        self.process: asyncio.subprocess.Process | None = None
        self._reads: asyncio.Task[None] | None = None

    async def run(self, *arguments: str) -> asyncio.subprocess.Process:
        program = "from stockpot.cli.main import main; main()"
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, *arguments, "--config", str(self.folder / "empty.toml")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self.environment,
            cwd=self.folder,
        )

    async def command(self, *arguments: str) -> str:
        """What another command of `stockpot`, with the same settings, prints."""
        process = await self.run(*arguments)
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        return out.decode()

    async def __aenter__(self) -> Self:
        self.process = await self.run("serve", "--port", "0")
        assert self.process.stdout is not None
        async with asyncio.timeout(NEVER_S):
            async for line in self.process.stdout:
                self.log.append(line.decode())
                if found := re.search(r"http://127\.0\.0\.1:\d+(?=/v1)", self.log[-1]):
                    self.url = self.url or found[0]
                if self.log[-1].startswith("try:"):
                    break
        if not self.url:
            await self.process.wait()
            raise RuntimeError("".join(self.log))
        self._reads = asyncio.create_task(self._drain())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        if self._reads is not None:
            await self._reads

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self) -> int:
        assert self.process is not None
        async with asyncio.timeout(NEVER_S):
            return await self.process.wait()

    async def _drain(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.log.append(line.decode())

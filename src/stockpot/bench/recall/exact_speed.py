"""The same request again over HTTP: a server and a mock provider in processes of their own, and a client that
keeps its connection; keys, limits, ledger and metrics are on."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from stockpot.bench.gateway_server import ServedGateway, StockpotGateway
from stockpot.bench.http_stream import BodyDecoder
from stockpot.bench.mock_provider import MOCK_MODEL, mock_command
from stockpot.bench.progress import BenchProgress
from stockpot.bench.server import running_server
from stockpot.errors import ServerUnreachable

_GIVE_UP_S = 60.0
_CHUNKS = 100
_SYSTEM = " ".join(["You answer briefly, in the language of the question, and never make anything up."] * 10)
_CONFIG = """
[recall]
exact = true
"""


class RecallGateway(StockpotGateway):
    """As in the benchmark of the gateway, and answers are kept."""

    def serve(self, upstream_url: str, model: str, folder: Path) -> ServedGateway:
        served = super().serve(upstream_url, model, folder)
        with (folder / "stockpot.toml").open("a", encoding="utf-8") as config:
            config.write(_CONFIG)
        return served


@dataclass(slots=True)
class ExactTimes:
    """Seconds at the client, from the first byte sent to the last one received. `direct` asks the provider
    itself, `miss` has it asked, `hit` gets what was kept, `streamed` gets the same as a stream, whose first
    byte came after `first`. `server` is the server's own account of a hit."""

    direct_s: list[float] = field(default_factory=list[float])
    miss_s: list[float] = field(default_factory=list[float])
    hit_s: list[float] = field(default_factory=list[float])
    server_s: list[float] = field(default_factory=list[float])
    streamed_s: list[float] = field(default_factory=list[float])
    first_s: list[float] = field(default_factory=list[float])


async def time_exact(rounds: int, requests: int, progress: BenchProgress) -> ExactTimes:
    """Each round asks `requests` times each way, one after the other. Raises ServerUnreachable where a server
    does not come up, or answers what it should not."""
    times = ExactTimes()
    async with _servers() as (direct, ours):
        number = 0
        await ours.ask("the one", expected="miss")
        for round_number in range(rounds + 1):
            seen = times if round_number else ExactTimes()  # the first one warms up
            for _ in range(requests):
                number += 1
                seen.direct_s.append((await direct.ask(f"number {number}")).total_s)
                seen.miss_s.append((await ours.ask(f"number {number}", expected="miss")).total_s)
                hit = await ours.ask("the one", expected="exact")
                seen.hit_s.append(hit.total_s)
                seen.server_s.append(hit.server_s)
                streamed = await ours.ask("the one", expected="exact", stream=True)
                seen.streamed_s.append(streamed.total_s)
                seen.first_s.append(streamed.first_s)
            progress("exact hits", round_number, rounds)
    return times


@asynccontextmanager
async def _servers() -> AsyncGenerator[tuple[_Client, _Client]]:
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as folder:
        async with running_server(mock_command(chunks=_CHUNKS, interval_s=0.0)) as provider:
            served = RecallGateway().serve(provider.url, MOCK_MODEL, Path(folder))
            async with (
                running_server(served.command) as server,
                _client(provider.url, "none") as direct,
                _client(server.url, served.key) as ours,
            ):
                yield direct, ours


@dataclass(frozen=True, slots=True)
class _Answer:
    first_s: float
    total_s: float
    server_s: float


class _Client:
    """One connection, kept."""

    def __init__(
        self, url: str, key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._head = f"Host: {urlsplit(url).netloc}\r\nAuthorization: Bearer {key}\r\n"
        self._reader = reader
        self._writer = writer

    async def ask(self, question: str, *, expected: str | None = None, stream: bool = False) -> _Answer:
        """`expected` is what the header must say of recall."""
        request = self._request(question, stream=stream)
        started_s = time.perf_counter()
        self._writer.write(request)
        async with asyncio.timeout(_GIVE_UP_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            status, headers = _read_head(head)
            body = BodyDecoder(headers)
            parts: list[bytes] = []
            first_s = 0.0
            while not body.complete:
                data = await self._reader.read(1 << 16)
                if not data:
                    raise ServerUnreachable("The server closed a connection in the middle of an answer.")
                first_s = first_s or time.perf_counter() - started_s
                parts.append(body.feed(data))
        total_s = time.perf_counter() - started_s
        content = b"".join(parts)
        told = headers.get("x-stockpot-recall")
        if status != 200 or told != expected:
            raise ServerUnreachable(
                f"A request that should be answered as {expected or 'by the provider'} got status {status},"
                f" recall {told or 'nothing'}: {content[:200]!r}."
            )
        return _Answer(first_s, total_s, _own_account(content) if expected and not stream else 0.0)

    def _request(self, question: str, *, stream: bool) -> bytes:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
        content: dict[str, object] = {"model": MOCK_MODEL, "messages": messages, "temperature": 0}
        if stream:
            content["stream"] = True
        body = msgspec.json.encode(content)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\n{self._head}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@asynccontextmanager
async def _client(url: str, key: str) -> AsyncGenerator[_Client]:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 20)
    try:
        yield _Client(url, key, reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


def _read_head(head: bytes) -> tuple[int, dict[str, str]]:
    status, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(status.split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}


def _own_account(body: bytes) -> float:
    answer: dict[str, Any] = msgspec.json.decode(body)
    return float(answer["stockpot"]["total_ms"]) / 1e3

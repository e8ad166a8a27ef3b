"""What the benchmarks ask of a Stockpot server besides answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import msgspec

from stockpot.bench.client import BenchClient, ChatMessage
from stockpot.bench.server import RunningServer, running_server, stockpot_command
from stockpot.engine.reports import TierFigures
from stockpot.errors import ServerUnreachable

_POLL_S = 0.1
BOUND_FACTOR = 1.1
_PROCESS_BYTES = 300 * 1_000_000
"""What an idle Python process with all libraries may take beside weights, KV and the RAM tier."""


class CacheFigures(msgspec.Struct, frozen=True):
    """The part of /admin/cache/stats that benchmarks read (see `engine.reports.EngineStats`)."""

    cells: int
    kv_bytes_per_token: int
    ram_capacity_bytes: int
    ram_used_bytes: int
    prompt_tokens_computed: int
    prompt_tokens_cached: dict[str, int]
    running: int = 0
    waiting: int = 0
    tokens_generated: int = 0
    evicted_blocks: dict[str, int] = {}
    write_behind_bytes: int = 0
    tiers: dict[str, TierFigures] = {}


class StockpotServer:
    """A running server and its client."""

    def __init__(self, running: RunningServer, client: BenchClient, details: Mapping[str, Any]) -> None:
        self.running = running
        self.client = client
        self.details = details

    async def cache_figures(self) -> CacheFigures:
        """A snapshot of the caches."""
        return msgspec.convert(await self.client.get("/admin/cache/stats"), CacheFigures)

    async def wait_until(
        self, what: str, reached: Callable[[CacheFigures], bool], *, timeout_s: float = 60.0
    ) -> CacheFigures:
        """The first figures for which `reached` is true. Raises ServerUnreachable where none come in time;
        `what` is said then."""
        deadline_s = time.monotonic() + timeout_s
        while not reached(figures := await self.cache_figures()):
            if time.monotonic() > deadline_s:
                raise ServerUnreachable(f"{self.running.url} did not get to {what} within {timeout_s:g} s.")
            await asyncio.sleep(_POLL_S)
        return figures

    async def wait_until_written(self) -> CacheFigures:
        """Until nothing runs, nothing waits to be written behind RAM, and the last batch has been."""
        written: list[int] = [-1, -1]

        def settled(figures: CacheFigures) -> bool:
            written.append(sum(tier.counts.written_bytes for tier in figures.tiers.values()))
            busy = figures.running or figures.waiting or figures.write_behind_bytes
            # A batch leaves the queue before it is written: the totals must have stood still for two polls.
            return not busy and written[-1] == written[-2] == written[-3]

        return await self.wait_until("an empty write-behind queue", settled)

    async def memory_bound_bytes(self, *, beside_bytes: int = 0) -> float:
        """What the process may take: 1.1 x (weights + configured KV + RAM tier + 300 MB + `beside_bytes`)."""
        caches = await self.cache_figures()
        kv_bytes = caches.cells * caches.kv_bytes_per_token
        return BOUND_FACTOR * (
            int(self.details["weights_bytes"])
            + kv_bytes
            + caches.ram_capacity_bytes
            + _PROCESS_BYTES
            + beside_bytes
        )

    async def tokenize(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The token ids of a conversation as the model is given it."""
        content = {"model": self.client.model, "messages": list(messages)}
        answer = await self.client.post("/tokenize", content)
        return msgspec.convert(answer["tokens"], list[int])


class Launch(Protocol):
    """Starts a server with the given settings and stops it; `stockpot_server` is the real one."""

    def __call__(
        self, settings: Mapping[str, Mapping[str, object]], /
    ) -> AbstractAsyncContextManager[StockpotServer]: ...


@asynccontextmanager
async def stockpot_server(settings: Mapping[str, Mapping[str, object]]) -> AsyncGenerator[StockpotServer]:
    """Start a Stockpot server with `settings` over those of the environment (without a disk tier where they
    say nothing of it); stop it at the end."""
    async with running_server(stockpot_command(settings)) as running:
        yield await client_of(running)


async def client_of(running: RunningServer) -> StockpotServer:
    """A client of a Stockpot server that runs. Raises ServerUnreachable where it serves no model."""
    models = await BenchClient(running.url, "").get("/v1/models")
    if not models["data"]:
        raise ServerUnreachable("The server started for the benchmark serves no model.")
    model = models["data"][0]
    return StockpotServer(running, BenchClient(running.url, model["id"]), model.get("details") or {})

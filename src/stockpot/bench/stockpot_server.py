"""What the benchmarks ask of a Stockpot server besides answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import msgspec

from stockpot.bench.client import BenchClient, ChatMessage
from stockpot.bench.server import RunningServer, running_server, stockpot_command
from stockpot.errors import ServerUnreachable


class CacheFigures(msgspec.Struct, frozen=True):
    """The part of /admin/cache/stats that benchmarks read (see `engine.reports.EngineStats`)."""

    cells: int
    kv_bytes_per_token: int
    ram_capacity_bytes: int
    ram_used_bytes: int
    prompt_tokens_computed: int
    prompt_tokens_cached: dict[str, int]


class StockpotServer:
    """A running server and its client."""

    def __init__(self, running: RunningServer, client: BenchClient, details: Mapping[str, Any]) -> None:
        self.running = running
        self.client = client
        self.details = details

    async def cache_figures(self) -> CacheFigures:
        """A snapshot of the caches."""
        return msgspec.convert(await self.client.get("/admin/cache/stats"), CacheFigures)

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
    """Start a Stockpot server with `settings` over those of the environment; stop it at the end."""
    async with running_server(stockpot_command(settings)) as running:
        models = await BenchClient(running.url, "").get("/v1/models")
        if not models["data"]:
            raise ServerUnreachable("The server started for the benchmark serves no model.")
        model = models["data"][0]
        yield StockpotServer(running, BenchClient(running.url, model["id"]), model.get("details") or {})

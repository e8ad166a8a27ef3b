"""Servers without a model: in a thread for most tests, in a process of its own where that matters."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import pytest

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.bench.client import BenchClient
from stockpot.bench.server import RunningServer, ServerCommand, free_port
from stockpot.bench.stockpot_server import Launch, StockpotServer
from stockpot.settings import Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import create_app
from stockpot.wire.server import Server, listen

_BEHAVIOUR = FakeBehaviour(context_tokens=200_000, max_running=32, queue_limit=64)

_PROCESS = """
import asyncio, sys
from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.settings import Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import create_app
from stockpot.wire.server import Server, listen

async def main():
    backend = FakeBackend(FakeBehaviour(context_tokens=200_000, max_running=32, queue_limit=64))
    await backend.start()
    app = create_app(backend, Settings(), Metrics(backend.engine_stats))
    await Server(app, backend, drain_s=1).serve([listen("127.0.0.1", int(sys.argv[1]))])

asyncio.run(main())
"""


@contextmanager
def _in_thread() -> Generator[str]:
    """The address of a server in a thread."""
    backend = FakeBackend(_BEHAVIOUR)
    server = Server(create_app(backend, Settings(), Metrics(backend.engine_stats)), backend, drain_s=1)
    listener = listen("127.0.0.1", 0)
    loop = asyncio.new_event_loop()

    async def run() -> None:
        await backend.start()
        await server.serve([listener])

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture
def url() -> Generator[str]:
    """A server that answers."""
    with _in_thread() as address:
        yield address


@pytest.fixture
def launch() -> Launch:
    """In place of `stockpot_server`: its figures are the fake's, its memory that of the tests."""

    @asynccontextmanager
    async def start(settings: Mapping[str, Mapping[str, object]]) -> AsyncGenerator[StockpotServer]:
        with _in_thread() as address:
            running = RunningServer(address, os.getpid())
            yield StockpotServer(running, BenchClient(address, "fake"), {"weights_bytes": 2**30})

    return start


@pytest.fixture
def process_command() -> ServerCommand:
    """A server in a process of its own, not started yet."""
    port = free_port()
    return ServerCommand("fake", (sys.executable, "-c", _PROCESS, str(port)), port, "/ready", start_s=60)


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Stub = Callable[[Handler], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def _stub(handler: Handler) -> AsyncGenerator[str]:
    handled: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await handler(reader, writer)
        writer.close()
        await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handled.append(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.wait_for(asyncio.gather(*handled, return_exceptions=True), 10)


@pytest.fixture
def stub() -> Stub:
    """A server that reads the head of each request and then does what the handler does."""
    return _stub

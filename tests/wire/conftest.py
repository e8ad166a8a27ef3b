"""A real server on a free port, over a backend without a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

import httpx2
import pytest

from stockpot.backends.fake import FakeBackend
from stockpot.settings import AccessSettings, EngineSettings, ServerSettings, Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import create_app
from stockpot.wire.server import Server, listen

Serve = Callable[..., AbstractContextManager[httpx2.Client]]


@contextmanager
def _served(
    backend: FakeBackend,
    *,
    max_body_bytes: int = 2**20,
    body_timeout_s: float = 60.0,
    request_timeout_s: float = 60.0,
    drain_s: float = 10.0,
    headers_timeout_s: float = 60.0,
    access: AccessSettings | None = None,
    stops: list[Callable[[], object]] | None = None,
) -> Generator[httpx2.Client, None, None]:
    """A client of a server in a thread of its own. What is put into `stops` acts as a signal."""
    settings = Settings(
        server=ServerSettings(max_body_bytes=max_body_bytes, body_timeout_s=body_timeout_s, drain_s=drain_s),
        engine=EngineSettings(request_timeout_s=request_timeout_s),
        access=access or AccessSettings(),
    )
    app = create_app(backend, settings, Metrics(backend.engine_stats))
    server = Server(app, backend, drain_s=drain_s, headers_timeout_s=headers_timeout_s)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    loop = asyncio.new_event_loop()

    async def run() -> None:
        await backend.start()
        await server.serve([listener])

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    if stops is not None:
        stops.append(lambda: loop.call_soon_threadsafe(server.request_stop))
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Starts a server over the given FakeBackend; keywords as in `_served`."""
    return _served


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    """The backend behind `client`."""
    return FakeBackend()


@pytest.fixture(scope="module")
def client(backend: FakeBackend) -> Generator[httpx2.Client, None, None]:
    """A client of a server with everything at its default."""
    with _served(backend) as client:
        yield client

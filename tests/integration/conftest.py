"""Fixtures of tests with servers as processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.servers import Server
from tests.redis_server import RedisServer

StartServer = Callable[..., Server]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers (arguments as of `Server`) and ends them with the test."""
    started: list[Server] = []

    def start(folder: Path, *, model: str | None = None, cache: bool = True, **settings: str) -> Server:
        server = Server(folder, model=model, cache=cache, **settings)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own: running, empty."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()

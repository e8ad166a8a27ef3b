"""A Redis for the tests of recall, emptied for each."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from tests.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis_of_module(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisServer, None, None]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis(redis_of_module: RedisServer) -> RedisServer:
    if not redis_of_module.answers():  # a test has stopped it
        redis_of_module.restart_empty()
    redis_of_module.ask(b"FLUSHALL")
    return redis_of_module

"""A cache made from settings, around engines in this process: restart, freshness, errands, refusals."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import SecretStr
from tests.kv.conftest import chain
from tests.kv.engine_harness import PATIENCE_S, SECRET, namespace_of
from tests.redis_server import RedisServer

from stockpot.backends.embedded import EmbeddedBackend
from stockpot.clock import SystemClock
from stockpot.engine.core import EngineLimits
from stockpot.engine.fake_driver import FakeDriver
from stockpot.errors import ConfigurationError, QueueFull
from stockpot.events import Completed, Delta
from stockpot.kv.cache import CacheLimits, CacheObservers
from stockpot.kv.invalidation import Invalidation
from stockpot.kv.service import CacheService, open_cache
from stockpot.requests import CompletionRequest, Generation, Sampling
from stockpot.settings import CacheSettings, DiskSettings, RedisSettings

PROMPT = "a prompt that is long enough for many blocks, so that a tier behind RAM is worth asking for it"


def open_service(folder: Path, driver: FakeDriver, redis: RedisServer | None = None) -> CacheService:
    settings = CacheSettings(
        secret=SecretStr(SECRET.decode()),
        yield_memory=False,
        disk=DiskSettings(capacity_bytes=2**24),
        redis=RedisSettings(url=redis.url if redis else None, timeout_s=5),
    )
    return open_cache(
        settings,
        namespace_of(driver.facts),
        CacheLimits(block_tokens=8, ram_bytes=2**20, served_names=frozenset({"fake"})),
        folder=folder,
        clock=SystemClock(),
        observers=CacheObservers(),
    )


def new_backend(folder: Path, redis: RedisServer | None = None) -> tuple[EmbeddedBackend, CacheService]:
    driver = FakeDriver(max_batch_tokens=24)
    service = open_service(folder, driver, redis)
    backend = EmbeddedBackend(driver, EngineLimits(block_tokens=8), served_name="fake", cache=service)
    return backend, service


async def ask(backend: EmbeddedBackend, name: str, prompt: str = PROMPT) -> tuple[list[int], dict[str, int]]:
    request = CompletionRequest(Generation("fake", name, Sampling(temperature=0), max_tokens=4), prompt)
    events = [event async for event in backend.generate(request)]
    done = events[-1]
    assert isinstance(done, Completed)
    tokens = [token for event in events if isinstance(event, Delta) for token in event.token_ids]
    return tokens, {tier: count for tier, count in done.usage.cached_tokens.items() if count}


@pytest.mark.anyio
async def test_what_one_process_kept_the_next_has_and_what_was_invalidated_it_has_not(tmp_path: Path) -> None:
    backend, service = new_backend(tmp_path)
    await backend.start()
    answer, cached = await ask(backend, "first")
    assert cached == {}
    assert service.cache.flush(PATIENCE_S)
    await backend.stop(drain=True)
    backend.close()

    backend, service = new_backend(tmp_path)
    await backend.start()
    again, _ = await ask(backend, "second")
    assert again == answer
    service.follower.append("all", by="ann")
    await backend.stop(drain=True)
    backend.close()

    backend, service = new_backend(tmp_path)
    await backend.start()
    again, cached = await ask(backend, "third")
    assert (again, cached) == (answer, {})
    await backend.stop(drain=True)
    backend.close()


@pytest.mark.anyio
async def test_an_invalidation_on_one_node_reaches_the_other(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    nodes = [new_backend(tmp_path / name, redis_server) for name in ("a", "b")]
    for backend, _ in nodes:
        await backend.start()
    (a, a_service), (b, b_service) = nodes
    answer, _ = await ask(a, "first")
    await ask(b, "first there")
    a_service.follower.append("model", "fake", by="ann")
    deadline_s = time.monotonic() + PATIENCE_S
    while b_service.cache.store.blocks:
        assert time.monotonic() < deadline_s
        await anyio.sleep(0.01)
    again, cached = await ask(b, "second there")
    assert (again, cached) == (answer, {})
    causes = [gap.cause for gap in b_service.cache.explanations.recent(1)[0].gaps]
    assert causes[0] == "invalidated"
    for backend, _ in nodes:
        await backend.stop(drain=True)
        backend.close()


class Host:
    """An engine that has no time for the first errands."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.invalidated = threading.Event()

    def invalidate(self, records: Sequence[Invalidation]) -> int:
        if self.refusals:
            self.refusals -= 1
            raise QueueFull("too many errands wait", retry_after_s=1)
        self.invalidated.set()
        return 0

    def resize(self, capacity_bytes: int) -> None:
        del capacity_bytes


def test_an_invalidation_is_not_lost_when_the_engine_takes_no_more_errands(tmp_path: Path) -> None:
    service = open_service(tmp_path, FakeDriver())
    host = Host(refusals=3)
    service.start(host)
    service.follower.append("all", by="ann")
    assert host.invalidated.wait(PATIENCE_S)
    service.close()
    service.close()


def test_one_history_of_invalidations_and_departures_for_all_parts(tmp_path: Path) -> None:
    """Empty ones are false in Python, and must not be replaced by others."""
    service = open_service(tmp_path, FakeDriver())
    service.follower.append("all")
    stale = chain(1)[0].head
    record = service.cache.invalidations.stale(stale)
    assert record is not None
    assert record.kind == "all"
    assert service.cache.store.departures is service.cache.departures
    service.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"encrypt": True},
        {"secret": SecretStr("short")},
        {"redis": RedisSettings(url="redis://127.0.0.1:1/0")},
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    driver = FakeDriver()
    with pytest.raises(ConfigurationError):
        open_cache(
            CacheSettings(**settings),
            namespace_of(driver.facts),
            CacheLimits(block_tokens=8),
            folder=tmp_path,
            clock=SystemClock(),
            observers=CacheObservers(),
        )

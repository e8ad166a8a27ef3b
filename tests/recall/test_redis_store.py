"""The Redis store when Redis is slow, full, emptied or gone: misses, told to those who must know."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tests.recall.kept import START_S, key_of, make_entry, make_observation
from tests.redis_server import RedisServer

from stockpot.clock import VirtualClock
from stockpot.errors import ConfigurationError, StockpotError
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.stores.open_store import open_store
from stockpot.recall.stores.store import AnswerStore
from stockpot.settings_recall import RecallSettings

pytestmark = pytest.mark.anyio


def opened(url: str, clock: VirtualClock, **other: Any) -> AnswerStore:
    return open_store(RecallSettings(store=SecretStr(url), **other), Path("/nowhere"), clock)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(START_S)


async def listed(store: AnswerStore) -> list[Entry]:
    return [entry async for entry in store.entries()]


async def test_redis_that_is_gone_is_a_miss_and_used_again_when_it_is_back(
    redis: RedisServer, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(redis.url, clock)
    await store.start()
    store.put(make_entry(1))
    await listed(store)
    redis.stop()
    clock.advance(1)
    for _ in range(50):
        assert await store.get(key_of(1)) is None  # it may have been invalidated meanwhile
        assert await store.by_id(make_entry(1).id) is None
    store.put(make_entry(2))
    store.learn(make_observation(1, clock))
    assert await listed(store) == []
    assert await store.existing([key_of(1)]) == {key_of(1)}
    assert await store.observations() == ()
    with pytest.raises(StockpotError):
        await store.remove(Selector(model="large"))
    stats = store.stats()
    assert (stats.lost, stats.reachable) == (1, False)
    assert stats.failures < 10  # it was left alone most of the time
    assert caplog.text.count("requests go on") == 2  # reading, writing
    redis.restart_empty()
    clock.advance(60)
    store.put(make_entry(3))
    assert [entry.key for entry in await listed(store)] == [key_of(3)]
    assert await store.get(key_of(1)) is None
    assert await store.get(key_of(3)) is not None
    assert store.stats().reachable
    await store.close()


async def test_redis_that_does_not_answer_is_not_waited_for_each_time(
    redis: RedisServer, clock: VirtualClock
) -> None:
    store = opened(redis.url, clock)
    await store.start()
    store.put(make_entry(1))
    await listed(store)
    clock.advance(1)
    redis.pause()
    try:
        for _ in range(200):
            assert await store.get(key_of(1)) is None
        store.put(make_entry(2))
        assert await listed(store) == []
        assert 2 <= store.stats().failures <= 4  # of two hundred
        assert store.stats().lost == 1
    finally:
        redis.resume()
    clock.advance(60)
    assert await store.get(key_of(1)) is not None
    await store.close()


async def test_a_write_that_comes_late_does_not_bring_back_what_was_invalidated(
    redis: RedisServer, clock: VirtualClock
) -> None:
    slow, other = opened(redis.url, clock), opened(redis.url, clock)
    await slow.start()
    await other.start()
    redis.pause()
    slow.put(make_entry(1))
    for _ in range(500):  # given up; Redis will still read it
        await asyncio.sleep(0.02)
        if slow.stats().lost:
            break
    assert slow.stats().lost == 1
    redis.resume()
    await asyncio.sleep(0.05)
    await other.remove(Selector(model="large"))
    clock.advance(60)
    assert await slow.get(key_of(1)) is None
    assert await listed(other) == []
    await slow.close()
    await other.close()


async def test_it_starts_without_redis(redis: RedisServer, clock: VirtualClock) -> None:
    redis.stop()
    store = opened(redis.url, clock)
    await store.start()
    assert await store.get(key_of(1)) is None
    redis.restart_empty()
    clock.advance(60)
    store.put(make_entry(1))
    assert [entry.key for entry in await listed(store)] == [key_of(1)]
    await store.close()


async def test_a_full_redis_keeps_nothing_more_and_still_invalidates(
    redis: RedisServer, clock: VirtualClock
) -> None:
    store = opened(redis.url, clock)
    await store.start()
    store.put(make_entry(1))
    await listed(store)
    redis.ask(b"CONFIG", b"SET", b"maxmemory", b"1")
    try:
        store.put(make_entry(2))
        await listed(store)
        assert store.stats().lost == 1
        removed = await store.remove(Selector(model="large"))
        assert key_of(1) in {entry.key for entry in removed}
    finally:
        redis.ask(b"CONFIG", b"SET", b"maxmemory", b"0")
    assert await listed(store) == []
    await store.close()


async def test_what_was_emptied_is_forgotten_here_too(redis: RedisServer, clock: VirtualClock) -> None:
    store = opened(redis.url, clock)
    await store.start()
    store.put(make_entry(1))
    await listed(store)
    redis.ask(b"FLUSHALL")
    clock.advance(1)
    assert await store.get(key_of(1)) is None
    store.put(make_entry(2))
    assert [entry.key for entry in await listed(store)] == [key_of(2)]
    assert store.stats().lost == 0
    await store.close()


async def test_what_redis_let_expire_leaves_no_trace(redis: RedisServer, clock: VirtualClock) -> None:
    store = opened(redis.url, clock)
    await store.start()
    for number in range(300):
        tags = frozenset({f"t{number}"})
        store.put(make_entry(number, expires_at=START_S + 30, tags=tags, partition=b"p" * 16))
    await listed(store)
    assert int(redis.ask(b"PTTL", b"stockpot:recall:e:" + make_entry(1).id.encode())) > 0  # type: ignore[arg-type]
    clock.advance(31)
    for number in range(2):  # some leave with each write
        store.put(make_entry(1000 + number))
        await listed(store)
    assert (store.stats().entries, store.stats().expired) == (2, 300)
    await store.remove(Selector(everything=True))
    assert store.stats().size_bytes == 0
    assert redis.all_keys() == [b"stockpot:recall:log", b"stockpot:recall:state"]
    await store.close()


def test_an_address_that_does_not_fit_is_told_without_its_password(clock: VirtualClock) -> None:
    with pytest.raises(ConfigurationError) as caught:
        opened("redis://:hunter2@somewhere:port", clock)
    assert "recall.store" in str(caught.value) and "hunter2" not in str(caught.value)

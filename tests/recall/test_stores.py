"""The two stores: whatever is done in whatever order, by two processes, both hold what a dictionary would."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import SecretStr
from tests.recall.kept import START_S, key_of, make_entry, make_observation
from tests.redis_server import RedisServer

from stockpot.clock import VirtualClock
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.stores.open_store import open_store
from stockpot.recall.stores.store import AnswerStore
from stockpot.settings_recall import RecallSettings

pytestmark = pytest.mark.anyio

CAPACITY_BYTES = 2**20
T = TypeVar("T")


@pytest.fixture(params=["sqlite", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., AnswerStore]]:
    """Opens stores that share what they keep, as processes would."""
    url = request.getfixturevalue("redis").url if request.param == "redis" else None

    def make(clock: VirtualClock, **other: Any) -> AnswerStore:
        return open_store(RecallSettings(store=secret(url), **other), tmp_path / "recall", clock)

    yield make


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(START_S)


def secret(url: str | None) -> SecretStr | None:
    return None if url is None else SecretStr(url)


async def listed(store: AnswerStore, **how: Any) -> list[Entry]:
    return [entry async for entry in store.entries(**how)]


async def test_an_entry_comes_back_as_it_was(opened: Callable[..., AnswerStore], clock: VirtualClock) -> None:
    entry = make_entry(
        1,
        answer=bytes(range(256)) * 40,
        tags=frozenset({"faq", "ü:x y", "", "long" * 60}),
        partition=b"\xff" * 16,
        question="Warum? \U0001f600",
        context="user: hi",
        vector=bytes(1536),
    )
    one = opened(clock, memory_bytes=0)
    await one.start()
    one.put(entry)
    assert await one.get(entry.key) == entry  # at once
    assert await listed(one) == [replace(entry, answer=b"")]
    assert await one.get(entry.key) == entry  # now from behind
    assert await one.by_id(entry.id) == entry
    assert await one.get(entry.key[:16] + bytes(16)) is None  # its beginning alone opens nothing
    assert await one.by_id("0" * 32) is None
    assert await one.by_id("../../etc") is None
    await one.close()
    await one.close()
    again = opened(clock)
    await again.start()
    assert await again.get(entry.key) == entry
    await again.close()


async def test_what_is_over_is_not_given_and_leaves(
    opened: Callable[..., AnswerStore], clock: VirtualClock
) -> None:
    store = opened(clock)
    await store.start()
    store.put(make_entry(1, expires_at=START_S + 10))
    store.put(make_entry(2, expires_at=START_S + 20))
    clock.advance(10)
    assert await store.get(key_of(1)) is None
    assert await store.by_id(make_entry(1).id) is None
    assert [entry.key for entry in await listed(store)] == [key_of(2)]
    assert (store.stats().entries, store.stats().expired) == (1, 1)
    await store.close()


async def test_entries_come_latest_first_in_pieces(
    opened: Callable[..., AnswerStore], clock: VirtualClock
) -> None:
    store = opened(clock)
    await store.start()
    for number in range(1203):
        store.put(make_entry(number, partition=b"p" * 16 if number % 2 else b""))
    assert [entry.key for entry in await listed(store)] == [key_of(n) for n in reversed(range(1203))]
    odd = [key_of(n) for n in range(1201, 0, -2)]
    assert [entry.key for entry in await listed(store, partitioned=True)] == odd
    assert [entry.key for entry in await listed(store, partitioned=True, limit=7)] == odd[:7]
    there = await store.existing([key_of(5), key_of(1202), key_of(1203)])
    assert there == {key_of(5), key_of(1202)}
    await store.close()


async def test_evidence_is_kept_in_order_and_goes_with_its_writer(
    opened: Callable[..., AnswerStore], clock: VirtualClock
) -> None:
    store = opened(clock)
    await store.start()
    for number in range(40):
        store.learn(make_observation(number, clock, writer=f"k{number % 4}"))
        clock.advance(1)
    seen = await store.observations()
    assert [each.entry for each in seen] == [key_of(number) for number in range(40)]
    assert seen[3].likeness.conflict == "numbers"
    await store.remove(Selector(tag="anything"))
    await store.remove(Selector(writer="k1", before=START_S + 20))
    store.learn(make_observation(40, clock, writer="k2"))
    await store.remove(Selector(writer="k2"))  # also what waits
    left = [each.entry for each in await store.observations()]
    assert left == [key_of(n) for n in range(40) if n % 4 in (0, 3) or (n % 4 == 1 and n >= 20)]
    await store.close()


async def test_what_another_process_invalidated_is_not_given(
    opened: Callable[..., AnswerStore], clock: VirtualClock
) -> None:
    one, other = opened(clock), opened(clock)
    await one.start()
    await other.start()
    for number in range(4):
        one.put(make_entry(number, tags=frozenset({f"t{number}"})))
    await listed(one)
    for number in range(4):
        assert await other.get(key_of(number)) is not None  # and has it in memory
    removed = await one.remove(Selector(tag="t0"))
    assert [entry.key for entry in removed] == [key_of(0)]
    assert await one.get(key_of(0)) is None
    clock.advance(0.6)
    assert await other.get(key_of(0)) is None
    assert await other.get(key_of(1)) is not None
    # A new answer in the place of an old one is seen likewise.
    one.put(make_entry(1, clock.wall(), answer=b"new"))
    await listed(one)
    clock.advance(0.6)
    entry = await other.get(key_of(1))
    assert entry is not None and entry.answer == b"new"
    await one.close()
    await other.close()


async def test_what_was_made_before_an_invalidation_is_not_written_after_it(
    opened: Callable[..., AnswerStore], clock: VirtualClock
) -> None:
    one, other = opened(clock), opened(clock)
    await one.start()
    await other.start()
    other.put(make_entry(1, model="a"))
    other.put(make_entry(2, model="b"))
    await one.remove(Selector(model="a"))  # the other has written nothing yet
    assert [entry.key for entry in await listed(other)] == [key_of(2)]
    assert await other.get(key_of(1)) is None
    await one.close()
    await other.close()


async def test_a_process_that_is_far_behind_forgets_all(
    opened: Callable[..., AnswerStore], clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stockpot.recall.stores.sqlite_store._KEPT_INVALIDATIONS", 5)
    one, other = opened(clock), opened(clock)
    await one.start()
    await other.start()
    one.put(make_entry(1))
    await listed(one)
    assert await other.get(key_of(1)) is not None
    await one.remove(Selector(model="large"))
    for _ in range(20):
        await one.remove(Selector(tag="none has it"))
    clock.advance(1)
    assert await other.get(key_of(1)) is None
    await one.close()
    await other.close()


async def test_text_that_is_no_unicode_is_lost_alone(
    opened: Callable[..., AnswerStore], clock: VirtualClock
) -> None:
    store = opened(clock)
    await store.start()
    store.put(make_entry(1, question="\ud800"))
    store.put(make_entry(2))
    assert [entry.key for entry in await listed(store)] == [key_of(2)]
    assert store.stats().lost == 1
    assert await store.remove(Selector(tag="\ud800")) == ()
    await store.close()


async def test_what_is_larger_than_all_is_not_kept(
    opened: Callable[..., AnswerStore], clock: VirtualClock
) -> None:
    store = opened(clock, capacity_bytes=CAPACITY_BYTES)
    await store.start()
    store.put(make_entry(1, answer=bytes(CAPACITY_BYTES)))
    assert await store.get(key_of(1)) is None
    assert store.stats().lost == 1
    with pytest.raises(ValueError, match="selects nothing"):
        await store.remove(Selector())
    await store.close()


async def test_many_at_once_are_all_kept(opened: Callable[..., AnswerStore], clock: VirtualClock) -> None:
    store = opened(clock, memory_bytes=0)
    await store.start()

    async def put_and_get(number: int) -> bool:
        store.put(make_entry(number))
        found = await store.get(key_of(number))
        await asyncio.sleep(0)
        return found is not None and await store.get(key_of(number)) is not None

    assert all(await asyncio.gather(*(put_and_get(number) for number in range(2000))))
    assert len(await listed(store)) == 2000
    await store.close()


SELECTORS = st.one_of(
    st.builds(Selector, id=st.integers(0, 9).map(lambda number: make_entry(number).id)),
    st.builds(Selector, tag=st.sampled_from(["x", "y"]), model=st.none() | st.sampled_from(["a", "b"])),
    st.builds(Selector, tenant=st.sampled_from(["acme", "other"]), before=st.none() | st.just(START_S + 12)),
    st.builds(Selector, writer=st.sampled_from(["k1", "k2"])),
    st.builds(Selector, model=st.sampled_from(["a", "b"])),
    st.builds(Selector, before=st.just(START_S + 12)),
    st.just(Selector(everything=True)),
)


class Machine(RuleBasedStateMachine):
    """Two stores on one file or server. A second passes with each step, so that both know of all."""

    url: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = VirtualClock(START_S)
        self.held: dict[bytes, Entry] = {}  # least recently used first
        self.allowed: dict[bytes, Entry] = {}  # evicted, perhaps in memory still

    @initialize()
    def begin(self) -> None:
        self.stores = [self.opened(), self.opened()]

    def opened(self) -> AnswerStore:
        settings = RecallSettings(store=secret(self.url), capacity_bytes=CAPACITY_BYTES, memory_bytes=400_000)
        store = open_store(settings, Path(self.folder.name), self.clock)
        self.run(store.start())
        return store

    def run(self, work: Awaitable[T]) -> T:
        async def wait() -> T:
            return await work

        return self.runner.run(wait())

    @rule(
        which=st.integers(0, 1),
        number=st.integers(0, 9),
        size=st.sampled_from([0, 100, 100_000, 300_000]),
        ttl_s=st.sampled_from([4, 400]),
        tags=st.frozensets(st.sampled_from(["x", "y"])),
        tenant=st.sampled_from(["acme", "other"]),
        writer=st.sampled_from(["k1", "k2"]),
        model=st.sampled_from(["a", "b"]),
        partition=st.sampled_from([b"", b"p" * 16]),
    )
    def put(self, which: int, number: int, size: int, ttl_s: int, **facts: Any) -> None:
        now = self.clock.wall()
        entry = make_entry(number, now, answer=bytes(size), expires_at=now + ttl_s, **facts)
        self.stores[which].put(entry)
        self.held.pop(entry.key, None)
        self.allowed.pop(entry.key, None)
        self.held[entry.key] = entry
        while sum(each.size_bytes for each in self.held.values()) > CAPACITY_BYTES:
            oldest = next(iter(self.held))
            self.allowed[oldest] = self.held.pop(oldest)

    @rule(which=st.integers(0, 1), number=st.integers(0, 9))
    def get(self, which: int, number: int) -> None:
        key = key_of(number)
        found = self.run(self.stores[which].get(key))
        if key in self.held:
            assert found == self.held[key]
            self.held[key] = self.held.pop(key)
        else:
            assert found is None or found == self.allowed.get(key)

    @rule(which=st.integers(0, 1), number=st.integers(0, 9))
    def look(self, which: int, number: int) -> None:
        entry = make_entry(number)
        found = self.run(self.stores[which].by_id(entry.id))
        assert found == self.held.get(entry.key) or found == self.allowed.get(entry.key)

    @rule(which=st.integers(0, 1), selector=SELECTORS)
    def remove(self, which: int, selector: Selector) -> None:
        removed = {
            entry.key
            for entry in self.run(self.stores[which].remove(selector))
            if entry.expires_at > self.clock.wall()
        }
        fitting = {key for key, entry in self.held.items() if selector.fits(entry)}
        assert removed >= fitting
        assert removed <= fitting | {key for key, entry in self.allowed.items() if selector.fits(entry)}
        for key in fitting:
            del self.held[key]
        self.allowed = {key: entry for key, entry in self.allowed.items() if not selector.fits(entry)}

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.run(self.stores[which].close())
        self.stores[which] = self.opened()

    @precondition(lambda self: hasattr(self, "stores"))
    @invariant()
    def both_hold_the_same(self) -> None:
        for store in self.stores:
            self.run(listed(store))  # writes what waits
        listing = self.run(listed(self.stores[0]))
        assert {entry.key for entry in listing} == set(self.held)
        stats = self.stores[0].stats()
        assert (stats.entries, stats.lost, stats.failures) == (len(self.held), 0, 0)
        assert stats.size_bytes == sum(entry.size_bytes for entry in self.held.values()) <= CAPACITY_BYTES
        self.clock.advance(1)
        now = self.clock.wall()
        self.held = {key: entry for key, entry in self.held.items() if entry.expires_at > now}
        self.allowed = {key: entry for key, entry in self.allowed.items() if entry.expires_at > now}

    def teardown(self) -> None:
        for store in getattr(self, "stores", ()):
            self.run(store.close())
        self.runner.close()
        self.folder.cleanup()


def test_two_processes_on_one_file_hold_what_a_dictionary_would() -> None:
    run_machine(None)


def test_two_nodes_on_one_redis_hold_what_a_dictionary_would(redis: RedisServer) -> None:
    run_machine(redis)


def run_machine(redis: RedisServer | None) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    class OnIt(Machine):
        url = None if redis is None else redis.url

        def __init__(self) -> None:
            super().__init__()
            if redis is not None:
                redis.ask(b"FLUSHALL")

    run_state_machine_as_test(OnIt, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))

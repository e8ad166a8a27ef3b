"""The whole cache under the engine: RAM far too small, disk and Redis behind it, and tiers that misbehave.

Whatever happens, every answer is that of a lone request without any cache, and nobody starves.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.engine_harness import (
    BLOCK_TOKENS,
    PATIENCE_S,
    JumpingClock,
    Node,
    alone,
    disk_tier,
    fake_driver,
    key_of,
    random_tokens,
    sealer_for,
)
from tests.kv.lying_tier import LyingTier
from tests.redis_server import RedisServer

from stockpot.clock import SystemClock
from stockpot.kv.block import TOKEN_BYTES, content_hash
from stockpot.kv.cache import CacheLimits
from stockpot.kv.invalidation import EPOCH_STEP, Invalidation
from stockpot.kv.operator_pins import OperatorPins
from stockpot.kv.promises import Labels, Promise
from stockpot.kv.redis_connection import RedisOptions
from stockpot.kv.redis_tier import RedisTier
from stockpot.kv.tier import Tier

ONE_BLOCK_BYTES = 16 + 12 * BLOCK_TOKENS

EVENTS = st.lists(
    st.tuples(
        st.integers(0, 1),  # which shared beginning
        st.integers(1, 120),  # how much of it
        st.lists(st.integers(33, 126), max_size=12),  # own tokens behind it
        st.integers(1, 20),  # max_tokens
        st.integers(0, 5),  # steps before the next arrives
        st.sampled_from(
            ["", "", "written", "cancel", "empty RAM", "shrink", "invalidate", "all", "promise", "preempt"]
        ),
    ),
    min_size=3,
    max_size=12,
)


def invalidation(epoch: int, prompt: list[int], *, everything: bool) -> Invalidation:
    if everything:
        return Invalidation(epoch, "all")
    key = key_of(prompt[: max(1, len(prompt) // 2)])
    return Invalidation(epoch, "prefix", content_hash(key).hex(), tokens=len(key) // TOKEN_BYTES)


def play(
    tiers: list[Tier],
    events: list[tuple[int, int, list[int], int, int, str]],
    *,
    ram_blocks: int,
    slots: int = 5,
    cells: int = 512,
) -> None:
    """Run a schedule on one node, check every answer and that nothing is left behind."""
    clock = JumpingClock()
    node = Node(
        tiers,
        driver=fake_driver(cells=cells, max_sequences=slots),
        clock=clock,
        limits=CacheLimits(ram_bytes=ram_blocks * ONE_BLOCK_BYTES),
    )
    beginnings = [random_tokens(n, 120) for n in range(2)]
    kept: dict[str, tuple[list[int], int]] = {}
    try:
        for n, beginning in enumerate(beginnings):  # something to find
            node.ask(f"first {n}", beginning)
        node.empty_ram()
        for index, (which, length, own, max_tokens, steps, what) in enumerate(events):
            prompt = beginnings[which][:length] + own
            promises = (Promise(length, 300),) if what == "promise" else ()
            name = f"{index}"
            task = node.submit(name, prompt, max_tokens, labels=Labels(promises=promises))
            kept[name] = prompt, max_tokens
            for _ in range(steps):
                node.core.step()
            if what == "cancel":
                node.core.end(task, "cancelled")
                del kept[name]
            elif what == "empty RAM":
                node.empty_ram()
            elif what == "written":
                node.cache.flush(PATIENCE_S)
            elif what == "shrink":
                node.cache.store.resize(ram_blocks * ONE_BLOCK_BYTES // 2)
            elif what == "preempt":
                node.core.preempt_one()
            elif what in ("invalidate", "all"):
                record = invalidation((index + 1) * EPOCH_STEP, prompt, everything=what == "all")
                node.cache.invalidations.add(record)
                node.core.invalidate([record])
                node.cache.drop_behind([record])
            node.core.check_integrity()
        node.run()
        node.core.check_integrity()
        assert node.driver.used_cells() == 0
        stats = node.core.stats()
        assert (stats.running, stats.waiting, stats.ram_pinned_blocks) == (0, 0, 0)
        assert stats.ram_used_bytes <= ram_blocks * ONE_BLOCK_BYTES
        for name, (prompt, max_tokens) in kept.items():
            assert node.answer(name) == alone(prompt, max_tokens)
            assert node.completed(name).usage.cached_total <= len(prompt) - 1
    finally:
        node.close()


@settings(max_examples=60)
@given(
    events=EVENTS,
    ram_blocks=st.sampled_from([0, 3, 12, 200]),
    slots=st.sampled_from([1, 2, 8]),
    disk_bytes=st.sampled_from([0, 4_000, 40_000]),
)
def test_any_schedule_over_disk_and_redis_gives_the_answers_of_lone_requests(
    shared_redis: RedisServer,
    events: list[tuple[int, int, list[int], int, int, str]],
    ram_blocks: int,
    slots: int,
    disk_bytes: int,
) -> None:
    driver = fake_driver()
    shared_redis.ask(b"FLUSHALL")
    with tempfile.TemporaryDirectory() as folder:
        disk = disk_tier(Path(folder), driver, capacity_bytes=disk_bytes)
        redis = redis_tier(shared_redis)
        play([disk, redis], events, ram_blocks=ram_blocks, slots=slots)
        disk.check_integrity()


@settings(max_examples=150)
@given(
    events=EVENTS,
    ram_blocks=st.sampled_from([0, 3, 12, 200]),
    seed=st.integers(0, 2**16),
    slots=st.sampled_from([1, 2, 8]),
)
def test_no_lie_of_a_tier_changes_an_answer(
    events: list[tuple[int, int, list[int], int, int, str]], ram_blocks: int, seed: int, slots: int
) -> None:
    tiers: list[Tier] = [LyingTier(seed), LyingTier(seed + 1, honesty=0.8)]
    play(tiers, events, ram_blocks=ram_blocks, slots=slots)


def redis_tier(server: RedisServer) -> RedisTier:
    return RedisTier(
        RedisOptions(server.url),
        sealer=sealer_for(fake_driver()),
        clock=SystemClock(),
        node="node",
        ttl_s=600,
        timeout_s=10,
        connect_timeout_s=10,
    )


TENANTS = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bob", ""]),
        st.integers(0, 70),  # how much of one beginning that all of them know
        st.lists(st.integers(33, 36), max_size=12),
        st.sampled_from([0, 0, 5, 16, 24, 60]),  # how much of it is declared shared
        st.integers(0, 4),  # steps before the next arrives
        st.sampled_from(["", "", "empty RAM", "written"]),
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=80)
@given(events=TENANTS, ram_blocks=st.sampled_from([4, 30, 300]))
def test_no_tenant_gets_what_another_did_not_share(
    events: list[tuple[str, int, list[int], int, int, str]], ram_blocks: int
) -> None:
    """In cells, by joining, from RAM and from behind it: at most what both had declared shared."""
    with tempfile.TemporaryDirectory() as folder:
        driver = fake_driver()
        limits = CacheLimits(ram_bytes=ram_blocks * ONE_BLOCK_BYTES)
        redis = LyingTier(0, honesty=1.0)
        node = Node([disk_tier(Path(folder), driver), redis], driver=driver, limits=limits)
        asked: list[tuple[str, str, list[int], int]] = []
        for index, (tenant, length, own, shared, steps, what) in enumerate(events):
            prompt = [*random_tokens(0, 70)[:length], 50, *own]
            declared = min(shared, len(prompt)) if tenant else 0
            node.submit(f"{index}", prompt, 2, labels=Labels(tenant=tenant, shared_tokens=declared))
            asked.append((f"{index}", tenant, prompt, declared))
            for _ in range(steps):
                node.core.step()
            if what == "written":
                node.cache.flush(PATIENCE_S)
            elif what == "empty RAM":
                node.empty_ram()
            node.core.check_integrity()
        node.run()
        for name, tenant, prompt, declared in asked:
            # Nobody's prompts (without a tenant) stand with what is shared.
            most = 0
            for other, others_tenant, others, others_declared in asked:
                if other == name:
                    continue
                equal = next((n for n, (a, b) in enumerate(zip(prompt, others, strict=False)) if a != b), -1)
                common = min(len(prompt), len(others)) if equal < 0 else equal
                if tenant != others_tenant:
                    common = min(
                        common,
                        declared if tenant else common,
                        others_declared if others_tenant else common,
                    )
                # An answer may go on as the other's prompt does.
                most = max(most, common + 2 if common == len(others) else common)
            assert node.answer(name) == alone(prompt, 2)
            assert sum(node.cached(name).values()) <= most
        node.close()


def test_a_wall_clock_that_jumps_breaks_nothing(tmp_path: Path) -> None:
    clock = JumpingClock()
    driver = fake_driver()
    node = Node(
        [disk_tier(tmp_path, driver)],
        driver=driver,
        clock=clock,
        limits=CacheLimits(ram_bytes=40 * ONE_BLOCK_BYTES),
    )
    for n, jump_s in enumerate((0, 7200, -7200, -86_400 * 365, 86_400 * 3650, 0, -1)):
        clock.wall_s += jump_s
        prompt = random_tokens(n % 3, 80)
        labels = Labels(promises=(Promise(64, 300),))
        assert node.ask(f"{n}", prompt, labels=labels) == alone(prompt)
        assert node.ask(f"{n} again", prompt) == alone(prompt)
        assert sum(node.cached(f"{n} again").values()) >= 72
        node.core.check_integrity()
    node.close()


def test_a_promise_of_a_clock_that_was_wrong_does_not_fill_ram_for_hours() -> None:
    clock = JumpingClock()
    node = Node(clock=clock, limits=CacheLimits(ram_bytes=22 * ONE_BLOCK_BYTES))
    clock.wall_s += 86_400
    node.ask("promised", random_tokens(1, 80), labels=Labels(promises=(Promise(80, 300),)))
    clock.wall_s -= 86_400
    for n in range(5):
        node.ask(f"{n}", random_tokens(10 + n, 150))
    node.ask("again", random_tokens(1, 80))
    assert node.cached("again") == {}
    node.close()


def test_promises_hold_against_eviction_are_renewed_by_use_and_end() -> None:
    clock = JumpingClock()
    node = Node(clock=clock, limits=CacheLimits(ram_bytes=40 * ONE_BLOCK_BYTES))
    promised = random_tokens(1, 65)
    labels = Labels(promises=(Promise(64, 300),))

    def crowd(first: int) -> None:
        for n in range(first, first + 4):
            node.ask(f"{n}", random_tokens(n, 150))

    node.ask("first", promised, labels=labels)
    crowd(10)
    clock.wall_s += 200
    node.ask("used", promised, labels=labels)
    assert node.cached("used") == {"ram": 64}
    clock.wall_s += 200  # the first promise is over, the renewed one is not
    crowd(20)
    node.submit("still", promised)
    node.run()
    assert node.cached("still") == {"ram": 64}
    clock.wall_s += 301
    crowd(30)
    node.ask("over", promised)
    assert node.cached("over") == {}
    node.close()


def test_promises_survive_a_restart_on_disk(tmp_path: Path) -> None:
    now_s = SystemClock().wall()
    driver = fake_driver()
    first = Node([disk_tier(tmp_path, driver)], driver=driver, clock=JumpingClock(now_s))
    promised = random_tokens(1, 65)
    first.ask("first", promised, labels=Labels(promises=(Promise(64, 3600),)))
    first.close()
    # A small disk now, and many prompts that are used later than the promised one.
    second = Node([disk_tier(tmp_path, driver, capacity_bytes=30_000)], clock=JumpingClock(now_s))
    for n in range(8):
        second.ask(f"{n}", random_tokens(10 + n, 100))
    second.empty_ram()
    second.ask("again", promised)
    assert second.cached("again") == {"disk": 64}
    second.close()


def test_operator_pins_hold_until_they_expire() -> None:
    clock = JumpingClock()
    node = Node(clock=clock, limits=CacheLimits(ram_bytes=40 * ONE_BLOCK_BYTES))
    store, pins = node.cache.store, OperatorPins()
    prompt = random_tokens(1, 65)
    node.ask("first", prompt)
    match = store.match(store.scope(""), key_of(prompt[:64]))
    pins.add(store, match, owner="ann", expires_s=clock.wall() + 60)

    def crowd(first: int) -> None:
        for n in range(first, first + 4):
            node.ask(f"{n}", random_tokens(n, 150))

    crowd(10)
    store.clear()
    node.submit("held", prompt)
    node.run()
    assert node.cached("held")["ram"] == 64
    clock.wall_s += 61
    pins.expire(store, clock.wall())
    assert pins.listed(store) == []
    assert node.core.stats().ram_pinned_blocks == 0
    crowd(20)
    node.ask("over", prompt)
    assert node.cached("over") == {}
    node.close()


def test_a_quota_holds_for_its_tenant_and_leaves_others_alone() -> None:
    node = Node(limits=CacheLimits(ram_bytes=2**16, quotas={"poor": 12 * ONE_BLOCK_BYTES}))
    node.ask("rich", random_tokens(1, 80), labels=Labels(tenant="rich"))
    for n in range(6):
        prompt = random_tokens(10 + n, 150)
        assert node.ask(f"{n}", prompt, labels=Labels(tenant="poor")) == alone(prompt)
        assert node.core.stats().tenant_bytes.get("poor", 0) <= 12 * ONE_BLOCK_BYTES
        node.core.check_integrity()
    node.ask("rich again", random_tokens(1, 80), labels=Labels(tenant="rich"))
    assert node.cached("rich again") == {"ram": 79}
    node.close()


def test_a_node_with_other_block_sizes_shares_the_disk(tmp_path: Path) -> None:
    """Blocks have no size of their own in the hash: what another size left serves as far as it fits."""
    driver = fake_driver()
    first = Node([disk_tier(tmp_path, driver)], driver=driver)
    prompt = random_tokens(1, 100)
    first.ask("first", prompt)
    first.close()
    for block_tokens in (32, 8):
        driver = fake_driver()
        node = Node([disk_tier(tmp_path, driver)], driver=driver, block_tokens=block_tokens)
        for n in range(3):
            mine = [*prompt[: 20 + 30 * n], *random_tokens(50 + n, 40)]
            for turn in range(2):
                assert node.ask(f"{n} {turn}", mine) == alone(mine)
                node.core.check_integrity()
                node.empty_ram()
        assert node.ask("whole", prompt) == alone(prompt)
        node.core.check_integrity()
        node.close()

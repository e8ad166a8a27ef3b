"""The two stores: each keeps every limit in every window, and both say the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.redis_server import RedisServer

from stockpot.allowances.memory import MemoryStore
from stockpot.allowances.periods import day_left_s, day_of, month_left_s, month_of
from stockpot.allowances.redis_store import RedisStore
from stockpot.allowances.store import AllowanceStore, Granted, Limit, Order, Refused, Report, Scope
from stockpot.caller import Limits
from stockpot.clock import VirtualClock
from stockpot.settings_gateway import AllowanceSettings

NEW_YEARS_EVE_S = 1_798_761_300.0  # 2026-12-31, 23:55 UTC: a day, a month and a year end soon


@dataclass(frozen=True)
class Step:
    """Time passes, then a request comes or one ends."""

    wait_s: float
    tokens: int
    nanousd: int
    settles: int | None  # which of those that run, None: a request comes
    used: float = 1.0


@dataclass
class Run:
    """What a store answered, and what was granted when."""

    answers: list[object] = field(default_factory=list[object])
    granted: list[tuple[float, Order]] = field(default_factory=list[tuple[float, Order]])
    used: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])


STEPS = st.lists(
    st.builds(
        Step,
        wait_s=st.sampled_from([0.0, 0.0, 0.001, 0.25, 1.0, 7.5, 59.0, 61.0, 200.0]),
        tokens=st.integers(0, 40),
        nanousd=st.integers(0, 40),
        settles=st.none() | st.integers(0, 5),
        used=st.sampled_from([0.0, 0.5, 1.0]),
    ),
    max_size=40,
)
AMOUNT = st.none() | st.integers(0, 120)
LIMITS = st.tuples(AMOUNT, AMOUNT, st.none() | st.integers(0, 5), AMOUNT, AMOUNT, AMOUNT, AMOUNT)


async def play(
    store: AllowanceStore, clock: VirtualClock, scopes: tuple[Scope, ...], steps: Sequence[Step]
) -> Run:
    run = Run()
    running: list[Order] = []
    for number, step in enumerate(steps):
        clock.advance(step.wait_s)
        if step.settles is None:
            order = Order(f"r{number}", scopes, step.tokens, step.nanousd)
            answer = await store.reserve(order)
            if isinstance(answer, Granted):
                run.granted.append((clock.wall(), order))
                run.used[order.id] = (order.tokens, order.nanousd)
                running.append(order)
                left = answer.left
                run.answers.append(None if left is None else round(left, 9))
            else:
                wait_s = answer.retry_after_s and round(answer.retry_after_s, 2)
                run.answers.append((answer.scope.kind, answer.limit, answer.used, wait_s))
        elif running:
            order = running.pop(step.settles % len(running))
            used = (int(order.tokens * step.used), int(order.nanousd * step.used))
            run.used[order.id] = used
            for _ in range(2):  # once is as good as twice
                future = store.settle(order, *used)
                if future is not None:
                    await future
    return run


def check(run: Run, scopes: tuple[Scope, ...]) -> None:
    """Of what was granted, nothing exceeds a limit in any minute, day or month."""
    for scope in scopes:
        requests, tokens = scope.limits[Limit.REQUESTS_PER_MINUTE], scope.limits[Limit.TOKENS_PER_MINUTE]
        for begin_s, _ in run.granted:
            window = [order for at_s, order in run.granted if begin_s <= at_s <= begin_s + 60]
            assert requests is None or len(window) <= requests
            assert tokens is None or sum(run.used[order.id][0] for order in window) <= tokens
        for limit, period, kind in (
            (Limit.TOKENS_PER_DAY, day_of, 0),
            (Limit.TOKENS_PER_MONTH, month_of, 0),
            (Limit.USD_PER_DAY, day_of, 1),
            (Limit.USD_PER_MONTH, month_of, 1),
        ):
            most = scope.limits[limit]
            sums: dict[int, int] = {}
            for at_s, order in run.granted:
                sums[period(at_s)] = sums.get(period(at_s), 0) + run.used[order.id][kind]
            assert most is None or all(total <= most for total in sums.values())


@given(key=LIMITS, team=LIMITS, steps=STEPS)
@settings(max_examples=200)
def test_no_window_and_no_period_is_overspent(
    key: tuple[int | None, ...], team: tuple[int | None, ...], steps: list[Step]
) -> None:
    scopes = (Scope("key", "k", "k", key), Scope("team", "t", "t", team))
    clock = VirtualClock(NEW_YEARS_EVE_S)
    check(asyncio.run(play(MemoryStore(clock), clock, scopes, steps)), scopes)


def test_redis_says_what_memory_says(redis: RedisServer) -> None:
    settings_of_redis = AllowanceSettings(redis_url=redis.url, timeout_s=20, lease_s=100_000)

    @given(key=LIMITS, team=LIMITS, steps=STEPS)
    @settings(max_examples=60)
    def compare(key: tuple[int | None, ...], team: tuple[int | None, ...], steps: list[Step]) -> None:
        redis.ask(b"FLUSHDB")
        scopes = (Scope("key", "k", "k", key), Scope("team", "t", "t", team))

        async def both() -> tuple[Run, Run]:
            clock = VirtualClock(NEW_YEARS_EVE_S)
            first = await play(MemoryStore(clock), clock, scopes, steps)
            clock = VirtualClock(NEW_YEARS_EVE_S)
            store = RedisStore(settings_of_redis, clock=clock)
            try:
                return first, await play(store, clock, scopes, steps)
            finally:
                await store.close()

        in_memory, in_redis = asyncio.run(both())
        assert in_redis.answers == in_memory.answers
        check(in_redis, scopes)

    compare()


def scope_of(**limits: float) -> Scope:
    return Scope.of("key", "k", "ci", Limits(**limits))  # pyright: ignore[reportArgumentType]


async def test_a_lease_that_ended_is_given_back_and_a_late_settlement_counts_once(redis: RedisServer) -> None:
    clock = VirtualClock(NEW_YEARS_EVE_S)
    store = RedisStore(AllowanceSettings(redis_url=redis.url, timeout_s=20, lease_s=10), clock=clock)
    scopes = (scope_of(tokens_per_day=100, tokens_per_minute=100, concurrency=1),)
    late, renewed = Order("late", scopes, 80, 0), Order("renewed", scopes, 100, 0)
    assert isinstance(await store.reserve(late), Granted)
    clock.advance(9)
    await store.renew([late])
    clock.advance(9)
    assert isinstance(await store.reserve(renewed), Refused)
    clock.advance(1)  # ten seconds since it was renewed
    assert isinstance(await store.reserve(renewed), Granted)
    await store.renew([late])  # too late
    for _ in range(2):
        settled = store.settle(late, 30, 0)
        assert settled is not None
        await settled
    settled = store.settle(renewed, 20, 0)
    assert settled is not None
    await settled
    refused = await store.reserve(Order("next", scopes, 51, 0))
    assert isinstance(refused, Refused)
    assert (refused.limit, refused.used) == (Limit.TOKENS_PER_MINUTE, 50)
    assert isinstance(await store.reserve(Order("fits", scopes, 50, 0)), Granted)
    await store.close()


async def test_a_report_is_heard_once(redis: RedisServer) -> None:
    clock = VirtualClock(NEW_YEARS_EVE_S)
    store = RedisStore(AllowanceSettings(redis_url=redis.url, timeout_s=20), clock=clock)
    scope = scope_of(tokens_per_month=100, usd_per_day=1e-7)
    for _ in range(2):
        await store.report(Report("x", scope, clock.wall(), 60, 60))
    refused = await store.reserve(Order("a", (scope,), 41, 0))
    assert isinstance(refused, Refused)
    assert (refused.limit, refused.used) == (Limit.TOKENS_PER_MONTH, 60)
    refused = await store.reserve(Order("b", (scope,), 40, 41))
    assert isinstance(refused, Refused)
    assert (refused.limit, refused.used, refused.retry_after_s) == (Limit.USD_PER_DAY, 60, 300.0)
    await store.close()


@pytest.mark.parametrize("store_kind", ["memory", "redis"])
async def test_a_minute_is_a_minute_wherever_it_begins(redis: RedisServer, store_kind: str) -> None:
    clock = VirtualClock(NEW_YEARS_EVE_S + 0.9)
    store = (
        MemoryStore(clock)
        if store_kind == "memory"
        else RedisStore(AllowanceSettings(redis_url=redis.url, timeout_s=20), clock=clock)
    )
    scopes = (scope_of(requests_per_minute=3),)
    for number in range(3):
        assert isinstance(await store.reserve(Order(f"{number}", scopes, 0, 0)), Granted)
    clock.advance(59.5)
    refused = await store.reserve(Order("early", scopes, 0, 0))
    assert isinstance(refused, Refused)
    assert refused.retry_after_s == pytest.approx(0.6)
    clock.advance(0.6)
    assert isinstance(await store.reserve(Order("then", scopes, 0, 0)), Granted)
    await store.close()


def test_periods() -> None:
    assert day_left_s(NEW_YEARS_EVE_S) == month_left_s(NEW_YEARS_EVE_S) == 300
    assert month_of(NEW_YEARS_EVE_S + 300) == month_of(NEW_YEARS_EVE_S) + 1 == 2027 * 12
    february_s = 1_835_352_000.0  # 2028-02-28, 12:00 UTC, of a leap year
    assert month_left_s(february_s) == 1.5 * 86_400

"""Breaker, limit, budget and ejection keep their promises whatever happens."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.gateway.scripted import (
    Rig,
    Script,
    ScriptedBackend,
    chat,
    eventually,
    failing,
    failure,
    member,
)

from stockpot.clock import VirtualClock
from stockpot.errors import FailureCause, QueueFull, UpstreamError
from stockpot.events import Event, Queued
from stockpot.gateway.breaker import Breaker
from stockpot.gateway.concurrency import FLOOR, AdaptiveLimit, Drift
from stockpot.gateway.condition import Condition, Permit
from stockpot.gateway.ejection import Standing
from stockpot.gateway.retry import RetryBudget
from stockpot.gateway.waiting import WaitingLine
from stockpot.requests import Priority
from stockpot.settings_gateway import ResilienceSettings

FAULTS: list[FailureCause | None] = [
    None,
    "connect",
    "overloaded",
    "cancelled",
    "invalid_request",
    "deadline",
]


def unheard(condition: Condition, model: str) -> None:
    """For permits whose end nobody waits for."""


class ConditionMachine(RuleBasedStateMachine):
    """Permits are taken where they may be, and closed in any order, some twice."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        settings = ResilienceSettings(breaker_failures=3, breaker_open_s=5.0)
        self.condition = Condition(member("a", ScriptedBackend(), max_concurrency=9), settings, self.clock)
        self.permits: list[Permit] = []
        self.closed: list[Permit] = []
        self.told = 0

    def _closed(self, condition: Condition, model: str) -> None:
        self.told += 1

    @precondition(lambda self: self.condition.obstacle("m") is None and self.condition.has_room())
    @rule()
    def take(self) -> None:
        self.permits.append(self.condition.take("m", self._closed))

    @precondition(lambda self: self.permits)
    @rule(which=st.integers(0, 100), cause=st.sampled_from(FAULTS), answered=st.booleans())
    def close(self, which: int, cause: FailureCause | None, answered: bool) -> None:
        permit = self.permits.pop(which % len(self.permits))
        if answered:
            permit.answers()
        permit.close(cause)
        self.closed.append(permit)

    @precondition(lambda self: self.closed)
    @rule()
    def close_again(self) -> None:
        self.closed[-1].close("connect")

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def counts_agree(self) -> None:
        assert self.condition.in_flight == len(self.permits)
        assert self.told == len(self.closed)
        assert sum(permit.probe for permit in self.permits) <= 1
        assert self.condition.limit is not None
        assert FLOOR <= self.condition.limit.value <= 9

    @invariant()
    def it_never_stays_shut(self) -> None:
        # Without a probe under way, time alone lets the next one in.
        if not any(permit.probe for permit in self.permits):
            assert self.condition.breaker.opens_in_s <= 50
            assert self.condition.breaker.allows() or self.condition.breaker.opens_in_s > 0


TestConditionMachine = ConditionMachine.TestCase


def test_a_breaker_opens_on_failures_in_a_row_only() -> None:
    breaker = Breaker(VirtualClock(), failures=2, open_s=1.0)
    for _ in range(5):
        breaker.failed(probe=breaker.begin())
        breaker.succeeded(probe=breaker.begin())
    assert breaker.state == "closed"
    breaker.failed(probe=False)
    breaker.failed(probe=False)
    assert breaker.state == "open" and not breaker.allows()


def test_a_probe_that_was_given_up_lets_the_next_one_in() -> None:
    clock = VirtualClock()
    breaker = Breaker(clock, failures=1, open_s=1.0)
    breaker.failed(probe=breaker.begin())
    clock.advance(1)
    probe = breaker.begin()
    assert probe and breaker.state == "half-open" and not breaker.allows()
    breaker.abandoned(probe=probe)
    assert breaker.allows()
    breaker.failed(probe=breaker.begin())
    assert breaker.state == "open" and breaker.opens_in_s > 1


@given(st.floats(0.01, 1), st.lists(st.one_of(st.none(), st.booleans(), st.floats(0, 5)), max_size=300))
def test_retries_stay_within_their_budget(ratio: float, steps: list[bool | float | None]) -> None:
    clock = VirtualClock()
    budget = RetryBudget(clock, ratio)
    requests = retries = 0
    for step in steps:
        if step is None:
            budget.deposit()
            requests += 1
        elif isinstance(step, bool):
            retries += budget.withdraw()
        else:
            clock.advance(step)
    assert retries <= 10 + ratio * requests + clock.monotonic() + 1e-6


def test_no_budget_no_retry_and_a_reserve_fills_by_itself() -> None:
    clock = VirtualClock()
    assert not RetryBudget(clock, 0.0).withdraw()
    budget = RetryBudget(clock, 0.2)
    while budget.withdraw():
        pass
    clock.advance(1)
    assert budget.withdraw() and not budget.withdraw()


@given(st.integers(1, 300), st.lists(st.tuples(st.booleans(), st.floats(0, 100), st.integers(0, 300))))
def test_the_limit_stays_within_its_bounds(maximum: int, answers: list[tuple[bool, float, int]]) -> None:
    clock = VirtualClock()
    limit, drift = AdaptiveLimit(clock, maximum), Drift()
    for overloaded, seconds, in_flight in answers:
        clock.advance(0.5)
        if overloaded:
            limit.overloaded()
        else:
            drift.add(seconds)
            limit.answered(drift, in_flight)
        assert min(FLOOR, maximum) <= limit.value <= maximum


def test_the_limit_falls_under_overload_and_grows_again_when_it_is_used() -> None:
    clock = VirtualClock()
    limit, drift = AdaptiveLimit(clock, 100), Drift()
    for _ in range(30):
        limit.overloaded()
    assert limit.value == 70
    for _ in range(20):
        clock.advance(1)
        limit.overloaded()
    assert limit.value == FLOOR
    for _ in range(2000):
        drift.add(0.1)
        limit.answered(drift, 0)
    assert limit.value == FLOOR
    for _ in range(2000):
        limit.answered(drift, limit.value)
    assert limit.value == 100


def test_the_limit_falls_when_answers_come_much_later_than_they_use_to() -> None:
    clock = VirtualClock()
    limit, drift = AdaptiveLimit(clock, 100), Drift()
    for _ in range(200):
        drift.add(0.5)
        limit.answered(drift, 100)
    assert limit.value == 100
    for _ in range(50):
        clock.advance(1)
        drift.add(10.0)
        limit.answered(drift, 100)
    assert limit.value < 50


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_at_most_half_are_ejected_and_never_the_last(shares: list[float]) -> None:
    peers = [Standing() for _ in shares]
    for round_ in range(40):
        for peer, share in zip(peers, shares, strict=True):
            if peer.is_out(round_):
                continue
            peer.failures.add(share)
            peer.first_s.add(share * 10)
            peer.judge(peers, ratio=2.0, now_s=round_, out_s=15.0)
            out = sum(each.is_out(round_) for each in peers)
            assert out <= len(peers) // 2 and out < len(peers)


def test_one_that_fails_beside_sound_ones_is_ejected() -> None:
    bad, *good = peers = [Standing() for _ in range(3)]
    for _ in range(10):
        bad.failures.add(1.0)
        for peer in good:
            peer.failures.add(0.0)
    assert bad.judge(peers, ratio=3.0, now_s=0.0, out_s=30.0)
    assert bad.is_out(29.9) and not bad.is_out(30.0)


@pytest.mark.anyio
async def test_a_request_that_no_backend_survives_counts_once_for_the_breaker() -> None:
    backend = ScriptedBackend(*[failing("server_error")] * 6)
    rig = Rig(backend, retries=2, breaker_failures=3)
    for _ in range(2):
        with pytest.raises(UpstreamError):
            await rig.ask()
    assert len(backend.requests) == 6 and rig.executor.condition("a").breaker == "closed"
    assert (await rig.ask())[0] == "Hello there"


@pytest.mark.anyio
async def test_that_there_is_no_connection_counts_each_time() -> None:
    backend = ScriptedBackend(*[failing("connect")] * 3)
    rig = Rig(backend, retries=2, breaker_failures=3)
    with pytest.raises(UpstreamError):
        await rig.ask()
    assert rig.executor.condition("a").breaker == "open"


def test_a_probe_that_fails_opens_the_breaker_again_though_its_request_was_counted() -> None:
    clock = VirtualClock()
    settings = ResilienceSettings(breaker_failures=1, breaker_open_s=5.0)
    condition = Condition(member("a", ScriptedBackend()), settings, clock)
    blamed: set[str] = set()
    for _ in range(2):
        condition.take("m", unheard, blamed).close("server_error")
        assert condition.breaker.state == "open" and blamed == {"a"}
        clock.advance(condition.breaker.opens_in_s)


@pytest.mark.anyio
async def test_a_rest_of_a_day_is_one_of_a_minute_and_then_one_request_looks() -> None:
    clock, gate = VirtualClock(), asyncio.Event()
    day_s = 86_400.0
    backend = ScriptedBackend(
        failing("rate_limited", retry_after_s=day_s),
        failing("rate_limited", retry_after_s=day_s),
        Script(gate=gate),
    )
    rig = Rig(backend, clock=clock)

    async def refused() -> float:
        with pytest.raises(UpstreamError) as caught:
            await rig.ask()
        assert caught.value.cause == "rate_limited"
        return caught.value.retry_after_s or 0.0

    # Who asked is told what the backend said; the others, when they may ask again.
    assert await refused() == day_s
    assert await refused() == 60
    clock.advance(60)
    assert await refused() == day_s
    assert await refused() == 60
    clock.advance(60)
    task = asyncio.create_task(rig.ask())
    await eventually(lambda: backend.running)
    assert await refused() == 1 and len(backend.requests) == 3
    # Its leaving tells nothing; the next one looks.
    task.cancel()
    await asyncio.wait((task,))
    both = await asyncio.gather(rig.ask(), rig.ask(), return_exceptions=True)
    assert sum(isinstance(each, UpstreamError) for each in both) == 1
    await asyncio.gather(rig.ask(), rig.ask())


def test_after_a_short_rest_all_may_ask() -> None:
    clock = VirtualClock()
    condition = Condition(member("a", ScriptedBackend()), ResilienceSettings(), clock)
    permit = condition.take("m", unheard)
    condition.rest("m", 3.0, failure("rate_limited").cause)
    permit.close("rate_limited")
    assert condition.obstacle("m") is not None
    clock.advance(3)
    condition.take("m", unheard)
    assert condition.obstacle("m") is None


@pytest.mark.anyio
@pytest.mark.parametrize("before", ["normal", "low"])
async def test_a_burst_does_not_make_the_line_longer_than_its_limit(before: Priority) -> None:
    line = WaitingLine(VirtualClock(), 4)
    waiters = [line.enter("m", before) for _ in range(2)]
    refused = 0
    # Nothing that was put out gets to run in between.
    for _ in range(500):
        try:
            waiters.append(line.enter("m", "high"))
        except QueueFull:
            refused += 1
        assert len(line) <= 4
    assert len(line) == sum(line.lengths().values()) == 4 and refused == 496
    assert line.lengths()["high"] == 4
    for waiter in waiters[:2]:
        with pytest.raises(QueueFull):
            await waiter.turn(0.0)
    assert line.is_first(waiters[2]) and not line.is_first(waiters[0])
    for waiter in waiters:
        waiter.leave()
    assert len(line) == 0 and not line.waited_for()


@pytest.mark.anyio
async def test_who_is_refused_soon_has_been_told_nothing_before() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate))
    rig = Rig(backend, max_concurrency=1, queue_limit=2, queue_timeout_s=20.0)
    running = asyncio.create_task(rig.ask())
    await eventually(lambda: backend.running)
    events: list[Event] = []
    low = asyncio.create_task(rig.ask(chat(priority="low"), events=events))
    await eventually(lambda: rig.executor.waiting()["low"])
    others = [asyncio.create_task(rig.ask()) for _ in range(2)]
    with pytest.raises(QueueFull):
        await low
    assert not events
    # Who waits for longer is told so, and goes on.
    patient: list[Event] = []
    others[1].cancel()
    await asyncio.wait(others[1:])
    others[1] = asyncio.create_task(rig.ask(events=patient))
    await eventually(lambda: patient)
    assert patient == [Queued(1)]
    gate.set()
    await asyncio.gather(running, *others)

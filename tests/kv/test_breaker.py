"""The circuit breaker on virtual time, and against a plain description of what it may do."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.clock import VirtualClock
from stockpot.kv.breaker import BreakerLimits, CircuitBreaker

LIMITS = BreakerLimits(
    failures_in_row=3, window=10, failed_share=0.5, first_open_s=1.0, longest_open_s=8.0, jitter=0.25
)


def opened(clock: VirtualClock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock, LIMITS, chance=random.Random(1))
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_does_not() -> None:
    breaker = CircuitBreaker(VirtualClock(), LIMITS)
    for _ in range(4):
        breaker.failed()
        breaker.succeeded()
        breaker.succeeded()
    assert breaker.allows()
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.state == "open"
    assert not breaker.allows()


def test_a_share_of_failures_opens_it() -> None:
    breaker = CircuitBreaker(VirtualClock(), LIMITS)
    outcomes = [True, False] * 5
    for outcome in outcomes:
        assert breaker.allows()
        if outcome:
            breaker.succeeded()
        else:
            breaker.failed()
    assert breaker.state == "open"


def test_one_probe_after_its_time_and_success_closes_it() -> None:
    clock = VirtualClock()
    breaker = opened(clock)
    assert not breaker.try_probe()
    clock.advance(breaker.probe_in_s())
    assert [breaker.try_probe() for _ in range(3)] == [True, False, False]
    assert breaker.state == "half-open"
    assert not breaker.allows()
    breaker.probed(success=True)
    assert breaker.allows()


def test_every_failed_probe_doubles_the_time_up_to_the_bound() -> None:
    clock = VirtualClock()
    breaker = opened(clock)
    for whole_s in (1.0, 2.0, 4.0, 8.0, 8.0, 8.0):
        assert 0.75 * whole_s <= breaker.probe_in_s() <= whole_s
        clock.advance(breaker.probe_in_s())
        assert breaker.try_probe()
        breaker.probed(success=False)


def test_a_server_that_answers_probes_and_nothing_else_is_left_alone_for_longer_each_time() -> None:
    clock = VirtualClock()
    breaker = opened(clock)
    times: list[float] = []
    for _ in range(4):
        times.append(breaker.probe_in_s())
        clock.advance(breaker.probe_in_s())
        assert breaker.try_probe()
        breaker.probed(success=True)
        while not breaker.failed():
            pass
    assert times == sorted(times)
    assert times[-1] > 4 * times[0]


def test_steady_success_makes_the_next_time_short_again() -> None:
    clock = VirtualClock()
    breaker = opened(clock)
    for _ in range(3):
        clock.advance(breaker.probe_in_s())
        assert breaker.try_probe()
        breaker.probed(success=False)
    clock.advance(breaker.probe_in_s())
    assert breaker.try_probe()
    breaker.probed(success=True)
    for _ in range(LIMITS.steady_successes):
        breaker.succeeded()
    while not breaker.failed():
        pass
    assert breaker.probe_in_s() <= LIMITS.first_open_s


@given(st.lists(st.sampled_from(["ok", "bad", "wait", "probe ok", "probe bad", "late ok"]), max_size=80))
def test_it_is_never_stuck_and_never_lets_two_probe(steps: list[str]) -> None:
    clock = VirtualClock()
    breaker = CircuitBreaker(clock, LIMITS, chance=random.Random(2))
    for step in steps:
        if step == "wait":
            clock.advance(3.0)
        elif step == "late ok":  # of a call that began before it opened
            breaker.succeeded()
        elif step in ("ok", "bad") and breaker.allows():
            _ = breaker.succeeded() if step == "ok" else breaker.failed()
        elif step.startswith("probe") and breaker.try_probe():
            assert not breaker.try_probe()
            breaker.probed(success=step == "probe ok")
        assert 0 <= breaker.probe_in_s() <= LIMITS.longest_open_s
        assert breaker.allows() == (breaker.state == "up")
    if breaker.state == "open":
        clock.advance(LIMITS.longest_open_s)
        assert breaker.try_probe()
        breaker.probed(success=True)
    assert breaker.allows()


@pytest.mark.parametrize(
    "wrong", [{"failures_in_row": 0}, {"failed_share": 0.0}, {"first_open_s": 0.0}, {"jitter": 1.0}]
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="BreakerLimits"):
        BreakerLimits(**wrong)  # pyright: ignore[reportArgumentType]

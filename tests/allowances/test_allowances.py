"""Reservations as the gateway makes them: refusals in words, and what holds while Redis is away."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest
from tests.redis_server import RedisServer

from stockpot.allowances.allowance import NOTHING_HELD, Allowances, AllowancesUnavailable, Claim, Spent
from stockpot.allowances.redis_store import RedisStore
from stockpot.caller import NOBODY, Caller, Limits
from stockpot.clock import SystemClock, VirtualClock
from stockpot.errors import AllowanceExceeded, ConfigurationError
from stockpot.settings_gateway import AllowanceSettings

NOON_S = 1_798_718_400.0  # 2026-12-31, 12:00 UTC
SMALL = Claim("r", 10, 1_000_000)


def in_memory(clock: VirtualClock) -> Allowances:
    return Allowances(AllowanceSettings(), clock)


def caller(limits: Limits | None = None, team_limits: Limits | None = None) -> Caller:
    return Caller("t", "k", "ci", "search", limits=limits or Limits(), team_limits=team_limits or Limits())


@asynccontextmanager
async def over_redis(settings: AllowanceSettings) -> AsyncGenerator[Allowances]:
    allowances = Allowances(settings, SystemClock(), RedisStore(settings))
    await allowances.start()
    try:
        yield allowances
    finally:
        await allowances.close()


async def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)


async def test_who_has_no_limits_holds_nothing() -> None:
    allowances = in_memory(VirtualClock(NOON_S))
    for who in (NOBODY, caller()):
        hold = await allowances.reserve(who, SMALL)
        assert hold is NOTHING_HELD
        allowances.settle_soon(hold, Spent(10, 10))
        assert allowances.standing(who) is None


@pytest.mark.parametrize(
    ("limits", "claims", "words", "retry_after_s"),
    [
        (
            Limits(requests_per_minute=2),
            [SMALL] * 3,
            "The key 'ci' may make 2 requests a minute (requests_per_minute); 2 were made."
            " Try again in 61 s.",
            61.0,
        ),
        (
            Limits(concurrency=1),
            [SMALL] * 2,
            "The key 'ci' may have 1 requests running at once (concurrency); 1 are. Try again in 1 s.",
            1.0,
        ),
        (
            Limits(tokens_per_day=10_000),
            [Claim("a", 9_990, 0), Claim("b", 11, 0)],
            "The key 'ci' may use 10,000 tokens a day (tokens_per_day); 9,990 are used or reserved, and this"
            " request may take 11. Try again in 12 h.",
            43_200.0,
        ),
        (
            Limits(tokens_per_minute=100),
            [Claim("a", 101, 0)],
            "The key 'ci' may use 100 tokens a minute (tokens_per_minute); 0 are used or reserved, and this"
            " request may take 101. Ask for less: a shorter prompt, or a smaller max_tokens.",
            None,
        ),
        (
            Limits(usd_per_month=5.0),
            [Claim("a", 0, 4_990_000_000), Claim("b", 0, 10_500_000)],
            "The key 'ci' may spend 5.00 USD a month (usd_per_month); 4.99 USD is spent or reserved, and this"
            " request may take 0.010500 USD. Try again in 12 h.",
            43_200.0,
        ),
        (
            Limits(tokens_per_month=0),
            [SMALL],
            "The key 'ci' may use 0 tokens a month (tokens_per_month); 0 are used or reserved, and this"
            " request may take 10. Waiting does not help; ask an administrator for more.",
            None,
        ),
    ],
)
async def test_a_refusal_names_the_limit_its_value_and_when_to_retry(
    limits: Limits, claims: list[Claim], words: str, retry_after_s: float | None
) -> None:
    allowances = in_memory(VirtualClock(NOON_S))
    for claim in claims[:-1]:
        await allowances.reserve(caller(limits), claim)
    with pytest.raises(AllowanceExceeded, match=f"^{re.escape(words)}$") as caught:
        await allowances.reserve(caller(limits), claims[-1])
    error = caught.value
    assert error.retry_after_s == retry_after_s
    money = limits.usd_per_month is not None
    assert (error.status, error.code) == ((402, "budget_exceeded") if money else (429, "rate_limit_exceeded"))


async def test_key_and_team_are_asked_together() -> None:
    clock = VirtualClock(NOON_S)
    allowances = in_memory(clock)
    both = caller(Limits(requests_per_minute=1), Limits(tokens_per_day=15))
    with pytest.raises(AllowanceExceeded, match="The team 'search' may use 15 tokens a day"):
        await allowances.reserve(both, Claim("a", 16, 0))
    await allowances.reserve(both, SMALL)  # the key's one request was not taken by the refused
    with pytest.raises(AllowanceExceeded, match="The key 'ci'"):
        await allowances.reserve(both, Claim("b", 1, 0))


async def test_what_was_not_used_comes_back_and_standing_tells_what_is_left() -> None:
    allowances = in_memory(VirtualClock(NOON_S))
    who = caller(Limits(usd_per_day=1.0), Limits(tokens_per_month=1_000))
    hold = await allowances.reserve(who, Claim("a", 100, 900_000_000))
    assert allowances.standing(who) == pytest.approx(0.1)
    for _ in range(2):
        allowances.settle_soon(hold, Spent(100, 100_000_000))
    await allowances.reserve(who, Claim("a", 500, 0))
    assert allowances.standing(who) == pytest.approx(0.4)
    assert allowances.standing(caller(Limits(concurrency=3))) == pytest.approx(
        0.4
    )  # of key and team, by name
    await allowances.reserve(caller(Limits(concurrency=3)), Claim("a", 500, 0))
    assert allowances.standing(who) is None


async def test_a_cancelled_reservation_is_given_back(redis: RedisServer) -> None:
    async with over_redis(AllowanceSettings(redis_url=redis.url, timeout_s=20)) as allowances:
        who = caller(Limits(concurrency=1))
        allowances.settle_soon(await allowances.reserve(who, SMALL), Spent(0, 0))
        for _ in range(20):
            task = asyncio.create_task(allowances.reserve(who, SMALL))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        allowances.settle_soon(await allowances.reserve(who, SMALL), Spent(0, 0))


async def test_without_redis_what_is_limited_is_refused(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    who = caller(Limits(tokens_per_day=100))
    async with over_redis(AllowanceSettings(redis_url=redis.url, when_lost="refuse")) as allowances:
        hold = await allowances.reserve(who, Claim("a", 60, 0))
        redis.stop()
        allowances.settle_soon(hold, Spent(50, 0))  # does not fail
        for _ in range(20):
            with pytest.raises(AllowancesUnavailable, match=r"allowances\.redis_url") as caught:
                await allowances.reserve(who, SMALL)
            assert (caught.value.status, caught.value.retry_after_s) == (503, 1.0)
        assert await allowances.reserve(NOBODY, SMALL) is NOTHING_HELD
        assert caplog.text.count("requests with limits are refused") == 1  # once, not for each request
        redis.start()
        await until(lambda: not allowances.is_lost)
        allowances.settle_soon(await allowances.reserve(who, Claim("b", 100, 0)), Spent(0, 0))


async def test_without_redis_a_local_share_is_allowed_and_reported_later(redis: RedisServer) -> None:
    settings = AllowanceSettings(redis_url=redis.url, when_lost="local", local_share=0.1)
    who = caller(Limits(tokens_per_day=1_000, concurrency=20), Limits(usd_per_month=1.0))
    async with over_redis(settings) as allowances:
        await allowances.reserve(who, SMALL)
        redis.stop()
        first = await allowances.reserve(who, Claim("b", 60, 0))
        with pytest.raises(
            AllowanceExceeded, match=r"^While the gateways cannot share.* may use 100 tokens a day"
        ):
            await allowances.reserve(who, Claim("c", 60, 0))
        second = await allowances.reserve(who, Claim("d", 40, 100_000_000))
        with pytest.raises(AllowanceExceeded, match=r"may have 2 requests running at once"):
            await allowances.reserve(who, Claim("e", 0, 0))
        allowances.settle_soon(first, Spent(50, 0))
        redis.start()  # empty
        await until(lambda: not allowances.is_lost)
        allowances.settle_soon(second, Spent(30, 70_000_000))  # ends after Redis is back
        await until(lambda: redis.ask(b"HGET", b"stockpot:allow:key:k", b"td") == b"80")
        await until(lambda: redis.ask(b"HGET", b"stockpot:allow:team:search", b"um") == b"70000000")
        with pytest.raises(AllowanceExceeded, match="80 are used or reserved"):
            await allowances.reserve(who, Claim("f", 921, 0))
        await allowances.reserve(who, Claim("g", 920, 0))


async def test_a_redis_that_says_nothing_is_left_alone(redis: RedisServer) -> None:
    """It costs the requests of one moment its timeout; those that follow are answered without it."""
    settings = AllowanceSettings(redis_url=redis.url, timeout_s=0.2)
    who = caller(Limits(tokens_per_day=100))
    async with over_redis(settings) as allowances:
        hold = await allowances.reserve(who, Claim("a", 100, 0))
        redis.pause()
        try:
            refused = await asyncio.gather(
                *(allowances.reserve(who, Claim(f"b{n}", 1, 0)) for n in range(50)), return_exceptions=True
            )
            assert all(isinstance(each, AllowancesUnavailable) for each in refused)
            started_s = time.monotonic()
            for _ in range(200):
                with pytest.raises(AllowancesUnavailable):
                    await allowances.reserve(who, SMALL)
            assert time.monotonic() - started_s < 20  # each waiting for its time out would take 40
            allowances.settle_soon(hold, Spent(0, 0))
        finally:
            redis.resume()
        await until(lambda: not allowances.is_lost)
        # What was asked and never answered may have been done when it woke up: it was given back.
        await allowances.reserve(who, Claim("c", 100, 0))


async def test_scripts_that_redis_forgot_are_sent_again(redis: RedisServer) -> None:
    async with over_redis(AllowanceSettings(redis_url=redis.url, timeout_s=20)) as allowances:
        who = caller(Limits(requests_per_minute=100))
        await allowances.reserve(who, SMALL)
        redis.ask(b"SCRIPT", b"FLUSH")
        await asyncio.gather(*(allowances.reserve(who, SMALL) for _ in range(10)))
        assert redis.ask(b"HGET", b"stockpot:allow:key:k", b"r.sum") == b"11"


def test_an_address_that_is_none_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"allowances\.redis_url"):
        RedisStore(AllowanceSettings(redis_url="http://localhost"))

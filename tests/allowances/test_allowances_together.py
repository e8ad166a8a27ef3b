"""Eight gateways on one Redis: nothing is overspent, and what a killed one held comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.redis_server import RedisServer

from stockpot.allowances.allowance import Allowances, Claim
from stockpot.allowances.redis_store import RedisStore
from stockpot.caller import Caller, Limits
from stockpot.clock import SystemClock
from stockpot.errors import AllowanceExceeded
from stockpot.settings_gateway import AllowanceSettings

GATEWAYS = 8
USUAL: dict[str, Any] = {
    "lease_s": 30,
    "key": {},
    "team": {},
    "claim": (10, 10),
    "spent": (10, 10),
    "requests": 100,
    "at_once": 25,
    "keep": False,
    "linger": False,
}


class Gateway:
    """One process."""

    def __init__(self, number: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("gateways.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.number = number

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def begin(self, redis: RedisServer, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        whole = USUAL | order | {"url": redis.url, "name": f"g{self.number}"}
        self.process.stdin.write(json.dumps(whole) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def gateways() -> Generator[Sequence[Gateway], None, None]:
    with ExitStack() as stack:
        started = [Gateway(number) for number in range(GATEWAYS)]
        for gateway in started:
            stack.callback(gateway.kill)
        for gateway in started:
            assert gateway.read() == "ready\n"
        yield started


def together(gateways: Sequence[Gateway], redis: RedisServer, **order: Any) -> dict[str, int]:
    """The sums of what eight gateways report that begin at the same time, with 25 requests at once each."""
    for gateway in gateways:
        gateway.begin(redis, order)
    reports: list[dict[str, int]] = [json.loads(gateway.read()) for gateway in gateways]
    return {name: sum(report[name] for report in reports) for name in reports[0]}


@pytest.mark.parametrize("scope", ["key", "team"])
def test_requests_a_minute(gateways: Sequence[Gateway], redis: RedisServer, scope: str) -> None:
    sums = together(gateways, redis, **{scope: {"requests_per_minute": 200}})
    assert (sums["granted"], sums["refused"]) == (200, GATEWAYS * 100 - 200)


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day", "tokens_per_month"])
def test_tokens(gateways: Sequence[Gateway], redis: RedisServer, limit: str) -> None:
    """Reserved are 100 for each, used 60: room comes back, more than 100 get in, and what is used never
    exceeds the limit."""
    sums = together(gateways, redis, key={limit: 10_000}, claim=(100, 0), spent=(60, 0))
    assert 6_000 < sums["tokens"] <= 10_000


@pytest.mark.parametrize("limit", ["usd_per_day", "usd_per_month"])
def test_money(gateways: Sequence[Gateway], redis: RedisServer, limit: str) -> None:
    sums = together(gateways, redis, team={limit: 1.0}, claim=(0, 10_000_000), spent=(0, 6_000_000))
    assert 600_000_000 < sums["nanousd"] <= 1_000_000_000


def test_all_limits_of_key_and_team_at_once(gateways: Sequence[Gateway], redis: RedisServer) -> None:
    """What one limit refuses is not taken from the others: the team's requests all go to what was granted."""
    sums = together(
        gateways, redis, key={"tokens_per_day": 1_000}, team={"requests_per_minute": 150}, claim=(10, 0)
    )
    assert sums["granted"] == 100
    made = redis.ask(b"HGET", b"stockpot:allow:team:t", b"r.sum")
    assert made == b"100"


def test_requests_at_once(gateways: Sequence[Gateway], redis: RedisServer) -> None:
    sums = together(gateways, redis, key={"concurrency": 20}, keep=True)
    assert sums["granted"] == 20  # nobody leaves, so as many get in as there is room for
    redis.ask(b"FLUSHALL")
    sums = together(gateways, redis, key={"concurrency": 20})
    assert sums["granted"] > 20  # they leave, and others follow
    assert redis.ask(b"ZCARD", b"stockpot:allow:key:k:held") == 0


async def test_what_a_killed_gateway_held_comes_back(redis: RedisServer) -> None:
    limits: dict[str, Any] = {"concurrency": 5, "tokens_per_day": 500, "usd_per_month": 0.5}
    order: dict[str, Any] = {"lease_s": 1, "key": limits, "keep": True, "linger": True}
    order |= {"claim": (100, 100_000_000), "requests": 5, "at_once": 5}
    doomed = Gateway(0)
    settings = AllowanceSettings(redis_url=redis.url, timeout_s=20, lease_s=1)
    allowances = Allowances(settings, SystemClock(), RedisStore(settings))
    try:
        doomed.read()
        doomed.begin(redis, order)
        assert json.loads(doomed.read())["granted"] == 5
        caller = Caller(key_id="k", key_name="k", limits=Limits(**limits))
        everything = Claim("mine", 500, 500_000_000)
        renewed_until_s = time.monotonic() + 2.5
        while time.monotonic() < renewed_until_s:  # it lives, and renews: nothing comes back
            with pytest.raises(AllowanceExceeded, match="concurrency"):
                await allowances.reserve(caller, everything)
        doomed.kill()
        deadline_s = time.monotonic() + 30
        while True:
            try:
                await allowances.reserve(caller, everything)
                break
            except AllowanceExceeded:
                assert time.monotonic() < deadline_s, "the reservations of a killed gateway do not return"
    finally:
        doomed.kill()
        await allowances.close()

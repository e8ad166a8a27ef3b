"""Redis in trouble: stopped, frozen, emptied, slow. Requests must not fail, nor wait much longer for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from secrets import token_hex
from typing import Literal, get_args

from stockpot.bench.charts import Bars, Chart
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.redis_process import RedisProcess, SlowProxy, private_redis, slow_proxy
from stockpot.bench.results import Cell, Result, Table, Verdict
from stockpot.bench.statistics import median
from stockpot.bench.stockpot_server import Launch, StockpotServer, stockpot_server
from stockpot.bench.workload import WordSource
from stockpot.engine.reports import TierFigures
from stockpot.errors import ServerUnreachable

Fault = Literal["none", "stopped", "paused", "emptied", "slow"]
"""paused: SIGSTOP, so that connections stay and say nothing. emptied: stopped, started again without data.
slow: each piece of an answer comes `delay_s` late."""
FAULTS: tuple[Fault, ...] = get_args(Fault)

_EXTRA_MS_MAX = 100.0
_ANSWER_S_MAX = 120.0
"""A request that takes longer has failed."""
_HEAL_S_MAX = 120.0
_SEED = 67


@dataclass(frozen=True, slots=True)
class FaultsPlan:
    """Each fault comes `rounds` times, each time for `requests` pairs of requests."""

    rounds: int = 3
    requests: int = 8
    prompt_tokens: int = 600
    answer_tokens: int = 4
    delay_s: float = 0.2

    @classmethod
    def quick(cls) -> FaultsPlan:
        """Enough to see that everything works."""
        return cls(rounds=1, requests=3, prompt_tokens=200, answer_tokens=2)


@dataclass(frozen=True, slots=True)
class FaultReading:
    """The same new prompt to both servers, one right after the other; None: it failed, for the reason in
    `failure`. `state` is that of the circuit breaker afterwards."""

    fault: Fault
    round: int
    ttft_s: float | None
    without_redis_s: float | None
    state: str
    failure: str = ""


async def measure_faults(
    plan: FaultsPlan, *, launch: Launch = stockpot_server, progress: BenchProgress = silent
) -> Result:
    """Two servers at once, one with Redis (behind a proxy) and one without; no disk tier on either. Between
    two faults Redis is well again and the server has noticed."""
    idleness = measure_idleness()
    readings: list[FaultReading] = []
    total = plan.rounds * len(FAULTS)
    async with private_redis() as redis, slow_proxy(redis.port) as proxy:
        settings = {"cache": {"secret": token_hex(16), "redis": {"url": proxy.url}}}
        async with launch(settings) as with_redis, launch({}) as without:
            pairs = _Pairs(plan, with_redis, without)
            await pairs.warm_up()
            for number in range(1, plan.rounds + 1):
                for place, fault in enumerate(FAULTS):
                    progress("faults", len(FAULTS) * (number - 1) + place, total)
                    await pairs.wait_until_up()
                    async with _fault(fault, redis, proxy, plan.delay_s):
                        readings += [await pairs.next(fault, number) for _ in range(plan.requests)]
            progress("faults", total, total)
            await pairs.wait_until_up()
            counts = (await with_redis.cache_figures()).tiers["redis"].counts
    failures = [reading.failure for reading in readings if reading.failure]
    return Result(
        name="faults",
        parameters=asdict(plan),
        tables=(_summary(readings), _all_readings(readings)),
        figures={
            "readings": [asdict(reading) for reading in readings],
            "redis_misses": dict(counts.misses),
            "redis_unkept": dict(counts.unkept),
        },
        idleness=idleness,
        verdicts=(Verdict("failed requests", len(failures), 0), *_verdicts(readings)),
        notes=(
            *failures[:5],
            f"Misses of the Redis tier by cause: {_listed(counts.misses)}; blocks not written: "
            f"{_listed(counts.unkept)}.",
            "After every fault the breaker closed again.",
        ),
        chart=_chart(readings),
    )


class _Pairs:
    """New prompts, each to both servers, which comes first in turn."""

    def __init__(self, plan: FaultsPlan, with_redis: StockpotServer, without: StockpotServer) -> None:
        self._plan = plan
        self._with_redis = with_redis
        self._without = without
        self._words = WordSource(_SEED)
        self._count = 0

    async def warm_up(self) -> None:
        """First-use costs fall on nobody."""
        for _ in range(2):
            prompt = self._words.text(self._plan.prompt_tokens)
            for server in (self._with_redis, self._without):
                await server.client.complete(prompt, max_tokens=self._plan.answer_tokens)

    async def wait_until_up(self) -> None:
        """Until the server uses its Redis. Raises ServerUnreachable where it never does again."""
        await self._with_redis.wait_until(
            "a Redis tier that is up", lambda now: _state(now.tiers) == "up", timeout_s=_HEAL_S_MAX
        )
        await self._with_redis.wait_until_written()

    async def next(self, fault: Fault, number: int) -> FaultReading:
        prompt = self._words.text(self._plan.prompt_tokens)
        self._count += 1
        servers = (self._with_redis, self._without)
        times: dict[StockpotServer, float] = {}
        failure = ""
        for server in servers if self._count % 2 else reversed(servers):
            try:
                async with asyncio.timeout(_ANSWER_S_MAX):
                    answer = await server.client.complete(prompt, max_tokens=self._plan.answer_tokens)
                times[server] = answer.ttft_s
            except (ServerUnreachable, TimeoutError) as error:
                failure = f"FAILED, {fault} in round {number}: {error or f'no answer in {_ANSWER_S_MAX:g} s'}"
        state = _state((await self._with_redis.cache_figures()).tiers)
        mine, theirs = times.get(self._with_redis), times.get(self._without)
        return FaultReading(fault, number, mine, theirs, state, failure)


@asynccontextmanager
async def _fault(fault: Fault, redis: RedisProcess, proxy: SlowProxy, delay_s: float) -> AsyncGenerator[None]:
    """Redis in trouble, and well again at the end."""
    match fault:
        case "none":
            yield
        case "stopped":
            redis.stop()
            try:
                yield
            finally:
                await redis.start()
        case "paused":
            redis.pause()
            try:
                yield
            finally:
                redis.resume()
        case "emptied":
            redis.stop()
            await redis.start()
            yield
        case "slow":
            proxy.delay_s = delay_s
            try:
                yield
            finally:
                proxy.delay_s = 0.0


def _state(tiers: Mapping[str, TierFigures]) -> str:
    tier = tiers.get("redis")
    return tier.counts.state if tier is not None else "absent"


def _times(readings: Sequence[FaultReading], fault: Fault) -> tuple[list[float], list[float]]:
    """TTFT with Redis and without, of the pairs in which both were answered."""
    pairs = [
        (reading.ttft_s, reading.without_redis_s)
        for reading in readings
        if reading.fault == fault and reading.ttft_s is not None and reading.without_redis_s is not None
    ]
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]


def _verdicts(readings: Sequence[FaultReading]) -> list[Verdict]:
    """Both against the median without Redis: its own worst would forgive too much."""
    verdicts: list[Verdict] = []
    for fault in FAULTS:
        mine, cold = _times(readings, fault)
        for name, value in (("median", median(mine) if mine else None), ("worst", max(mine, default=None))):
            extra_ms = None if value is None else (value - median(cold)) * 1e3
            verdicts.append(Verdict(f"{fault}: {name} TTFT less cold, ms", extra_ms, _EXTRA_MS_MAX))
    return verdicts


def _summary(readings: Sequence[FaultReading]) -> Table:
    columns = (
        *("fault", "pairs", "failed", "TTFT median ms", "worst", "without Redis ms", "worst without"),
        "breaker",
    )
    rows: list[tuple[Cell, ...]] = []
    for fault in FAULTS:
        of_fault = [reading for reading in readings if reading.fault == fault]
        mine, theirs = _times(readings, fault)
        figures = (median(mine), max(mine), median(theirs), max(theirs)) if mine else (None,) * 4
        rows.append(
            (
                *(fault, len(of_fault), sum(bool(reading.failure) for reading in of_fault)),
                *(None if each is None else round(each * 1e3, 1) for each in figures),
                _listed(Counter(reading.state for reading in of_fault)),
            )
        )
    return Table("New prompts, with Redis in trouble and without Redis", columns, tuple(rows))


def _all_readings(readings: Sequence[FaultReading]) -> Table:
    columns = ("round", "fault", "TTFT ms", "without Redis ms", "breaker", "failure")
    rows = tuple(
        (r.round, r.fault, _ms(r.ttft_s), _ms(r.without_redis_s), r.state, r.failure or None)
        for r in readings
    )
    return Table("Every pair", columns, rows)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 2)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _chart(readings: Sequence[FaultReading]) -> Chart:
    series: dict[str, list[float]] = {"with Redis": [], "worst with Redis": [], "without": []}
    for fault in FAULTS:
        mine, theirs = _times(readings, fault)
        series["with Redis"].append(median(mine) * 1e3 if mine else 0.0)
        series["worst with Redis"].append(max(mine, default=0.0) * 1e3)
        series["without"].append(median(theirs) * 1e3 if theirs else 0.0)
    return Chart((Bars("Time to first token of a new prompt", "Redis", "ms", FAULTS, series),))

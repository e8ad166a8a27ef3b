"""How long a prefix takes to come back: from the context, RAM, disk and Redis, beside computing it."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from stockpot.bench.bandwidth import disk_bandwidth, drop_page_cache, memory_bandwidth, redis_bandwidth
from stockpot.bench.charts import Bars, Chart
from stockpot.bench.client import Answer, ChatMessage
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.redis_process import RedisProcess, private_redis
from stockpot.bench.results import Cell, Result, Table, Verdict
from stockpot.bench.sizing import text_of_tokens
from stockpot.bench.statistics import median
from stockpot.bench.stockpot_server import CacheFigures, Launch, StockpotServer, stockpot_server
from stockpot.bench.workload import WordSource
from stockpot.events import CacheTier

Case = Literal["cold", "context", "ram-busy", "ram", "disk", "redis", "restart", "question"]
"""context, ram-busy: while another request decodes, with the same prefix or an unrelated one. restart: the
first request after kill -9, from disk. question: only the new tokens, behind no prefix."""
CASES: tuple[Case, ...] = get_args(Case)
_TIER_OF: Mapping[Case, CacheTier] = {
    "context": "context",
    "ram-busy": "ram",
    "ram": "ram",
    "disk": "disk",
    "redis": "redis",
    "restart": "disk",
}

_RAM_EXTRA_MS_MAX = 10.0
_DISK_OVER_RAM_MAX = 1.5
_REDIS_OVER_RAM_MAX = 3.0
_WARM_OVER_COLD_MAX = 0.1

_WARM_SHARE_MIN = 0.95
"""Of the system prompt's tokens that must have come from the tier of the case, or the reading is void."""
_COLD_SHARE_MAX = 0.05
"""Of a cold prompt's tokens that may have been cached: the template's own."""
_BACKGROUND_TOKENS = 512
_SEED = 53
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class TiersPlan:
    """`rounds` of all cases in turn, each round with a system prompt of its own. `disk_folder` is on the disk
    to be measured; None: the system's folder for temporary files."""

    rounds: int = 7
    system_tokens: int = 2000
    question_words: int = 12
    answer_tokens: int = 8
    disk_folder: Path | None = None

    @classmethod
    def quick(cls, disk_folder: Path | None = None) -> TiersPlan:
        """Enough to see that everything works."""
        return cls(rounds=1, system_tokens=600, answer_tokens=2, disk_folder=disk_folder)


@dataclass(frozen=True, slots=True)
class TierReading:
    """One request. `cached_tokens` came from the tier of the case (of a cold one: from anywhere);
    `moved_bytes` is what the tier gave, `floor_s` how long these bytes take without us."""

    case: Case
    round: int
    ttft_s: float
    server_ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    moved_bytes: int = 0
    floor_s: float | None = None
    void: str = ""
    """Why this reading is none: the tokens came from elsewhere."""


async def measure_tiers(
    plan: TiersPlan, *, launch: Launch = stockpot_server, progress: BenchProgress = silent
) -> Result:
    """Four servers a round: one that computes (and is killed), one with its Redis alone, two with its disk
    alone. All of them are asked after an unrelated prompt from the same tier, so that code and model are
    hot, except the one that restarts."""
    idleness = measure_idleness()
    readings: list[TierReading] = []
    stayed: list[float] = []
    async with private_redis() as redis:
        for number in range(1, plan.rounds + 1):
            with tempfile.TemporaryDirectory(prefix="stockpot-tiers-", dir=plan.disk_folder) as folder:
                run = _Round(plan, number, launch, redis, Path(folder))
                readings += await run.play(progress)
                stayed.append(run.pages_stayed)
            # The next round begins without this one's blocks.
            await asyncio.to_thread(redis.ask, (b"FLUSHALL",))
    void = tuple(f"VOID, {r.case} in round {r.round}: {r.void}" for r in readings if r.void)
    return Result(
        name="tiers",
        parameters={**asdict(plan), "disk_folder": "given" if plan.disk_folder else "temporary"},
        tables=(_summary(plan, readings), _all_readings(readings)),
        figures={"readings": [asdict(reading) for reading in readings], "page_cache_stayed": stayed},
        idleness=idleness,
        verdicts=_verdicts(readings),
        notes=(
            *void,
            f"Before each disk reading the block files were dropped from the page cache (posix_fadvise); "
            f"{max(stayed):.0%} of their pages stayed at most.",
            "Floor: the bytes moved, at the speed of a plain copy, read or GET. Question: the same question "
            "behind no prefix; every warm case computes as many new tokens.",
            "While context and ram-busy were measured another request was decoding: behind the same prefix, "
            "and behind one of the same size.",
        ),
        chart=_chart(readings),
    )


class _Round:
    """All cases once."""

    def __init__(
        self, plan: TiersPlan, number: int, launch: Launch, redis: RedisProcess, folder: Path
    ) -> None:
        self.pages_stayed = 1.0
        self._plan = plan
        self._number = number
        self._launch = launch
        self._redis = redis
        self._folder = folder
        self._words = WordSource(_SEED + 1000 * number)
        self._warm_up = self._words.text(plan.system_tokens)
        self._system = ""
        secret = secrets.token_hex(16)
        disk = {"path": folder, "capacity_bytes": 2**40}
        self._disk: dict[str, object] = {"secret": secret, "disk": disk}
        self._shared: dict[str, object] = {"secret": secret, "redis": {"url": redis.url}}

    async def play(self, progress: BenchProgress) -> list[TierReading]:
        label = f"round {self._number}"
        readings: list[TierReading] = []

        def add(*more: TierReading) -> None:
            readings.extend(more)
            progress(label, len(readings), len(CASES))

        progress(label, 0, len(CASES))
        async with AsyncExitStack() as first_lives:
            first = await first_lives.enter_async_context(
                self._launch({"cache": {**self._disk, **self._shared}})
            )
            self._system = await self._system_text(first)
            await self._warm(first, twice=True)
            add(await self._ask(first, "cold"))
            add(await self._ask_beside(first, "context", self._system))
            add(await self._ask_beside(first, "ram-busy", self._warm_up))
            add(await self._ask(first, "ram"))
            add(await self._question(first))
            await first.wait_until_written()
            async with self._launch({"cache": self._shared}) as second:
                await self._warm(second)
                add(await self._ask(second, "redis"))
            await first.running.kill()
        async with self._launch({"cache": self._disk}) as restarted:
            add(await self._ask(restarted, "restart"))
        async with self._launch({"cache": self._disk}) as third:
            await self._warm(third)
            self.pages_stayed = await asyncio.to_thread(drop_page_cache, self._folder)
            add(await self._ask(third, "disk"))
        return await asyncio.to_thread(self._with_floors, readings)

    async def _warm(self, server: StockpotServer, *, twice: bool = False) -> None:
        """An unrelated prompt: computed, then from RAM, by the first server; from their tier by others."""
        for _ in range(2 if twice else 1):
            messages = _conversation(self._warm_up, self._question_text())
            await server.client.chat(messages, max_tokens=self._plan.answer_tokens)

    async def _ask_beside(self, server: StockpotServer, case: Case, prefix: str) -> TierReading:
        """A question while another one, behind `prefix`, is answered."""
        before = (await server.cache_figures()).tokens_generated
        async with _going_on(server, _conversation(prefix, self._question_text())):
            await server.wait_until(
                "a second request that decodes",
                lambda now: now.running > 0 and now.tokens_generated > before + 1,
            )
            return await self._ask(server, case)

    async def _question(self, server: StockpotServer) -> TierReading:
        messages = _conversation(self._words.text(2), self._question_text())
        answer = await server.client.chat(messages, max_tokens=self._plan.answer_tokens)
        return self._reading("question", answer, 0)

    async def _ask(self, server: StockpotServer, case: Case) -> TierReading:
        messages = _conversation(self._system, self._question_text())
        before = _read_bytes(await server.cache_figures(), case)
        answer = await server.client.chat(messages, max_tokens=self._plan.answer_tokens)
        figures = await server.cache_figures()
        moved_bytes = _read_bytes(figures, case) - before
        if _TIER_OF.get(case) == "ram":
            moved_bytes = (answer.cached_tokens or 0) * figures.kv_bytes_per_token
        return self._reading(case, answer, moved_bytes)

    def _reading(self, case: Case, answer: Answer, moved_bytes: int) -> TierReading:
        server = answer.server
        by_tier: Mapping[str, int] = server.cached_tokens if server is not None else {}
        total = sum(by_tier.values())
        cached = by_tier.get(_TIER_OF[case], 0) if case in _TIER_OF else total
        void = ""
        if case in _TIER_OF and cached < _WARM_SHARE_MIN * self._plan.system_tokens:
            void = f"{cached} of {answer.prompt_tokens} tokens came from {_TIER_OF[case]}: {dict(by_tier)}"
        if case == "cold" and total > _COLD_SHARE_MAX * self._plan.system_tokens:
            void = f"{total} of {answer.prompt_tokens} tokens were cached: {dict(by_tier)}"
        return TierReading(
            case=case,
            round=self._number,
            ttft_s=answer.ttft_s,
            server_ttft_s=(server.ttft_ms or 0.0) / 1e3 if server is not None else 0.0,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=cached,
            computed_tokens=answer.prompt_tokens - total,
            moved_bytes=moved_bytes,
            void=void,
        )

    def _with_floors(self, readings: Sequence[TierReading]) -> list[TierReading]:
        """The speeds are measured now, beside what they are compared with."""
        warm = disk_bandwidth(self._folder)
        drop_page_cache(self._folder)
        memory = memory_bandwidth(max(1, *(r.moved_bytes for r in readings)))
        speeds = {
            "ram-busy": memory,
            "ram": memory,
            "restart": warm,
            "disk": disk_bandwidth(self._folder),
            "redis": redis_bandwidth(self._redis),
        }
        return [
            replace(r, floor_s=speeds[r.case].floor_s(r.moved_bytes)) if r.case in speeds else r
            for r in readings
        ]

    async def _system_text(self, server: StockpotServer) -> str:
        """A system prompt of the plan's tokens, counted without the template around it."""
        empty = len(await server.tokenize(_conversation("", "?")))

        async def count(text: str) -> int:
            return len(await server.tokenize(_conversation(text, "?"))) - empty

        return await text_of_tokens(self._plan.system_tokens, count, seed=_SEED + self._number)

    def _question_text(self) -> str:
        return self._words.text(self._plan.question_words)


@asynccontextmanager
async def _going_on(server: StockpotServer, messages: Sequence[ChatMessage]) -> AsyncGenerator[None]:
    """A request that is answered meanwhile; its client leaves at the end."""
    task = asyncio.create_task(server.client.chat(messages, max_tokens=_BACKGROUND_TOKENS))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await server.wait_until("the end of the second request", lambda now: now.running == 0)


def _conversation(system: str, question: str) -> list[ChatMessage]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _read_bytes(figures: CacheFigures, case: Case) -> int:
    """What the tier of a case has given so far; 0 for tiers that are not behind RAM."""
    tier = figures.tiers.get(_TIER_OF.get(case, ""))
    return tier.counts.read_bytes if tier is not None else 0


def _ttft_s(readings: Sequence[TierReading], case: Case) -> float | None:
    """The median at the client; None where a reading is void or there are none."""
    of_case = [reading for reading in readings if reading.case == case]
    if not of_case or any(reading.void for reading in of_case):
        return None
    return median([reading.ttft_s for reading in of_case])


def _verdicts(readings: Sequence[TierReading]) -> tuple[Verdict, ...]:
    times = {case: _ttft_s(readings, case) for case in CASES}

    def over(case: Case, other: Case) -> float | None:
        mine, theirs = times[case], times[other]
        return None if mine is None or theirs is None else mine / theirs

    ram, context = times["ram-busy"], times["context"]
    extra_ms = None if ram is None or context is None else (ram - context) * 1e3
    return (
        Verdict(
            "TTFT from RAM less from context, each beside a request that decodes, ms",
            extra_ms,
            _RAM_EXTRA_MS_MAX,
        ),
        Verdict("TTFT from disk over RAM", over("disk", "ram"), _DISK_OVER_RAM_MAX),
        Verdict("TTFT from Redis over RAM", over("redis", "ram"), _REDIS_OVER_RAM_MAX),
        *(Verdict(f"TTFT of {case} over cold", over(case, "cold"), _WARM_OVER_COLD_MAX) for case in _TIER_OF),
    )


def _summary(plan: TiersPlan, readings: Sequence[TierReading]) -> Table:
    columns = (
        *("case", "TTFT ms", "least", "most", "in server", "cached tokens", "computed"),
        *("moved MiB", "floor ms", "cold / TTFT", "question %"),
    )
    cold_s, question_s = _ttft_s(readings, "cold"), _ttft_s(readings, "question")
    rows: list[tuple[Cell, ...]] = []
    for case in CASES:
        some = [reading for reading in readings if reading.case == case]
        ttft_s = median([r.ttft_s for r in some])
        floors_s = [r.floor_s for r in some if r.floor_s is not None]
        is_warm = case in _TIER_OF
        rows.append(
            (
                *(case, round(ttft_s * 1e3, 1), round(min(r.ttft_s for r in some) * 1e3, 1)),
                round(max(r.ttft_s for r in some) * 1e3, 1),
                round(median([r.server_ttft_s for r in some]) * 1e3, 1),
                *(
                    round(median([r.cached_tokens for r in some])),
                    round(median([r.computed_tokens for r in some])),
                ),
                round(median([r.moved_bytes for r in some]) / _MIB, 2) if is_warm else None,
                round(median(floors_s) * 1e3, 2) if floors_s else None,
                round(cold_s / ttft_s, 1) if is_warm and cold_s else None,
                round(100 * question_s / ttft_s) if is_warm and question_s else None,
            )
        )
    return Table(f"A prefix of {plan.system_tokens} tokens, by where it is (medians)", columns, tuple(rows))


def _all_readings(readings: Sequence[TierReading]) -> Table:
    columns = ("round", "case", "TTFT ms", "server TTFT ms", "prompt tokens", "cached", "computed", "void")
    rows = tuple(
        (
            *(r.round, r.case, round(r.ttft_s * 1e3, 2), round(r.server_ttft_s * 1e3, 2)),
            *(r.prompt_tokens, r.cached_tokens, r.computed_tokens, r.void or None),
        )
        for r in readings
    )
    return Table("Every reading", columns, rows)


def _chart(readings: Sequence[TierReading]) -> Chart:
    """Logarithmic: cold is more than a magnitude above the others."""
    series = {
        "at the client": [median([r.ttft_s * 1e3 for r in readings if r.case == case]) for case in CASES],
        "in the server": [
            median([r.server_ttft_s * 1e3 for r in readings if r.case == case]) for case in CASES
        ],
    }
    return Chart((Bars("Time to first token, median", "", "ms", CASES, series, logarithmic=True),))

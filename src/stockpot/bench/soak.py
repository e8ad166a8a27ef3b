"""Half an hour of mixed chat under all tiers, with twice as much to remember as RAM holds."""

from __future__ import annotations

import asyncio
import random
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stockpot.bench.charts import Chart, Lines
from stockpot.bench.client import ChatMessage
from stockpot.bench.gather import run_all
from stockpot.bench.machine import Idleness, measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.redis_process import private_redis
from stockpot.bench.results import Result, Table, Verdict
from stockpot.bench.statistics import Spread, slope
from stockpot.bench.stockpot_server import CacheFigures, Launch, StockpotServer, stockpot_server
from stockpot.bench.workload import WordSource
from stockpot.errors import StockpotError

_MIB = 2**20
_GROWTH_SHARE_MAX = 0.02
_SEED = 71
_SAMPLES = 120
_LONGEST_S = 120.0
"""An answer that takes longer counts as an error."""
_SESSION_WORDS = 700
"""A session that has become longer than this starts anew."""
_TOKENS_A_WORD = 1.6


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """`users` at once talk for `minutes`, each time in one of so many sessions that together they are twice
    as long as RAM holds."""

    minutes: float = 30.0
    users: int = 6
    ram_bytes: int = 128 * _MIB
    disk_bytes: int = 512 * _MIB
    context_tokens: int = 8192

    @classmethod
    def quick(cls) -> SoakPlan:
        """Enough to see that everything works."""
        return cls(minutes=0.2, users=3, ram_bytes=24 * _MIB, disk_bytes=64 * _MIB)


@dataclass(frozen=True, slots=True)
class SoakSample:
    """The server after so many seconds. `cached` are prompt tokens so far, by tier."""

    second: float
    rss_bytes: int
    computed: int
    cached: dict[str, int]


async def measure_soak(
    plan: SoakPlan, *, launch: Launch = stockpot_server, progress: BenchProgress = silent
) -> Result:
    """Play, and compare memory with its bound, its last half with no growth, and errors with none."""
    idleness = measure_idleness()
    async with private_redis() as redis:
        with tempfile.TemporaryDirectory(prefix="stockpot-soak-") as folder:
            settings = {
                "engine": {"context_tokens": plan.context_tokens},
                "cache": {
                    "ram_bytes": plan.ram_bytes,
                    "secret": secrets.token_hex(16),
                    "disk": {"path": Path(folder), "capacity_bytes": plan.disk_bytes},
                    "redis": {"url": redis.url, "ttl_s": 600},
                },
            }
            async with launch(settings) as server:
                # Beside the usual: what waits to be written, and the heads of blocks on disk.
                bound_bytes = await server.memory_bound_bytes(beside_bytes=256 * _MIB)
                soak = _Soak(server, plan, progress)
                await soak.play()
                peak_bytes = server.running.peak_rss_bytes()
                figures = await server.cache_figures()
    return _result(plan, soak, figures, bound_bytes=bound_bytes, peak_bytes=peak_bytes, idleness=idleness)


class _Soak:
    """The run."""

    def __init__(self, server: StockpotServer, plan: SoakPlan, progress: BenchProgress) -> None:
        self.samples: list[SoakSample] = []
        self.errors: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.ttft_s: list[float] = []
        self._server = server
        self._plan = plan
        self._progress = progress
        self._random = random.Random(_SEED)
        self._words = WordSource(_SEED)
        self._systems = [WordSource(_SEED + 1 + number).text(250) for number in range(4)]
        self._sessions: list[list[ChatMessage]] = []
        self._began_s = 0.0

    async def play(self) -> None:
        figures = await self._server.cache_figures()
        tokens = 2 * self._plan.ram_bytes / figures.kv_bytes_per_token
        count = max(4, round(tokens / (_SESSION_WORDS * _TOKENS_A_WORD * 0.75)))
        self._sessions = [self._fresh() for _ in range(count)]
        self._began_s = time.monotonic()
        end_s = self._began_s + 60 * self._plan.minutes
        await run_all([*(self._user(end_s) for _ in range(self._plan.users)), self._watch(end_s)])

    async def _watch(self, end_s: float) -> None:
        every_s = 60 * self._plan.minutes / _SAMPLES
        while (now_s := time.monotonic()) < end_s:
            figures = await self._server.cache_figures()
            self.samples.append(
                SoakSample(
                    round(now_s - self._began_s, 1),
                    self._server.running.rss_bytes(),
                    figures.prompt_tokens_computed,
                    dict(figures.prompt_tokens_cached),
                )
            )
            self._progress("soak (samples)", len(self.samples), _SAMPLES)
            await asyncio.sleep(every_s)

    async def _user(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            kind = self._random.choices(("turn", "long", "leave"), (8, 1, 1))[0]
            try:
                match kind:
                    case "turn":
                        await self._turn()
                    case "long":
                        prompt = self._words.text(self._random.randint(200, 600))
                        await self._server.client.complete(prompt, max_tokens=4)
                    case _:
                        await self._leave()
                self.outcomes[kind] += 1
            except (StockpotError, TimeoutError) as error:
                self.errors[f"{kind}: {error}"[:200]] += 1

    async def _turn(self) -> None:
        """The next turn of a session nobody else is in."""
        if not self._sessions:
            return
        session = self._sessions.pop(self._random.randrange(len(self._sessions)))
        try:
            session.append({"role": "user", "content": self._words.text(self._random.randint(8, 60))})
            request = self._server.client.chat(session, max_tokens=self._random.randint(4, 40))
            answer = await asyncio.wait_for(request, _LONGEST_S)
            self.ttft_s.append(answer.ttft_s)
            session.append({"role": "assistant", "content": answer.text})
        finally:
            words = sum(len(message["content"].split()) for message in session)
            self._sessions.append(session if words < _SESSION_WORDS else self._fresh())

    async def _leave(self) -> None:
        """A client that goes away before its answer is whole."""
        request = self._server.client.complete(self._words.text(40), max_tokens=200)
        try:
            await asyncio.wait_for(request, self._random.uniform(0.005, 0.2))
        except TimeoutError:
            return

    def _fresh(self) -> list[ChatMessage]:
        return [{"role": "system", "content": self._random.choice(self._systems)}]


def _result(
    plan: SoakPlan,
    soak: _Soak,
    figures: CacheFigures,
    *,
    bound_bytes: float,
    peak_bytes: int,
    idleness: Idleness,
) -> Result:
    samples = soak.samples
    half = samples[len(samples) // 2 :]
    growth = 0.0
    if len(half) > 1:
        growth = slope([s.second for s in half], [s.rss_bytes for s in half]) * (
            half[-1].second - half[0].second
        )
    errors = sum(soak.errors.values())
    cached = dict(figures.prompt_tokens_cached)
    total = figures.prompt_tokens_computed + sum(cached.values())
    shares = {tier: round(tokens / total, 4) if total else 0.0 for tier, tokens in cached.items()}
    ttft = Spread.of(soak.ttft_s) if soak.ttft_s else None
    evicted = {"ram": dict(figures.evicted_blocks)} | {
        name: dict(tier.counts.evicted) for name, tier in figures.tiers.items()
    }
    return Result(
        name="soak",
        parameters=asdict(plan),
        tables=(
            Table(
                "Over the run",
                ("second", "RSS MiB", "hit ratio", "context", "ram", "disk", "redis"),
                tuple(_row(sample) for sample in samples),
            ),
        ),
        figures={
            "requests": dict(soak.outcomes),
            "errors": dict(soak.errors),
            "hit_ratio": round(sum(shares.values()), 4),
            "share_of_prompt_tokens_by_tier": shares,
            "ttft": asdict(ttft) if ttft else None,
            "evicted_blocks": evicted,
            "misses": {name: dict(tier.counts.misses) for name, tier in figures.tiers.items()},
            "peak_rss_bytes": peak_bytes,
            "bound_bytes": round(bound_bytes),
            "growth_of_last_half_bytes": round(growth),
        },
        idleness=idleness,
        verdicts=(
            Verdict("errors", float(errors), 0.0),
            Verdict("peak RSS over the bound", peak_bytes / bound_bytes, 1.0),
            Verdict(
                "growth over the last half, share of RSS",
                growth / samples[-1].rss_bytes if len(half) > 1 else None,
                _GROWTH_SHARE_MAX,
            ),
        ),
        notes=(
            f"{sum(soak.outcomes.values()):,} requests; of all prompt tokens {sum(shares.values()):.1%} were "
            "not computed: " + ", ".join(f"{tier} {share:.1%}" for tier, share in shares.items()) + ".",
            *(f"{count} x {error}" for error, count in soak.errors.most_common(5)),
        ),
        chart=_chart(samples, bound_bytes),
    )


def _row(sample: SoakSample) -> tuple[str | int | float, ...]:
    cached = sum(sample.cached.values())
    total = cached + sample.computed
    return (
        sample.second,
        round(sample.rss_bytes / _MIB, 1),
        round(cached / total, 4) if total else 0.0,
        *(sample.cached.get(tier, 0) for tier in ("context", "ram", "disk", "redis")),
    )


def _chart(samples: Sequence[SoakSample], bound_bytes: float) -> Chart | None:
    if len(samples) < 2:
        return None
    memory = [(sample.second, sample.rss_bytes / _MIB) for sample in samples]
    bound = [(samples[0].second, bound_bytes / _MIB), (samples[-1].second, bound_bytes / _MIB)]
    ratio = [(sample.second, float(_row(sample)[2])) for sample in samples]
    return Chart(
        (
            Lines("Memory of the server", "seconds", "MiB", {"RSS": memory, "bound": bound}, marked=False),
            Lines("Hit ratio so far", "seconds", "share", {"hit ratio": ratio}, marked=False),
        )
    )

"""Does the server stay within its memory? Thousands of mixed requests against a small RAM tier."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from stockpot.bench.charts import Chart, Lines
from stockpot.bench.client import ChatMessage
from stockpot.bench.gather import run_all
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.results import Result, Table, Verdict
from stockpot.bench.statistics import slope
from stockpot.bench.stockpot_server import BOUND_FACTOR, Launch, StockpotServer, stockpot_server
from stockpot.bench.workload import WordSource

_MIB = 2**20
_GROWTH_SHARE_MAX = 0.01
"""RSS that moves by less than this over half a run is noise of the allocator."""
_SEED = 31
_SAMPLES = 200


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """`requests` by `users` at a time; the RAM tier is small, so that it is full for nearly the whole run."""

    requests: int = 10_000
    users: int = 8
    ram_bytes: int = 64 * _MIB
    context_tokens: int = 8192

    @classmethod
    def quick(cls) -> MemoryPlan:
        """Enough to see that everything works; says nothing about growth."""
        return cls(requests=200, ram_bytes=16 * _MIB)


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Resident memory after so many requests."""

    requests: int
    rss_bytes: int


async def measure_memory(
    plan: MemoryPlan, *, launch: Launch = stockpot_server, progress: BenchProgress = silent
) -> Result:
    """Run the requests and compare resident memory with the bound, and its second half with no growth."""
    idleness = measure_idleness()
    settings = {"cache": {"ram_bytes": plan.ram_bytes}, "engine": {"context_tokens": plan.context_tokens}}
    progress("start the server", 0, None)
    async with launch(settings) as server:
        progress("start the server", 1, 1)
        bound_bytes = await server.memory_bound_bytes()
        samples = await _play(server, plan, progress)
        peak_bytes = server.running.peak_rss_bytes()
    growth_bytes = growth_of_last_half(samples)
    last_bytes = samples[-1].rss_bytes
    return Result(
        name="memory",
        parameters=asdict(plan),
        tables=(
            Table(
                "Resident memory of the server",
                ("requests", "RSS MiB"),
                tuple((sample.requests, round(sample.rss_bytes / _MIB, 1)) for sample in samples),
            ),
        ),
        figures={
            "bound_bytes": bound_bytes,
            "peak_rss_bytes": peak_bytes,
            "last_rss_bytes": last_bytes,
            "growth_of_last_half_bytes": round(growth_bytes),
        },
        idleness=idleness,
        verdicts=(
            Verdict("peak RSS over the bound", peak_bytes / bound_bytes, 1.0),
            Verdict("growth over the last half, share of RSS", growth_bytes / last_bytes, _GROWTH_SHARE_MAX),
        ),
        notes=(
            f"The bound: {BOUND_FACTOR} x (weights + configured KV + RAM tier + 300 MB) = "
            f"{bound_bytes / _MIB:,.0f} MiB; peak {peak_bytes / _MIB:,.0f} MiB.",
        ),
        chart=_chart(samples, bound_bytes),
    )


def growth_of_last_half(samples: Sequence[MemorySample]) -> float:
    """Bytes by which the fitted line rises over the last half of the run; negative where it falls."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    per_request = slope([s.requests for s in half], [s.rss_bytes for s in half])
    return per_request * (half[-1].requests - half[0].requests)


async def _play(server: StockpotServer, plan: MemoryPlan, progress: BenchProgress) -> list[MemorySample]:
    """All requests, drawn from a few kinds; a sample of the memory every so many."""
    samples = [MemorySample(0, server.running.rss_bytes())]
    every = max(1, plan.requests // _SAMPLES)
    done, begun = 0, 0

    async def user(number: int) -> None:
        nonlocal done, begun
        requests = _Requests(server, seed=_SEED + number)
        while begun < plan.requests:
            begun += 1
            await requests.next()()
            done += 1
            if done % every == 0:
                samples.append(MemorySample(done, server.running.rss_bytes()))
                progress("requests", done, plan.requests)

    await run_all(user(number) for number in range(plan.users))
    return samples


class _Requests:
    """What one user asks: new questions, shared system prompts, long prompts, answers nobody waits for."""

    def __init__(self, server: StockpotServer, *, seed: int) -> None:
        self._client = server.client
        self._random = random.Random(seed)
        self._words = WordSource(seed)
        # The same few for all users.
        self._systems = [WordSource(_SEED + 100 + number).text(150) for number in range(4)]

    def next(self) -> Callable[[], Awaitable[None]]:
        """One of the kinds, the common ones more often."""
        kinds = (self._chat, self._chat, self._complete, self._long, self._leave)
        return self._random.choice(kinds)

    async def _chat(self) -> None:
        messages: list[ChatMessage] = [
            {"role": "system", "content": self._random.choice(self._systems)},
            {"role": "user", "content": self._words.text(self._random.randint(3, 30))},
        ]
        await self._client.chat(messages, max_tokens=self._random.randint(1, 12))

    async def _complete(self) -> None:
        await self._client.complete(self._words.text(self._random.randint(5, 40)), max_tokens=4)

    async def _long(self) -> None:
        await self._client.complete(self._words.text(self._random.randint(100, 250)), max_tokens=2)

    async def _leave(self) -> None:
        """A client that goes away after a moment, before its answer is whole."""
        request = self._client.complete(self._words.text(20), max_tokens=200)
        try:
            await asyncio.wait_for(request, self._random.uniform(0.005, 0.05))
        except TimeoutError:
            return


def _chart(samples: Sequence[MemorySample], bound_bytes: float) -> Chart:
    line = [(float(sample.requests), sample.rss_bytes / _MIB) for sample in samples]
    bound = [(line[0][0], bound_bytes / _MIB), (line[-1][0], bound_bytes / _MIB)]
    series = {"resident memory": line, "bound": bound}
    return Chart((Lines("Memory of the server", "requests", "MiB", series, marked=False),))

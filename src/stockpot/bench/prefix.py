"""One long system prompt for everybody: users at once, with the prefix cache and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from stockpot.bench.charts import Bars, Chart
from stockpot.bench.client import Answer, ChatMessage
from stockpot.bench.gather import run_all
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.results import Result, Table
from stockpot.bench.sizing import text_of_tokens
from stockpot.bench.statistics import Spread
from stockpot.bench.stockpot_server import Launch, StockpotServer, stockpot_server
from stockpot.bench.workload import WordSource

_MODES = {"on": True, "off": False}
_SEED = 23


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """Each of the users asks `questions` one after the other, all behind the same system prompt."""

    users: tuple[int, ...] = (1, 4, 16)
    system_tokens: int = 2000
    questions: int = 4
    question_words: int = 12
    answer_tokens: int = 24

    @classmethod
    def quick(cls) -> PrefixPlan:
        """Enough to see that everything works."""
        return cls(users=(1, 4), system_tokens=400, questions=2, answer_tokens=8)


@dataclass(frozen=True, slots=True)
class PrefixCell:
    """One number of users with the cache on or off. `hit_ratio` is the share of prompt tokens that was not
    computed; tokens/s are those of answers, all users together."""

    cache: str
    users: int
    hit_ratio: float
    ttft: Spread
    tokens_per_s: float


async def measure_prefix(
    plan: PrefixPlan, *, launch: Launch = stockpot_server, progress: BenchProgress = silent
) -> Result:
    """Two servers, cache on and off; on each all numbers of users, each with a system prompt of its own, so
    that every one begins cold."""
    idleness = measure_idleness()
    cells: list[PrefixCell] = []
    for mode, enabled in _MODES.items():
        progress(f"start the server (cache {mode})", 0, None)
        async with launch({"cache": {"enabled": enabled}}) as server:
            progress(f"start the server (cache {mode})", 1, 1)
            await server.client.chat([{"role": "user", "content": "Hello."}], max_tokens=4)
            cells += [await _measure(server, plan, mode, users, progress) for users in plan.users]
    columns = ("cache", "users", "hit ratio", "TTFT P50 ms", "TTFT P95 ms", "TTFT P99 ms", "tokens/s")
    return Result(
        name="prefix",
        parameters=asdict(plan),
        tables=(
            Table(
                f"A shared system prompt of {plan.system_tokens} tokens",
                columns,
                tuple(_row(cell) for cell in cells),
            ),
        ),
        figures={"cells": [asdict(cell) for cell in cells]},
        idleness=idleness,
        notes=("The first questions of each row find nothing cached: their prefill is in these figures.",),
        chart=_chart(cells, plan.users),
    )


async def _measure(
    server: StockpotServer, plan: PrefixPlan, mode: str, users: int, progress: BenchProgress
) -> PrefixCell:
    system = await _system_text(server, plan.system_tokens, seed=_SEED + users)
    label = f"{users} users (cache {mode})"
    total, done = users * plan.questions, 0

    async def ask_all(user: int) -> list[Answer]:
        nonlocal done
        source = WordSource(_SEED + 1000 * users + user)
        answers: list[Answer] = []
        for _ in range(plan.questions):
            question = source.text(plan.question_words)
            answers.append(
                await server.client.chat(_conversation(system, question), max_tokens=plan.answer_tokens)
            )
            done += 1
            progress(label, done, total)
        return answers

    start_s = time.perf_counter()
    answers = [answer for of_user in await run_all(map(ask_all, range(users))) for answer in of_user]
    wall_s = time.perf_counter() - start_s
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    return PrefixCell(
        cache=mode,
        users=users,
        hit_ratio=sum(answer.cached_tokens or 0 for answer in answers) / prompt_tokens
        if prompt_tokens
        else 0,
        ttft=Spread.of([answer.ttft_s for answer in answers]),
        tokens_per_s=sum(answer.completion_tokens for answer in answers) / wall_s,
    )


async def _system_text(server: StockpotServer, tokens: int, *, seed: int) -> str:
    """A system prompt of `tokens` tokens, counted without the template around it."""
    empty = len(await server.tokenize(_conversation("", "?")))

    async def count(text: str) -> int:
        return len(await server.tokenize(_conversation(text, "?"))) - empty

    return await text_of_tokens(tokens, count, seed=seed)


def _conversation(system: str, question: str) -> list[ChatMessage]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _row(cell: PrefixCell) -> tuple[str | int | float, ...]:
    times_ms = (round(s * 1e3, 1) for s in (cell.ttft.p50_s, cell.ttft.p95_s, cell.ttft.p99_s))
    return (cell.cache, cell.users, round(cell.hit_ratio, 4), *times_ms, round(cell.tokens_per_s, 1))


def _chart(cells: Sequence[PrefixCell], users: Sequence[int]) -> Chart:
    """Left: median TTFT by users (logarithmic: the two differ by more than a magnitude). Right: tokens/s."""
    names = tuple(str(number) for number in users)
    times: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for mode in _MODES:
        rows = [cell for cell in cells if cell.cache == mode]
        times[f"cache {mode}"] = [row.ttft.p50_s * 1e3 for row in rows]
        rates[f"cache {mode}"] = [row.tokens_per_s for row in rows]
    return Chart(
        (
            Bars("Time to first token, median", "users at once", "ms", names, times, logarithmic=True),
            Bars("Throughput", "users at once", "tokens/s", names, rates),
        )
    )

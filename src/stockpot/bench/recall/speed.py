"""How fast recall is, in one run: the same request again, a decision by meaning, and what a miss costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from stockpot.bench.charts import Bars, Chart
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.recall.exact_speed import ExactTimes, time_exact
from stockpot.bench.recall.miss_speed import MissTimes, time_misses
from stockpot.bench.recall.semantic_speed import DecisionTimes, time_decisions
from stockpot.bench.results import Cell, Result, Table, Verdict
from stockpot.bench.statistics import median, percentile
from stockpot.recall.vectors.embedder import Embedder
from stockpot.recall.vectors.index import VectorIndex

# Floors of the project.
_EXACT_P50_MS = 2.0
_DECISION_P50_MS = 8.0
_MISS_SHARE = 0.05
_MISS_WORDS = 12
"""As questions to services have: those of banking77 have 12 on the average. The floor is for these."""
_LONG_MISS_WORDS = 60


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """`exact_requests` of each kind in each round. `misses` 0: not measured (it needs a model)."""

    exact_rounds: int = 5
    exact_requests: int = 400
    entries: int = 100_000
    decisions: int = 1_000
    misses: int = 60

    @classmethod
    def quick(cls) -> SpeedPlan:
        """Enough to see that everything works."""
        return cls(exact_rounds=1, exact_requests=20, entries=2_000, decisions=50, misses=4)


async def measure_speed(
    plan: SpeedPlan, embedder: Embedder, index: VectorIndex, *, progress: BenchProgress = silent
) -> Result:
    """`embedder` and `index` are started, and the index is empty. Raises StockpotError."""
    idleness = measure_idleness()
    exact = await time_exact(plan.exact_rounds, plan.exact_requests, progress)
    decisions = await time_decisions(plan.entries, plan.decisions, embedder, index, progress)
    misses = {
        words: await time_misses(plan.misses, words, progress)
        for words in (_MISS_WORDS, _LONG_MISS_WORDS)
        if plan.misses
    }
    return Result(
        name="recall-speed",
        parameters=asdict(plan) | {"embedder": embedder.name},
        tables=_tables(exact, decisions, misses),
        figures={
            "exact": {name: _times(values) for name, values in asdict(exact).items()},
            "decisions": {name: _times(values) for name, values in asdict(decisions).items()},
            "misses": {words: asdict(times) for words, times in misses.items()},
        },
        idleness=idleness,
        verdicts=_verdicts(exact, decisions, misses),
        notes=_notes(plan, misses),
        chart=_chart(exact, decisions),
    )


def _tables(
    exact: ExactTimes, decisions: DecisionTimes, misses: Mapping[int, MissTimes]
) -> tuple[Table, ...]:
    columns = ("what", "P50 ms", "P95 ms", "P99 ms", "max ms", "count")
    over_http = (
        _row("provider asked directly", exact.direct_s),
        _row("not kept, so the provider was asked", exact.miss_s),
        _row("kept: whole answer", exact.hit_s),
        _row("kept: whole answer, by the server's own account", exact.server_s),
        _row("kept: as a stream, first byte", exact.first_s),
        _row("kept: as a stream, to its end", exact.streamed_s),
    )
    decided = (
        _row("decision", decisions.whole_s),
        _row("of it: embedding", decisions.embedding_s),
        _row("of it: search", decisions.search_s),
    )
    tables = [
        Table("The same request over HTTP, at the client", columns, over_http),
        Table("A decision about a new question", columns, decided),
    ]
    rows: list[tuple[Cell, ...]] = [
        (
            f"{what}, {words} words",
            1e3 * median(off),
            1e3 * median(on),
            100 * (median(on) / median(off) - 1),
            len(on),
        )
        for words, times in misses.items()
        for what, off, on in (
            ("first text", times.off_first_s, times.on_first_s),
            ("whole answer", times.off_total_s, times.on_total_s),
        )
    ]
    if rows:
        titles = ("until", "recall off, median ms", "recall on, median ms", "added %", "questions")
        tables.append(Table("A generation that had to be made", titles, tuple(rows)))
    return tuple(tables)


def _row(what: str, values_s: Sequence[float]) -> tuple[Cell, ...]:
    p50, p95, p99, most = _times(values_s).values()
    return what, p50, p95, p99, most, len(values_s)


def _times(values_s: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: round(1e3 * percentile(values_s, share), 4) for name, share in shares.items()}


def _verdicts(
    exact: ExactTimes, decisions: DecisionTimes, misses: Mapping[int, MissTimes]
) -> tuple[Verdict, ...]:
    verdicts = [
        Verdict("P50 of an exact hit at the client, ms", _times(exact.hit_s)["p50"], _EXACT_P50_MS),
        Verdict("P50 of a decision by meaning, ms", _times(decisions.whole_s)["p50"], _DECISION_P50_MS),
    ]
    if misses:
        times = misses[_MISS_WORDS]
        added = median(times.on_total_s) / median(times.off_total_s) - 1
        verdicts.append(Verdict("added to a generation by a miss, share", added, _MISS_SHARE))
        verdicts.append(
            Verdict("questions that were no misses", sum(each.hits for each in misses.values()), 0)
        )
    return tuple(verdicts)


def _notes(plan: SpeedPlan, misses: Mapping[int, MissTimes]) -> tuple[str, ...]:
    notes = [
        "Over HTTP: the client, the server and the provider are processes of their own and share the"
        " processors; key, limits, ledger and metrics are on.",
        f"Decision: {plan.entries:,} questions in one partition, in the store and index of the server; the"
        " question is new, so that nothing of it is known beforehand.",
    ]
    if misses:
        notes.append(
            "Misses: the same questions to two servers with the real model, in turn;"
            f" {sum(each.kept for each in misses.values())} of {len(misses) * plan.misses} answers were kept."
            f" The floor is for questions of {_MISS_WORDS} words and the instruction around them: the longer"
            " a question is, the longer it takes to embed it."
        )
    return tuple(notes)


def _chart(exact: ExactTimes, decisions: DecisionTimes) -> Chart:
    kinds = {"direct": exact.direct_s, "miss": exact.miss_s, "hit": exact.hit_s, "stream": exact.streamed_s}
    parts = {
        "decision": decisions.whole_s,
        "embedding": decisions.embedding_s,
        "search": decisions.search_s,
    }
    return Chart(
        (
            _bars("The same request over HTTP", kinds),
            _bars("A decision by meaning", parts),
        )
    )


def _bars(title: str, times: dict[str, list[float]]) -> Bars:
    return Bars(
        title,
        "",
        "ms",
        list(times),
        {name: [_times(each)[name] for each in times.values()] for name in ("p50", "p99")},
    )

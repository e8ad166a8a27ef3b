"""A labelled stream in random order: is the share of wrong answers kept, and how many are answered?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from stockpot.bench.charts import Chart, Lines
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.recall.labelled import LabelledTexts, embed_all
from stockpot.bench.recall.semantic_run import through_semantic
from stockpot.bench.recall.stream_worker import (
    Play,
    Played,
    best_static,
    order_of,
    play_shuffles,
    settings_for,
)
from stockpot.bench.recall.tally import Tally
from stockpot.bench.results import Cell, Result, Table, Verdict
from stockpot.bench.statistics import mean
from stockpot.recall.questions.question import read_question
from stockpot.recall.questions.refusals import refusal_of
from stockpot.recall.vectors.embedder import Embedder
from stockpot.settings_recall import Refusable

_OURS, _OURS_OF_ALL = "ours", "ours, error_of = requests"
_STATIC, _VCACHE = "static threshold, tuned in hindsight", "vCache's algorithm"
_KEPT_SHARE = 0.95
"""Of the shuffles; the bound is one of 95 % confidence."""
_OTHERWISE_MAX = 0.002
"""Of two kept questions with the same vector either may be the nearest."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """`requests` of each shuffle (None: all). `allow` are kinds of questions that are refused otherwise: the
    labels say that one answer is right for everybody who asks, whoever it is and whenever. `through`: that
    many requests of the first shuffle also go through the server's own classes."""

    shuffles: int = 20
    deltas: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)
    thresholds: tuple[float, ...] = tuple(round(0.80 + 0.01 * step, 2) for step in range(20))
    allow: tuple[Refusable, ...] = ("time", "personal", "creative")
    requests: int | None = None
    through: int = 4_000
    processes: int = 2

    @classmethod
    def quick(cls) -> StreamPlan:
        """Enough to see that everything works."""
        return cls(shuffles=2, deltas=(0.01, 0.05), thresholds=(0.85, 0.9, 0.95), requests=1_000, through=500)


async def measure_stream(
    plan: StreamPlan,
    texts: Sequence[str],
    labels: Sequence[str],
    embedder: Embedder,
    *,
    vectors_in: Path | None = None,
    progress: BenchProgress = silent,
) -> Result:
    """Play the texts; their vectors are kept in `vectors_in`. Raises StockpotError."""
    idleness = measure_idleness()
    data = LabelledTexts.of(texts, labels, await embed_all(texts, embedder, vectors_in, progress=progress))
    middle = plan.deltas[len(plan.deltas) // 2]
    play = Play(
        tuple(range(plan.shuffles)),
        plan.deltas,
        plan.thresholds,
        plan.allow,
        plan.requests,
        hits_of=(0, middle),
    )
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as folder:
        data.save(Path(folder))
        played = await play_shuffles(play, Path(folder), processes=plan.processes, progress=progress)
    disagreed = await _disagreements(plan, data, embedder, played[0], middle)
    readings = _readings(plan, played)
    return Result(
        name="recall-stream",
        parameters=asdict(plan) | {"embedder": embedder.name},
        tables=_tables(readings),
        figures={
            "texts": len(data),
            "labels": len(set(labels)),
            "refused_by_default": _refused(data),
            "readings": msgspec.to_builtins(readings),
            "thresholds": {str(at): _plain(played, place) for place, at in enumerate(plan.thresholds)},
            "decisions_other_than_the_servers": disagreed,
        },
        idleness=idleness,
        verdicts=_verdicts(plan, readings, disagreed),
        notes=_notes(plan, data),
        chart=_chart(readings),
    )


async def _disagreements(
    plan: StreamPlan, data: LabelledTexts, embedder: Embedder, played: Played, delta: float
) -> int:
    """How many of the first questions the server's own classes decide otherwise."""
    asked = order_of(played.shuffle, len(data), plan.requests)[: plan.through]
    settings = settings_for(delta, plan.allow)
    told = await through_semantic(data, asked, settings, embedder, played.shuffle)
    first = set(asked)
    fast = {hit for hit in played.ours[plan.deltas.index(delta)].hits if hit[0] in first}
    return len({number for number, _ in fast.symmetric_difference(told)})


class Reading(msgspec.Struct, frozen=True):
    """A policy at one delta, a tally for each shuffle. `running` is the largest error at any time."""

    policy: str
    delta: float
    tallies: list[Tally]
    running: list[float] = []

    def share(self, of: Callable[[Tally], float]) -> float:
        """Mean over the shuffles."""
        return mean([of(tally) for tally in self.tallies])

    def below(self, of: Callable[[Tally], float]) -> int:
        """Shuffles in which the error stayed below delta."""
        return sum(of(tally) <= self.delta for tally in self.tallies)


def _given(tally: Tally) -> float:
    return tally.error_of_given


def _all(tally: Tally) -> float:
    return tally.error_of_all


def _hits(tally: Tally) -> float:
    return tally.hit_share


def _readings(plan: StreamPlan, played: Sequence[Played]) -> list[Reading]:
    readings: list[Reading] = []
    for place, delta in enumerate(plan.deltas):
        ours = [each.ours[place] for each in played]
        loose = [each.ours_of_all[place] for each in played]
        theirs = [each.vcache[place] for each in played]
        static = [best_static(each.static, delta) or Tally() for each in played]
        readings += [
            Reading(_OURS, delta, [o.tally for o in ours], [o.running_error for o in ours]),
            Reading(_OURS_OF_ALL, delta, [o.tally for o in loose], [o.running_error for o in loose]),
            Reading(_STATIC, delta, static),
            Reading(_VCACHE, delta, [o.tally for o in theirs], [o.running_error for o in theirs]),
        ]
    return readings


def _tables(readings: Sequence[Reading]) -> tuple[Table, ...]:
    columns = (
        *("max_error %", "policy", "answered %", "wrong of given %", "most in a shuffle %"),
        *("shuffles below", "wrong of all %", "shuffles below, of all", "shuffles"),
    )
    rows: list[tuple[Cell, ...]] = []
    for each in readings:
        rows.append(
            (
                *(100 * each.delta, each.policy, 100 * each.share(_hits), 100 * each.share(_given)),
                *(100 * max(map(_given, each.tallies)), each.below(_given)),
                *(100 * each.share(_all), each.below(_all), len(each.tallies)),
            )
        )
    running = [
        (100 * each.delta, each.policy, 100 * mean(each.running), 100 * max(each.running))
        for each in readings
        if each.running
    ]
    return (
        Table("A labelled stream in random order", columns, tuple(rows)),
        Table(
            "The largest share of wrong answers at any time after 200 given",
            ("max_error %", "policy", "mean of shuffles %", "most %"),
            tuple(running),
        ),
    )


def _plain(played: Sequence[Played], place: int) -> list[float]:
    tallies = [each.static[place].tally for each in played]
    return [
        round(mean([tally.hit_share for tally in tallies]), 5),
        round(mean(list(map(_given, tallies))), 5),
    ]


def _refused(data: LabelledTexts) -> float:
    """Share of the questions that are not answered by meaning unless the operator allows their kind."""
    return sum(bool(refusal_of(read_question(text))) for text in data.texts) / len(data)


def _verdicts(plan: StreamPlan, readings: Sequence[Reading], disagreed: int) -> tuple[Verdict, ...]:
    ours = [each for each in readings if each.policy == _OURS]
    allowed = round((1 - _KEPT_SHARE) * plan.shuffles)
    verdicts = [
        Verdict(
            f"shuffles of {plan.shuffles} with more than {each.delta:.1%} wrong of those given",
            plan.shuffles - each.below(_given),
            allowed,
        )
        for each in ours
    ]
    verdicts += [
        Verdict(
            f"with error_of = requests, shuffles with more than {each.delta:.1%} wrong of all",
            plan.shuffles - each.below(_all),
            allowed,
        )
        for each in readings
        if each.policy == _OURS_OF_ALL
    ]
    asked = plan.through if plan.requests is None else min(plan.through, plan.requests)
    return (*verdicts, Verdict("decisions other than the server's, share", disagreed / asked, _OTHERWISE_MAX))


def _notes(plan: StreamPlan, data: LabelledTexts) -> tuple[str, ...]:
    return (
        "Wrong of given: wrong answers among those given from the cache, which is what max_error bounds; of"
        " all: among all requests, which is what vCache's delta bounds.",
        "The static threshold is the best of all that would have kept the bound, found when the stream was"
        " over, for each shuffle anew.",
        f"Allowed: {', '.join(plan.allow) or 'nothing'}. Without that {_refused(data):.0%} of these questions"
        " would not be answered by meaning at all: the labels say that one answer is right for all who ask.",
    )


def _chart(readings: Sequence[Reading]) -> Chart:
    worst: dict[str, list[tuple[float, float]]] = {}
    hits: dict[str, list[tuple[float, float]]] = {}
    for each in readings:
        worst.setdefault(each.policy, []).append((100 * each.delta, 100 * max(map(_given, each.tallies))))
        hits.setdefault(each.policy, []).append((100 * each.delta, 100 * each.share(_hits)))
    worst["what was accepted"] = [(x, x) for x, _ in worst[_OURS]]
    return Chart(
        (
            Lines("Wrong of given, worst shuffle", "max_error, %", "%", worst),
            Lines("Answered from the cache", "max_error, %", "%", hits),
        )
    )

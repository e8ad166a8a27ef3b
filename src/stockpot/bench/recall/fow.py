"""Traps: questions so alike that a cosine takes them for one, with different answers. What each cache does.

Each pair meets a cache that holds its first side alone. Ours is the server's own decision (`semantic_run`):
cold, as an operator gets it, with no evidence at all; and taught, where the evidence is one half of the
pairs and the other half is judged, then the other way round, and no text is in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from stockpot.bench.charts import Chart, Lines
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.recall.labelled import embed_all
from stockpot.bench.recall.other_caches import OtherCache, Vectors, last_similarity
from stockpot.bench.recall.pairs import KINDS, Kind, Pair, PairScore, folds, score
from stockpot.bench.recall.policies import SCOPE, digest_of, key_of
from stockpot.bench.recall.semantic_run import KnownVectors, SemanticRun
from stockpot.bench.results import Cell, Result, Table, Verdict
from stockpot.recall.evidence.evidence import Evidence, Observation
from stockpot.recall.semantic import LookUp
from stockpot.recall.vectors.embedder import Embedder
from stockpot.settings_recall import SemanticSettings

_COSINES = tuple(np.round(np.arange(0.5, 1.0001, 0.01), 2).tolist())
_SHOWN_COSINES = (0.8, 0.9, 0.95, 0.99)
_ERROR_UPPER_MAX = 0.01
_KEPT = b"kept".ljust(32)

# How ours was asked, as tables name it.
_COLD = "ours"
_COLD_EMBEDDED = "ours, chats by meaning"
_TAUGHT = "ours, taught"


@dataclass(frozen=True, slots=True)
class FowPlan:
    """`max_error` is the setting of the claims, `deltas` those of the curve."""

    max_error: float = 0.01
    deltas: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)

    @classmethod
    def quick(cls) -> FowPlan:
        """Enough to see that everything works."""
        return cls(deltas=(0.01, 0.1))


Scores = Mapping[Kind, PairScore]


async def measure_fow(
    plan: FowPlan,
    pairs: Sequence[Pair],
    embedder: Embedder,
    others: Sequence[OtherCache] = (),
    *,
    progress: BenchProgress = silent,
) -> Result:
    """Ask ours and `others`, which are prepared, about all pairs. Raises StockpotError."""
    idleness = measure_idleness()
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.texts()))
    rows = await embed_all(texts, embedder, progress=progress)
    vectors: Vectors = dict(zip(texts, rows, strict=True))
    known = KnownVectors(embedder, vectors)
    exact = SemanticSettings(mode="on", max_error=plan.max_error)
    embedded = exact.model_copy(update={"conversations": "embedded"})

    cold = await _cold(pairs, exact, known)
    by_meaning = await _cold(pairs, embedded, known)
    scores = {
        _COLD: _scores(pairs, _is_hit(cold)),
        _COLD_EMBEDDED: _scores(pairs, _is_hit(by_meaning)),
    }
    curve: list[tuple[float, Scores]] = []
    for delta in plan.deltas:
        settings = embedded.model_copy(update={"max_error": delta})
        curve.append((delta, _scores(pairs, await _taught(pairs, settings, known))))
        progress("ours, by delta", len(curve), len(plan.deltas))
    for other in others:
        answers = dict(zip((p.id for p in pairs), other.answers(pairs, vectors, progress), strict=True))
        scores[other.name] = _scores(pairs, lambda pair, by=answers: by[pair.id])
    cosines = [(cosine, _scores(pairs, _above(cosine, vectors))) for cosine in _COSINES]
    return Result(
        name="recall-fow",
        parameters=asdict(plan) | {"embedder": embedder.name},
        tables=_tables(pairs, scores, cosines, curve, cold),
        figures={
            "pairs": {kind: sum(pair.kind == kind for pair in pairs) for kind in KINDS},
            "others": {other.name: dict(other.facts()) for other in others},
            "scores": {name: _plain(each) for name, each in scores.items()},
            "cosine": [[cosine, _plain(each)] for cosine, each in cosines],
            "taught": [[delta, _plain(each)] for delta, each in curve],
        },
        idleness=idleness,
        verdicts=_verdicts(scores[_COLD]),
        notes=_notes(others),
        chart=_chart(scores, cosines, curve),
    )


async def _cold(pairs: Sequence[Pair], settings: SemanticSettings, known: KnownVectors) -> dict[str, LookUp]:
    return {pair.id: await _asked(pair, settings, known, Evidence(settings)) for pair in pairs}


def _is_hit(found: Mapping[str, LookUp]) -> Callable[[Pair], bool]:
    return lambda pair: found[pair.id].hit is not None


async def _taught(
    pairs: Sequence[Pair], settings: SemanticSettings, known: KnownVectors
) -> Callable[[Pair], bool]:
    """Each kind by itself: the evidence of a tenant who asks questions, or has conversations."""
    given: set[str] = set()
    for kind in KINDS:
        halves = folds([pair for pair in pairs if pair.kind == kind])
        for judged, teaching in (halves, halves[::-1]):
            evidence = Evidence(settings)
            for number, pair in enumerate(teaching):
                look_up = await _asked(pair, settings, known, Evidence(settings))
                near = look_up.hit or look_up.best
                if near is not None and not near.likeness.conflict:
                    # As of an entry that is not seen again: what is learnt is of the pooled evidence.
                    noted = Observation(
                        at=0.0,
                        scope=SCOPE,
                        entry=key_of(number),
                        question=digest_of(pair.id),
                        likeness=near.likeness,
                        same=pair.same,
                        source="explored",
                        support=near.judgement.support,
                    )
                    evidence.learn(noted)
            for pair in judged:
                if (await _asked(pair, settings, known, evidence)).hit is not None:
                    given.add(pair.id)
    return lambda pair: pair.id in given


async def _asked(pair: Pair, settings: SemanticSettings, known: KnownVectors, evidence: Evidence) -> LookUp:
    """What is found for the second side in a cache that holds the first."""
    run = SemanticRun(settings, known, evidence)
    run.keep(await run.ask(pair.kept), _KEPT)
    await run.settled()
    return await run.ask(pair.asked)


def _scores(pairs: Sequence[Pair], given: Callable[[Pair], bool]) -> Scores:
    return {kind: score([pair for pair in pairs if pair.kind == kind], given) for kind in KINDS}


def _above(cosine: float, vectors: Vectors) -> Callable[[Pair], bool]:
    return lambda pair: last_similarity(pair, vectors) >= cosine


def _plain(scores: Scores) -> dict[str, dict[str, float]]:
    return {kind: asdict(each) | {"error_upper": round(each.error_upper, 5)} for kind, each in scores.items()}


def _tables(
    pairs: Sequence[Pair],
    scores: Mapping[str, Scores],
    cosines: Sequence[tuple[float, Scores]],
    curve: Sequence[tuple[float, Scores]],
    cold: Mapping[str, LookUp],
) -> tuple[Table, ...]:
    columns = ("answered", "of", "wrong on traps", "of traps", "wrong %", "95% upper %")
    rows: list[tuple[Cell, ...]] = []
    thresholds = [(f"cosine >= {at:g}, last message", each) for at, each in cosines if at in _SHOWN_COSINES]
    for kind in KINDS:
        rows += [(kind, name, *_cells(each[kind])) for name, each in (*scores.items(), *thresholds)]
    by_delta = [
        (kind, delta, *_cells(each[kind])) for kind in KINDS for delta, each in curve if each[kind].pairs
    ]
    reasons = Counter((pair.kind, pair.category, pair.same, _reason(cold[pair.id])) for pair in pairs)
    decided = [
        (kind, category, "same" if same else "different", reason, count)
        for (kind, category, same, reason), count in sorted(reasons.items())
    ]
    return (
        Table("Pairs answered from the cache", ("pairs", "cache", *columns), tuple(rows)),
        Table(f"{_TAUGHT}, by max_error", ("pairs", "max_error", *columns), tuple(by_delta)),
        Table(f"{_COLD}: why", ("pairs", "category", "answer", "decided by", "count"), tuple(decided)),
    )


def _reason(found: LookUp) -> str:
    """What decided, in a word; of a conflict also which."""
    if found.hit is not None:
        return f"answered: {found.reason}"
    conflict = "" if found.best is None else found.best.likeness.conflict
    return f"{found.reason}: {conflict}" if conflict else found.reason


def _cells(each: PairScore) -> tuple[Cell, ...]:
    wrong = (100 * each.error_share, 100 * each.error_upper) if each.traps else (None, None)
    return each.hits, each.pairs, each.errors, each.traps, *wrong


def _verdicts(cold: Scores) -> tuple[Verdict, ...]:
    questions, conversations = cold["questions"], cold["conversations"]
    return (
        Verdict("wrong on traps, 95 % upper bound", questions.error_upper, _ERROR_UPPER_MAX),
        Verdict("wrong on traps of conversations", conversations.errors, 0),
    )


def _notes(others: Sequence[OtherCache]) -> tuple[str, ...]:
    told = [
        "Bounds are those of Clopper and Pearson, one-sided. Ours has no evidence unless it is taught; other"
        " caches are as they come.",
        "Taught: half of the pairs are traps, more than any stream of real questions has; the curve shows"
        " what the evidence of one half lets through of the other.",
    ]
    told += [f"{other.name}: {'; '.join(f'{k} {v}' for k, v in other.facts().items())}." for other in others]
    return tuple(told)


def _chart(
    scores: Mapping[str, Scores],
    cosines: Sequence[tuple[float, Scores]],
    curve: Sequence[tuple[float, Scores]],
) -> Chart:
    panels: list[Lines] = []
    for kind in KINDS:
        series = {"cosine threshold": _points([each[kind] for _, each in cosines])}
        series[_TAUGHT] = sorted(_points([each[kind] for _, each in curve]))
        series |= {name: _points([each[kind]]) for name, each in scores.items()}
        panels.append(
            Lines(f"fow-cache, {kind}", "traps answered wrongly, %", "should-hits answered, %", series)
        )
    return Chart(tuple(panels))


def _points(scores: Sequence[PairScore]) -> list[tuple[float, float]]:
    return [(100 * each.error_share, 100 * each.hit_share) for each in scores]

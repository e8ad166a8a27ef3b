"""The fit of a calibration: from observations to cells of candidates, the safest first. May run in a thread.

A logistic regression over all entries puts candidates in an order. Along that order they are counted in
cells, whose rates of wrong answers are made monotone by pooling (isotonic regression, Ayer et al. 1955).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stockpot.recall.evidence.support import FEATURES

_CELL_MIN = 30
_CELL_GROWTH = 1.2
_SAME_SCORE = 1e-9
"""Sums in another order differ by less."""
_EVIDENCE_MIN = 60
"""Observations before anything is fitted."""
_ENTRY_WEIGHT = 5.0
"""What one writer's observations of one entry weigh at most, together, as evidence for it."""
_WRITER_WEIGHT = 500.0
"""What one writer's weigh at most where there are others, or as much as all others' if that is more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Observations, a row each; nobody writes to them any more. `start` are the weights fitted last."""

    features: NDArray[np.float64]
    wrong: NDArray[np.bool_]
    stands_for: NDArray[np.float64]
    entry_and_writer: NDArray[np.int64]
    writer: NDArray[np.int64]
    start: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """Candidates that follow each other in the order, up to the score `end`: how many were seen and wrong
    (weighed), how many requests they stand for (`asked`), and, of the block they were pooled in, its number,
    its rate of wrong ones with Jeffreys' half an error more, and how many were seen there."""

    end: float
    seen: float
    wrong: float
    asked: float
    block: int
    rate: float
    of: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """`weights` make the score of a candidate, the log odds of its being wrong; `cells` is empty where the
    observations say nothing."""

    weights: tuple[float, ...] = ()
    cells: tuple[Cell, ...] = ()


def fit(sample: Sample) -> Fitted:
    """About a millisecond per thousand observations, in a thread as anywhere. Without enough of them, or
    without a right one, there is nothing to go by."""
    if len(sample.wrong) < _EVIDENCE_MIN or sample.wrong.all():
        return Fitted()
    weight = _weighed(sample)
    weights = _logistic(sample.features, sample.wrong.astype(np.float64), weight, sample.start)
    cells = _counted(sample.features @ weights, sample.wrong, weight, sample.stands_for)
    return Fitted(tuple(weights.tolist()), cells)


def _weighed(sample: Sample) -> NDArray[np.float64]:
    """What each observation weighs: one that speaks against an answer wholly, those that speak for one
    within the bounds of its entry and writer. So a flood can make the cache give less, never more."""
    weight = np.ones(len(sample.wrong))
    right = ~sample.wrong
    _, kind = np.unique(sample.entry_and_writer[right], return_inverse=True)
    ours = np.minimum(1.0, _ENTRY_WEIGHT / np.maximum(np.bincount(kind), 1))[kind]
    _, writer = np.unique(sample.writer[right], return_inverse=True)
    total = np.bincount(writer, ours)
    if len(total) > 1:
        allowed = np.maximum(_WRITER_WEIGHT, total.sum() - total)
        ours *= np.minimum(1.0, allowed / np.maximum(total, 1e-9))[writer]
    weight[right] = ours
    return weight


def _logistic(
    features: NDArray[np.float64],
    wrong: NDArray[np.float64],
    weight: NDArray[np.float64],
    start: Sequence[float],
) -> NDArray[np.float64]:
    """The weights that give the log odds of being wrong: the mode under a standard normal prior on all but
    the constant, by Newton's method. They only make an order, so a step that did not converge costs hits
    alone."""
    prior = np.ones(FEATURES)
    prior[0] = 1e-3
    fitted = np.array(start) if start else np.zeros(FEATURES)
    for _ in range(12):
        chance = 1 / (1 + np.exp(-np.clip(features @ fitted, -30, 30)))
        slope = features.T @ (weight * (chance - wrong)) + prior * fitted
        bend = (features.T * (weight * (chance * (1 - chance) + 1e-9))) @ features + np.diag(prior)
        step = np.linalg.solve(bend, slope)
        length = float(np.abs(step).max())
        fitted -= step * min(1.0, 5.0 / max(length, 1e-9))
        if length < 1e-4:
            break
    return fitted


def _counted(
    scores: NDArray[np.float64],
    wrong: NDArray[np.bool_],
    weight: NDArray[np.float64],
    stands_for: NDArray[np.float64],
) -> tuple[Cell, ...]:
    order = np.argsort(scores, kind="stable")
    weight = weight[order]
    columns = [np.cumsum(each) for each in (weight, weight * wrong[order], weight * stands_for[order])]
    ends = _ends(columns[0], scores[order])
    counts = np.stack([np.diff(each[ends], prepend=0.0) for each in columns], axis=1).tolist()
    rates, blocks = _monotone(counts)
    return tuple(
        Cell(float(scores[order[end]]) + _SAME_SCORE, seen, wrongs, asks, block, *rates[block])
        for end, (seen, wrongs, asks), block in zip(ends, counts, blocks, strict=True)
    )


def _ends(seen: NDArray[np.float64], scores: NDArray[np.float64]) -> list[int]:
    """The last row of each cell: cells end at weights that grow by a fifth, so that there are few, and hold
    all that have the same score, for no threshold parts those."""
    ends: list[int] = []
    goal = float(_CELL_MIN)
    while goal < seen[-1]:
        at = int(np.searchsorted(seen, goal))
        same = float(scores[at]) + _SAME_SCORE
        end = int(np.searchsorted(scores, same, side="right")) - 1
        if not ends or end > ends[-1]:
            ends.append(end)
        goal = math.floor(max(goal, float(seen[end])) * _CELL_GROWTH) + 1
    if not ends or ends[-1] != len(seen) - 1:
        ends.append(len(seen) - 1)
    return ends


def _monotone(counts: Sequence[Sequence[float]]) -> tuple[list[tuple[float, float]], list[int]]:
    """Neighbouring cells pooled until no safer block has a higher rate (pool adjacent violators). Each
    block's rate with what was seen in it, and each cell's block."""
    pooled: list[list[float]] = []
    for seen, wrong, _ in counts:
        pooled.append([wrong, seen, 1])
        while len(pooled) > 1 and pooled[-2][0] * pooled[-1][1] >= pooled[-1][0] * pooled[-2][1]:
            last = pooled.pop()
            pooled[-1] = [mine + its for mine, its in zip(pooled[-1], last, strict=True)]
    rates = [((wrong + 0.5) / (seen + 0.5), seen) for wrong, seen, _ in pooled]
    blocks = [block for block, (_, _, count) in enumerate(pooled) for _ in range(int(count))]
    return rates, blocks

"""From what was seen of one scope's answers: how likely a candidate's is wrong, with a bound that holds.

A logistic regression over all entries puts candidates in an order, the safest first (`fitting`). What is
believed does not rest on it: along that order the wrong ones are counted, and the bound is on the counts.

- What counts for a threshold is the mean rate of all that would be given above it. The cells are weighted
  with how often requests fall there: an audited answer stands for all that were given and not audited
  (Horvitz and Thompson 1952).
- The share of wrong ones is to stay within the bound over the next `HORIZON` requests. A threshold that gives
  to few of them has to be the safer: of a hundred answers even one wrong is too many where half a percent is
  accepted. The bound is the quantile of how many are wrong among so many answers, given what is known of the
  mean rate (a gamma distribution with its mean and variance; the number of wrong ones then is negative
  binomial), and never below the quantile of the mean rate itself.
- The lowest threshold that passes is taken, anew with each fit, and each is a chance to be lucky: the chance
  of error is divided by `_CHOICES` (after "learn then test", Angelopoulos et al. 2021). Thresholds are nested
  and most of the evidence of one fit is that of the next, so that their tests go together: counted are a few
  for each doubling of the evidence.

Assumed is that, given the order, what is asked next is like what was seen of late: the oldest evidence
leaves. That the labels are only seen where an answer was generated does no harm, because whether one was is
decided by the same features. What breaks the assumption shows in audits; `budget.Budget` answers for that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stockpot.recall.evidence.bounds import count_upper, gamma_upper, normal_quantile
from stockpot.recall.evidence.fitting import Cell, Fitted, Sample, fit
from stockpot.recall.evidence.support import FEATURES

_CHOICES = 20
"""By which the chance of error is divided, for choosing a threshold time and again."""
HORIZON = 10_000
"""Requests looked up over which the share of wrong ones is to stay within the bound."""
_REFIT_FIRST = 60
_REFIT_MIN = 50
_REFIT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Terms:
    """What a bound is asked to be: with which confidence, and (`of_requests`) as a share of all requests
    looked up instead of those given an answer."""

    confidence: float
    of_requests: bool = False

    @property
    def z(self) -> float:
        """The standard normal's quantile at the confidence."""
        return normal_quantile(self.confidence)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Candidates of one cell: how many were seen (weighed), the rate of wrong ones fitted there, and the
    upper bound of what counts from the safest down to here (see `Terms`)."""

    seen: float
    wrong: float
    error: float
    error_upper: float


class Calibration:
    """Of one scope. `capacity` observations are kept; the oldest leave. Not thread-safe; only `fitting.fit`,
    between `sample` and `install`, may run elsewhere."""

    def __init__(self, capacity: int, terms: Terms) -> None:
        self._capacity = capacity
        self._terms = terms
        size = min(capacity, 64)
        self._features = np.zeros((size, FEATURES))
        self._wrong = np.zeros(size, np.bool_)
        self._stands_for = np.zeros(size)
        self._entry_and_writer = np.zeros(size, np.int64)
        self._writer = np.zeros(size, np.int64)
        self._pairs: OrderedDict[tuple[bytes, bytes], int] = OrderedDict()
        self._added = 0
        self._refit_at = _REFIT_FIRST
        self._fitted = Fitted()
        self._comparable = 1.0
        self._ends: list[float] = []
        self._uppers: list[float] = []
        self._best_uppers: list[float] = []

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def curve(self) -> Sequence[CurvePoint]:
        """From the safest candidates to the others; empty before there is evidence enough."""
        return tuple(
            CurvePoint(cell.seen, cell.wrong, cell.rate, upper)
            for cell, upper in zip(self._fitted.cells, self._uppers, strict=True)
        )

    def take(self, terms: Terms) -> None:
        """From now on by these. Quick where they are the same."""
        if terms != self._terms:
            self._terms = terms
            self._bound()

    def seen(self, entry: bytes, question: bytes) -> bool | None:
        """Whether that pair's answer was right; None: not seen."""
        row = self._pairs.get((entry, question))
        return None if row is None else not bool(self._wrong[row])

    def add(
        self,
        features: Sequence[float],
        entry: bytes,
        question: bytes,
        writer: str,
        *,
        wrong: bool,
        stands_for: float,
    ) -> None:
        """One pair, seen for the first time. `stands_for` is how many such requests it represents."""
        row = len(self._pairs)
        if row >= self._capacity:
            _, row = self._pairs.popitem(last=False)
        elif row == len(self._wrong):
            self._grow()
        self._pairs[entry, question] = row
        self._features[row] = features
        self._wrong[row] = wrong
        self._stands_for[row] = stands_for
        self._entry_and_writer[row] = hash((entry, writer))
        self._writer[row] = hash(writer)
        self._added += 1

    def correct(self, entry: bytes, question: bytes) -> None:
        """That pair's answer was taken to be right, and is wrong."""
        self._wrong[self._pairs[entry, question]] = True

    def estimate(self, features: Sequence[float]) -> tuple[float, float] | None:
        """The estimated chance that a candidate's answer is wrong, and the upper bound of what counts where
        all candidates that are as safe or safer are given; None without evidence."""
        if not self._ends:
            return None
        score = sum(weight * feature for weight, feature in zip(self._fitted.weights, features, strict=True))
        at = bisect_left(self._ends, score)
        if at == len(self._ends):
            return 1.0, 1.0
        return self._fitted.cells[at].rate, self._best_uppers[at]

    @property
    def refit_is_due(self) -> bool:
        """Whether enough was added since the last one."""
        return self._added >= self._refit_at

    def sample(self) -> Sample:
        """What there is, copied, for `fitting.fit`. What comes later waits for the next one."""
        count = len(self._pairs)
        self._refit_at = self._added + max(_REFIT_MIN, int(count * _REFIT_SHARE))
        return Sample(
            features=self._features[:count].copy(),
            wrong=self._wrong[:count].copy(),
            stands_for=self._stands_for[:count].copy(),
            entry_and_writer=self._entry_and_writer[:count].copy(),
            writer=self._writer[:count].copy(),
            start=self._fitted.weights,
        )

    def install(self, fitted: Fitted, comparable: float) -> None:
        """From now on by this fit. `comparable` is the share of the requests looked up that had a candidate
        to compare with: only of those is there evidence."""
        self._fitted = fitted
        self._comparable = comparable
        self._bound()

    def refit(self, comparable: float = 1.0) -> None:
        """At once, and here."""
        self.install(fit(self.sample()), comparable)

    def _bound(self) -> None:
        """The bound for a threshold at the end of each cell."""
        cells = self._fitted.cells
        z = normal_quantile(1 - (1 - self._terms.confidence) / _CHOICES)
        every = sum(cell.asked for cell in cells)
        asked_in: dict[int, float] = {}
        of_block: dict[int, Cell] = {}
        total, uppers = 0.0, list[float]()
        for cell in cells:
            of_block[cell.block] = cell
            asked_in[cell.block] = asked_in.get(cell.block, 0.0) + cell.asked
            total += cell.asked
            mean = variance = 0.0
            for block, asked in asked_in.items():
                part, rate = asked / total, of_block[block].rate
                mean += part * rate
                variance += part * part * rate * (1 - rate) / (of_block[block].of + 1)
            given = total / every * self._comparable
            uppers.append(self._upper(mean, variance, given, z))
        self._uppers = uppers
        self._ends = [cell.end for cell in cells]
        best, at_best = 1.0, [1.0] * len(cells)
        for at in range(len(cells) - 1, -1, -1):
            best = at_best[at] = min(best, uppers[at])
        self._best_uppers = at_best

    def _upper(self, mean: float, variance: float, given: float, z: float) -> float:
        """Of what counts, where the share `given` of the requests gets an answer that is wrong with a chance
        known by its mean and variance."""
        answers = HORIZON * given
        upper = max(
            gamma_upper(mean, variance, z), count_upper(mean, variance, answers, self._terms.z) / answers
        )
        return min(1.0, upper * given if self._terms.of_requests else upper)

    def _grow(self) -> None:
        size = min(self._capacity, 2 * len(self._wrong))
        more = size - len(self._wrong)
        self._features = np.concatenate([self._features, np.zeros((more, FEATURES))])
        self._wrong = np.concatenate([self._wrong, np.zeros(more, np.bool_)])
        self._stands_for = np.concatenate([self._stands_for, np.zeros(more)])
        self._entry_and_writer = np.concatenate([self._entry_and_writer, np.zeros(more, np.int64)])
        self._writer = np.concatenate([self._writer, np.zeros(more, np.int64)])

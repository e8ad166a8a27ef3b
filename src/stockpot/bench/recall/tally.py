"""Counts of right and wrong answers, and the bound that goes with few of them."""

from __future__ import annotations

from dataclasses import dataclass

from stockpot.recall.evidence.bounds import clopper_pearson


@dataclass(frozen=True, slots=True)
class Tally:
    """`given` answers for `asked` questions, of which `wrong` were wrong."""

    asked: int = 0
    given: int = 0
    wrong: int = 0

    @property
    def hit_share(self) -> float:
        return self.given / max(1, self.asked)

    @property
    def error_of_given(self) -> float:
        return self.wrong / max(1, self.given)

    @property
    def error_of_all(self) -> float:
        return self.wrong / max(1, self.asked)


def upper_bound(events: int, trials: int, confidence: float = 0.95) -> float:
    """The one-sided bound of a share of which `events` in `trials` were seen: an interval's upper end, with
    both tails' probability in one."""
    return clopper_pearson(events, trials, 2 * confidence - 1)[1]

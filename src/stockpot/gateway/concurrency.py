"""How many requests one backend is given at once: found by what it can bear, below what the operator allows.

Additive increase and multiplicative decrease (Chiu and Jain 1989, "Analysis of the increase and decrease
algorithms for congestion avoidance in computer networks"). The limit begins at the operator's maximum. It is
cut when the backend says it is overloaded, or when its answers come later than they use to: the short average
of the time per unit of work is above twice the long one, as in the gradient limits of Netflix's
concurrency-limits, and by more than a second, because engines that batch are meant to be slower under load.
It grows by the square root of itself for each round of answers, but only while at least half of it is used.
"""

from __future__ import annotations

from stockpot.clock import Clock

FLOOR = 4
"""A backend is never given less, unless its maximum is less."""

_OVERLOADED = 0.7
_TOLERANCE = 2.0
_SLACK_S = 1.0
_CUT_AT_MOST_EVERY_S = 1.0
_SHORT = 0.1
_LONG = 0.005


class Drift:
    """A short and a long exponential average of one quantity; the long one forgets a past that is over."""

    def __init__(self) -> None:
        self.short = self.long = 0.0
        self._samples = 0

    def add(self, value: float) -> None:
        self._samples += 1
        # Until enough has been seen both are plain means: one early value must not weigh for hundreds.
        weight = 1 / self._samples
        self.short += (value - self.short) * max(weight, _SHORT)
        self.long += (value - self.long) * max(weight, _LONG)
        if self.long > _TOLERANCE * self.short:
            self.long *= 0.95

    @property
    def excess(self) -> float:
        """How many times the tolerated value the short average is; at most 1: nothing is wrong."""
        return self.short / (_TOLERANCE * self.long + _SLACK_S)


class AdaptiveLimit:
    """A number of requests between FLOOR and `maximum`. On the event loop only."""

    def __init__(self, clock: Clock, maximum: int) -> None:
        self._clock = clock
        self._value = float(maximum)
        self._maximum = maximum
        self._cut_s = float("-inf")

    @property
    def value(self) -> int:
        return int(self._value)

    @property
    def maximum(self) -> int:
        return self._maximum

    @maximum.setter
    def maximum(self, maximum: int) -> None:
        # A limit that stood at its maximum has not been cut: it moves along.
        whole = self._value >= self._maximum
        self._maximum = maximum
        self._value = float(maximum) if whole else self._bounded(self._value)

    def answered(self, drift: Drift, in_flight: int) -> None:
        """An answer came while `in_flight` requests, it included, were there."""
        if drift.excess > 1:
            self._cut(max(_OVERLOADED, 1 / drift.excess))
        elif in_flight >= self._value / 2:
            self._value = self._bounded(self._value + self._value**-0.5)

    def overloaded(self) -> None:
        """The backend refused a request because it has too many."""
        self._cut(_OVERLOADED)

    def _cut(self, factor: float) -> None:
        # The answers to what is in flight all tell of the same moment: they are one reason, not many.
        now_s = self._clock.monotonic()
        if now_s - self._cut_s >= _CUT_AT_MOST_EVERY_S:
            self._cut_s = now_s
            self._value = self._bounded(self._value * factor)

    def _bounded(self, value: float) -> float:
        return min(max(value, float(FLOOR)), float(self._maximum))

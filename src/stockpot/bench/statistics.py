"""The few statistics the benchmarks use, each defined for at least one value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed (nearest rank).

    Nearest rank never reports a time nobody waited. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("a percentile of no values")
    if not 0 <= share <= 1:
        raise ValueError(f"a share between 0 and 1, not {share}")
    ordered = sorted(values)
    # 0.07 * 100 is a little more than 7 in floating point, and the rank is still 7.
    rank = math.ceil(round(share * len(ordered), 9))
    return ordered[max(0, rank - 1)]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean. Raises ValueError for no values."""
    if not values:
        raise ValueError("a mean of no values")
    return math.fsum(values) / len(values)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle. Raises ValueError for no values."""
    if not values:
        raise ValueError("a median of no values")
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of the least-squares line through the points; 0 where all x are equal.

    Raises ValueError for no points or lengths that differ.
    """
    if len(xs) != len(ys):
        raise ValueError(f"{len(xs)} x and {len(ys)} y")
    center_x, center_y = mean(xs), mean(ys)
    spread = math.fsum((x - center_x) ** 2 for x in xs)
    if spread == 0:
        return 0.0
    return math.fsum((x - center_x) * (y - center_y) for x, y in zip(xs, ys, strict=True)) / spread


@dataclass(frozen=True, slots=True)
class Spread:
    """A set of times in one line, seconds."""

    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float

    @classmethod
    def of(cls, values_s: Sequence[float]) -> Spread:
        """Summarise. Raises ValueError for no values."""
        return cls(
            mean(values_s), percentile(values_s, 0.5), percentile(values_s, 0.95), percentile(values_s, 0.99)
        )

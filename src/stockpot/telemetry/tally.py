"""Numbers that are written on a hot path and read at a scrape.

Each is written by one thread at a time, so nothing is locked; a scrape in the middle of a write may see a
count without its sum, which the next scrape puts right. prometheus_client's own histograms lock and look up
labels for every value: several microseconds a step for each stream in the batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts of values at most as large as each bound, and their sum. Bounds ascend."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self._counts)

    @property
    def sum(self) -> float:
        """All values added up."""
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, the last `+Inf`, as Prometheus wants them."""
        cumulative = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            cumulative += count
            buckets.append((bound, float(cumulative)))
        return buckets


class Histograms:
    """One histogram for each label, all with the same bounds; beyond `limit` labels, the rest is `other`."""

    __slots__ = ("_bounds", "_by_label", "_limit")

    def __init__(self, bounds: Sequence[float], limit: int = 64) -> None:
        self._bounds = tuple(bounds)
        self._limit = limit
        self._by_label: dict[str, Histogram] = {}

    def observe(self, label: str, value: float) -> None:
        """Count one value."""
        known = self._by_label.get(label)
        if known is None:
            label = label if len(self._by_label) < self._limit else "other"
            known = self._by_label.setdefault(label, Histogram(self._bounds))
        known.observe(value)

    def labelled(self) -> list[tuple[tuple[str, ...], Histogram]]:
        """All of them, for a reader on another thread."""
        return [((label,), tally) for label, tally in self._by_label.copy().items()]


class Counts:
    """Totals by label values. Beyond `limit` combinations everything new is counted as `other`: labels come
    from codes in the program, and the bound holds even where one of them turns out to come from outside."""

    __slots__ = ("_limit", "_totals")

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._totals: dict[tuple[str, ...], float] = {}

    def add(self, *labels: str, by: float = 1) -> None:
        """Add to the total of these label values."""
        if labels not in self._totals and len(self._totals) >= self._limit:
            labels = ("other",) * len(labels)
        self._totals[labels] = self._totals.get(labels, 0) + by

    def totals(self) -> list[tuple[tuple[str, ...], float]]:
        """A copy, for a reader on another thread."""
        return list(self._totals.copy().items())

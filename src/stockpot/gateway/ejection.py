"""Outlier ejection: a backend much slower than those beside it, or failing much more, rests for a while.

As in Envoy's outlier detection: compared are the backends of one model, at most half of them are out at a
time, and never the last. One that returns is judged anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

_SAMPLES_MIN = 10
_WEIGHT = 0.1
_FAILURES_MIN = 0.5
_SLOWER_BY_S = 0.1


class _Mean:
    """An exponential mean; None until enough was seen."""

    def __init__(self) -> None:
        self._value = 0.0
        self._samples = 0

    def add(self, value: float) -> None:
        self._samples += 1
        self._value += (value - self._value) * max(1 / self._samples, _WEIGHT)

    @property
    def value(self) -> float | None:
        return self._value if self._samples >= _SAMPLES_MIN else None


class Standing:
    """How one backend does on one model, as far as its peers are measured in the same way.

    `first_s` is time to first token for a unit of work of a streamed answer, `whole_s` that of answers that
    come in one piece, `failures` the share that failed.
    """

    def __init__(self) -> None:
        self.out_until_s = float("-inf")
        self._clear()

    def _clear(self) -> None:
        self.first_s = _Mean()
        self.whole_s = _Mean()
        self.failures = _Mean()

    def is_out(self, now_s: float) -> bool:
        return now_s < self.out_until_s

    def judge(self, peers: Sequence[Standing], *, ratio: float, now_s: float, out_s: float) -> bool:
        """Eject this one for `out_s`, if it is an outlier among `peers` (all of the model, itself included).
        True when it was."""
        if self.is_out(now_s) or not self._is_outlier([peer for peer in peers if peer is not self], ratio):
            return False
        if sum(peer.is_out(now_s) for peer in peers) + 1 > len(peers) // 2:
            return False
        self.out_until_s = now_s + out_s
        self._clear()
        return True

    def _is_outlier(self, others: Sequence[Standing], ratio: float) -> bool:
        failures = self.failures.value
        if failures is not None and failures >= _FAILURES_MIN:
            usual = _median([other.failures for other in others])
            if usual is not None and failures > ratio * usual:
                return True
        return _is_slow(self.first_s, [other.first_s for other in others], ratio) or _is_slow(
            self.whole_s, [other.whole_s for other in others], ratio
        )


def _is_slow(own: _Mean, others: Sequence[_Mean], ratio: float) -> bool:
    # Milliseconds are no reason, however many times they are those of the others.
    if own.value is None or own.value <= _SLOWER_BY_S:
        return False
    usual = _median(others)
    return usual is not None and own.value > max(ratio * usual, usual + _SLOWER_BY_S)


def _median(means: Sequence[_Mean]) -> float | None:
    known = [mean.value for mean in means if mean.value is not None]
    return median(known) if known else None

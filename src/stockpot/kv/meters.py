"""How fast things are here, measured all the time: tiers, and prefill. Loading is compared with computing by
these figures."""

from __future__ import annotations

import threading
from dataclasses import dataclass

_WEIGHT = 0.2
"""Of a new value in the running mean: about the last ten values count."""


class RunningMean:
    """An exponentially weighted mean of measured values. Any thread."""

    def __init__(self, first: float) -> None:
        """`first` stands until something was measured."""
        self._value = first
        self._count = 0
        self._lock = threading.Lock()

    @property
    def value(self) -> float:
        return self._value

    @property
    def count(self) -> int:
        """How many values were measured."""
        return self._count

    def add(self, value: float) -> None:
        with self._lock:
            weight = max(_WEIGHT, 1 / (self._count + 1))
            self._value += weight * (value - self._value)
            self._count += 1


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """Seconds to find out what a tier has, and bytes a second it then gives, verification included."""

    latency_s: float
    bytes_per_s: float


class TierMeter:
    """Latency and bandwidth of one tier."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        """The arguments stand until the tier was measured."""
        self._latency_s = RunningMean(latency_s)
        self._seconds_per_byte = RunningMean(1 / bytes_per_s)

    def located(self, seconds: float) -> None:
        self._latency_s.add(seconds)

    def read(self, size_bytes: int, seconds: float) -> None:
        if size_bytes > 0:
            self._seconds_per_byte.add(seconds / size_bytes)

    @property
    def speed(self) -> TierSpeed:
        return TierSpeed(self._latency_s.value, 1 / max(self._seconds_per_byte.value, 1e-15))

    def load_s(self, size_bytes: int) -> float:
        """How long it will take to read so much, once it is located."""
        return size_bytes * self._seconds_per_byte.value


class PrefillMeter:
    """Seconds a prompt token takes. Steps of few tokens say nothing of long prompts, and are left out."""

    _FEWEST_TOKENS = 32

    def __init__(self, seconds_per_token: float = 1e-3) -> None:
        self._seconds_per_token = RunningMean(seconds_per_token)

    def computed(self, tokens: int, seconds: float) -> None:
        if tokens >= self._FEWEST_TOKENS:
            self._seconds_per_token.add(seconds / tokens)

    @property
    def seconds_per_token(self) -> float:
        return self._seconds_per_token.value

    def prefill_s(self, tokens: int) -> float:
        """How long it will take to compute so many prompt tokens."""
        return tokens * self._seconds_per_token.value

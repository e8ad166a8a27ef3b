"""A circuit breaker: a server that keeps failing is left alone, then probed by one, then used again.

    up --(failures)--> open --(time)--> half-open --(probe succeeds)--> up
                         ^                  |
                         `--(probe fails)---'   each time for longer, up to a bound

See Nygard, "Release It!", 2nd edition, chapter 5.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

from stockpot.clock import Clock

BreakerState = Literal["up", "open", "half-open"]


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When a breaker opens, and for how long.

    It opens after `failures_in_row`, or when of the last `window` calls at least `failed_share` failed. It
    stays open for `first_open_s`, twice as long each time it opens again, at most `longest_open_s`; each
    time is shortened by up to `jitter` of itself at random, so that many nodes do not come back in the same
    instant. `steady_successes` calls in a row without a failure, and the next time is short again.
    """

    failures_in_row: int = 3
    window: int = 20
    failed_share: float = 0.5
    first_open_s: float = 0.5
    longest_open_s: float = 30.0
    jitter: float = 0.25
    steady_successes: int = 10

    def __post_init__(self) -> None:
        if self.failures_in_row < 1 or self.window < 1 or not 0 < self.failed_share <= 1:
            raise ValueError(f"{self}: a breaker needs counts of at least 1 and a share in (0, 1]")
        if not 0 < self.first_open_s <= self.longest_open_s or not 0 <= self.jitter < 1:
            raise ValueError(f"{self}: times must be positive and ascend, jitter must be in [0, 1)")


class CircuitBreaker:
    """Counts outcomes and says whether to call. Any thread. A call that was not allowed is not reported."""

    def __init__(
        self, clock: Clock, limits: BreakerLimits | None = None, *, chance: random.Random | None = None
    ) -> None:
        self._clock = clock
        self._limits = limits or BreakerLimits()
        self._chance = chance or random.Random()
        self._lock = threading.Lock()
        self._state: BreakerState = "up"
        self._recent: deque[bool] = deque(maxlen=self._limits.window)
        self._in_row = 0
        self._steady = 0
        self._times_opened = 0
        self._opens_until_s = 0.0

    @property
    def state(self) -> BreakerState:
        return self._state

    def allows(self) -> bool:
        """Whether a call may be made. While it is half-open the probe alone may."""
        return self._state == "up"

    def probe_in_s(self) -> float:
        """Seconds until a probe is due; 0 when it is, or when nothing is wrong."""
        with self._lock:
            return max(0.0, self._opens_until_s - self._clock.monotonic()) if self._state == "open" else 0.0

    def try_probe(self) -> bool:
        """True for exactly one caller once the open time has passed: it makes one call and reports its
        outcome."""
        with self._lock:
            if self._state != "open" or self._clock.monotonic() < self._opens_until_s:
                return False
            self._state = "half-open"
            return True

    def probed(self, success: bool) -> None:
        """The outcome of the probe."""
        with self._lock:
            if self._state != "half-open":
                return
            if success:
                self._state = "up"
                self._recent.clear()
                self._in_row = self._steady = 0
            else:
                self._open()

    def succeeded(self) -> None:
        """A call worked."""
        with self._lock:
            self._recent.append(True)
            self._in_row = 0
            self._steady += 1
            if self._steady >= self._limits.steady_successes:
                self._times_opened = 0

    def failed(self) -> bool:
        """A call failed. True when that opened the breaker."""
        with self._lock:
            self._recent.append(False)
            self._in_row += 1
            self._steady = 0
            if self._state != "up" or not self._is_too_much():
                return False
            self._open()
            return True

    def _is_too_much(self) -> bool:
        limits = self._limits
        full = len(self._recent) == limits.window
        return self._in_row >= limits.failures_in_row or (
            full and self._recent.count(False) >= limits.failed_share * limits.window
        )

    def _open(self) -> None:
        limits = self._limits
        # The exponent is bounded: a server may stay away for weeks.
        whole_s = min(limits.first_open_s * 2 ** min(self._times_opened, 32), limits.longest_open_s)
        self._times_opened += 1
        self._state = "open"
        self._opens_until_s = self._clock.monotonic() + whole_s * (1 - limits.jitter * self._chance.random())

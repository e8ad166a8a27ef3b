"""The seam to time, so that tests and replays own it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """Seconds. `monotonic` never goes back; `wall` is Unix time and may."""

    @abstractmethod
    def monotonic(self) -> float: ...

    @abstractmethod
    def wall(self) -> float: ...


class SystemClock(Clock):
    """The machine's own clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class VirtualClock(Clock):
    """A clock that stands still until it is moved."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.now_s = start_s

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move time forward; `seconds` must not be negative."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        self.now_s += seconds

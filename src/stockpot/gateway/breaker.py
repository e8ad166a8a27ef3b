"""Circuit breaker of one backend: failures in a row open it, one probe closes it again.

    closed --(failures in a row)--> open --(time)--> half-open --(probe succeeds)--> closed
                                     ^                   |
                                     `--(probe fails)----'   each time for longer, up to ten times as long

See Nygard, "Release It!", 2nd edition, chapter 5. The tiers of the KV store have one of their own
(`kv.breaker`): theirs counts shares, is locked for threads, and learns something from every probe. Here a
client may leave before its probe told anything.
"""

from __future__ import annotations

import random
from typing import Literal

from stockpot.clock import Clock

BreakerState = Literal["closed", "open", "half-open"]

_LONGEST = 10.0
_JITTER = 0.2


class Breaker:
    """On the event loop only. Every call that `begin` saw is told of once: `succeeded`, `failed` or
    `abandoned`, with what `begin` gave."""

    def __init__(self, clock: Clock, *, failures: int, open_s: float) -> None:
        self._clock = clock
        self.failures = failures
        self.open_s = open_s
        self._in_row = 0
        self._times_opened = 0
        self._open_until_s: float | None = None
        self._probing = False

    @property
    def state(self) -> BreakerState:
        if self._open_until_s is None:
            return "closed"
        return "half-open" if self._probing or self.opens_in_s == 0 else "open"

    @property
    def opens_in_s(self) -> float:
        """Seconds until a call may be tried; 0: now, or as soon as the probe that is out has told."""
        return 0.0 if self._open_until_s is None else max(0.0, self._open_until_s - self._clock.monotonic())

    def allows(self) -> bool:
        return self._open_until_s is None or (not self._probing and self.opens_in_s == 0)

    def begin(self) -> bool:
        """Take what `allows` promised; True when this call is the probe."""
        self._probing = self._open_until_s is not None
        return self._probing

    def succeeded(self, *, probe: bool) -> None:
        """The backend answered. A call from before the breaker opened says nothing about now."""
        if probe:
            self._probing = False
            self._open_until_s = None
            self._times_opened = 0
        if self._open_until_s is None:
            self._in_row = 0

    def failed(self, *, probe: bool) -> None:
        """The backend failed by a fault of its own."""
        self._in_row += 1
        if probe:
            self._probing = False
            self._open()
        elif self._open_until_s is None and self._in_row >= self.failures:
            self._open()

    def abandoned(self, *, probe: bool) -> None:
        """Nothing was learnt; the next call may probe at once."""
        if probe:
            self._probing = False

    def _open(self) -> None:
        whole_s = self.open_s * min(2.0 ** min(self._times_opened, 8), _LONGEST)
        self._times_opened += 1
        # Shortened at random, so that many gateways do not come back in the same instant.
        self._open_until_s = self._clock.monotonic() + whole_s * (1 - _JITTER * random.random())

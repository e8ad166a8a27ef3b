"""Calls of a backing that may fail: counted, told once, and left out for a while where they keep failing."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from stockpot.clock import Clock
from stockpot.kv.breaker import BreakerLimits, CircuitBreaker
from stockpot.recall.stores.backing import Behind, StoreLost

_LOG = logging.getLogger(__name__)

_LIMITS = BreakerLimits(failures_in_row=2, longest_open_s=10.0)

_T = TypeVar("_T")


class BackingGuard:
    """Of calls of one kind: a disk that is full can still be read. `what` is done, for messages ("reading the
    SQLite file")."""

    def __init__(self, what: str, clock: Clock) -> None:
        self.failures = 0
        self.reachable = True
        self._what = what
        self._breaker = CircuitBreaker(clock, _LIMITS)

    async def call(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Its result. Raises StoreLost, at once while the backing is left alone."""
        is_probe = not self._breaker.allows()
        if is_probe and not self._breaker.try_probe():
            raise StoreLost(f"It is left for a while: {self._what} has failed repeatedly.")
        is_well = False
        try:
            result = await call()
            is_well = True
        except Behind:
            is_well = True
            raise
        except StoreLost as error:
            self._failed(error)
            if not is_probe:
                self._breaker.failed()
            raise
        finally:  # also of a caller who has left: whatever it learnt, somebody else may probe now
            if is_probe:
                self._breaker.probed(is_well)
            elif is_well:
                self._breaker.succeeded()
        if not self.reachable:
            self.reachable = True
            _LOG.info("recall: %s works again", self._what)
        return result

    def _failed(self, error: StoreLost) -> None:
        self.failures += 1
        if self.reachable:
            self.reachable = False
            _LOG.warning("recall: %s fails; requests go on without it (%s)", self._what, error)

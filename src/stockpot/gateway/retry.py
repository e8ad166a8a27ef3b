"""What follows a failed attempt: another backend, the same one later, another model, or the error.

Retries answer single failures; when much fails they would be the load that keeps it failing. Hence a budget
over all requests (as Finagle's RetryBudget), and full jitter on what is tried again (Brooker 2015,
"Exponential backoff and jitter").
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from stockpot.clock import Clock
from stockpot.errors import FailureCause, RequestError, StockpotError, UpstreamError, cause_of
from stockpot.routing.plan import RoutePlan, Step
from stockpot.settings_gateway import ResilienceSettings

SAME_AGAIN: frozenset[FailureCause] = frozenset(
    {"connect", "reset", "timeout", "overloaded", "rate_limited", "server_error", "format", "truncated"}
)
"""Before the first token these may pass by themselves."""

ELSEWHERE: frozenset[FailureCause] = frozenset({*SAME_AGAIN, "unauthenticated", "forbidden", "not_found"})
"""These may not happen on another backend of the model."""

_RESERVE = 10.0
_RESERVE_PER_S = 1.0
_BURST = 100.0


class RetryBudget:
    """A token bucket: each request puts in `ratio`, each retry takes 1. So that a quiet gateway can retry at
    all, a reserve of ten fills by itself, one a second. `ratio` 0: no retries."""

    def __init__(self, clock: Clock, ratio: float) -> None:
        self.ratio = ratio
        self._clock = clock
        self._filled_s = clock.monotonic()
        self._tokens = _RESERVE

    def deposit(self) -> None:
        """A request came."""
        self._tokens = min(self._tokens + self.ratio, _BURST)

    def withdraw(self) -> bool:
        """Whether one retry may be made, which is then paid for."""
        if not self.ratio:
            return False
        now_s = self._clock.monotonic()
        if self._tokens < _RESERVE:
            self._tokens = min(self._tokens + (now_s - self._filled_s) * _RESERVE_PER_S, _RESERVE)
        self._filled_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(slots=True)
class Recourse:
    """Where one request stands on its plan. `tried` are the backends that failed on the present step,
    `blamed` those whose breaker has counted a failure of it (see `Condition.take`); `left_s` gives the
    seconds until its deadline (None: it has none)."""

    plan: RoutePlan
    settings: ResilienceSettings
    budget: RetryBudget
    left_s: Callable[[], float | None]
    at: int = 0
    retries: int = 0
    tried: set[str] = field(default_factory=set[str])
    blamed: set[str] = field(default_factory=set[str])
    error: StockpotError | None = None

    @property
    def cause(self) -> FailureCause | None:
        """Why the last attempt failed."""
        return None if self.error is None else cause_of(self.error)

    @property
    def step(self) -> Step:
        return self.plan.steps[self.at]

    def after(self, error: StockpotError, name: str, *, others: bool, again: bool) -> float:
        """An attempt on `name` failed before its first token. Returns the seconds to wait before the next;
        raises the error where there is none. `others`: untried backends of the model may be asked; `again`:
        `name` itself may.
        """
        self.error = error
        self.tried.add(name)
        cause = cause_of(error)
        if cause in ELSEWHERE and others and self._may_retry(0.0):
            return 0.0
        # A model that takes over at once is better than waiting for a backend that has just failed.
        if self._advance(cause):
            return 0.0
        if cause in SAME_AGAIN and again and not others:
            wait_s = self._wait_s(error)
            if self._may_retry(wait_s):
                self.tried.clear()
                return wait_s
        raise error

    def unavailable(self, error: StockpotError) -> None:
        """No backend of the model can be asked: on to the next, or raise. What an attempt said is told rather
        than that now nothing is left."""
        if not self._advance(cause_of(error)):
            raise self.error or error
        self.error = self.error or error

    def _may_retry(self, wait_s: float) -> bool:
        left_s = self.left_s()
        if self.retries >= self.settings.retries or (left_s is not None and wait_s >= left_s):
            return False
        if wait_s > self.settings.queue_timeout_s or not self.budget.withdraw():
            return False
        self.retries += 1
        return True

    def _wait_s(self, error: StockpotError) -> float:
        settings = self.settings
        ceiling_s = min(settings.backoff_s * 2**self.retries, settings.backoff_max_s)
        asked_s = retry_after_of(error)
        # Everyone was told the same time: not everyone comes back in the same instant.
        return random.uniform(0, ceiling_s) + (asked_s or 0.0)

    def _advance(self, cause: FailureCause) -> bool:
        """To the next step that takes over after `cause`; those for other causes are passed by."""
        for at in range(self.at + 1, len(self.plan.steps)):
            if cause in self.plan.steps[at].on:
                self.at = at
                self.tried.clear()
                return True
        return False


def retry_after_of(error: StockpotError) -> float | None:
    """Seconds the refusing side asked to wait, where it did."""
    return error.retry_after_s if isinstance(error, UpstreamError | RequestError) else None

"""Allowances counted in this process's memory: exact, gone with the process."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from stockpot.allowances.periods import day_left_s, day_of, month_left_s, month_of
from stockpot.allowances.store import (
    MONEY,
    WINDOW_SLOTS,
    AllowanceStore,
    Granted,
    Limit,
    Order,
    Refused,
    Report,
    Scope,
)
from stockpot.clock import Clock

_BY_DAY = (Limit.TOKENS_PER_DAY, Limit.USD_PER_DAY)
_BY_MONTH = (Limit.TOKENS_PER_MONTH, Limit.USD_PER_MONTH)
_BY_PERIOD = (Limit.TOKENS_PER_DAY, Limit.TOKENS_PER_MONTH, Limit.USD_PER_DAY, Limit.USD_PER_MONTH)
_UNKNOWN_S = 1.0
"""When a running request ends nobody knows; this long until it is worth another try."""


@dataclass(slots=True)
class _Window:
    """Amounts of the last minute by slot, and their sum. Slots ascend: at most one is added a second."""

    total: int = 0
    slots: OrderedDict[int, int] = field(default_factory=OrderedDict[int, int])

    def tidy(self, slot: int) -> None:
        while self.slots:
            first = next(iter(self.slots))
            if first >= slot - WINDOW_SLOTS:
                return
            self.total -= self.slots.pop(first)

    def add(self, slot: int, amount: int) -> None:
        self.slots[slot] = self.slots.get(slot, 0) + amount
        self.total += amount

    def correct(self, slot: int, amount: int) -> None:
        """Where the slot has gone, there is nothing to correct any more."""
        if slot in self.slots:
            self.add(slot, amount)

    def wait_s(self, need: int, now_s: float) -> float:
        """Until `need` or more has left the window."""
        for slot, amount in self.slots.items():
            need -= amount
            if need <= 0:
                return slot + WINDOW_SLOTS + 1 - now_s
        return 0.0


@dataclass(slots=True)
class _Counters:
    """Of one scope. `periods` has the number of the day or month, and the amount in it."""

    requests: _Window = field(default_factory=_Window)
    tokens: _Window = field(default_factory=_Window)
    running: int = 0
    periods: dict[Limit, tuple[int, int]] = field(default_factory=dict[Limit, tuple[int, int]])

    def used(self, limit: Limit, period: int) -> int:
        known, amount = self.periods.get(limit, (period, 0))
        return amount if known >= period else 0

    def charge(self, limit: Limit, period: int, amount: int) -> None:
        """To a period that may be over, in which case nobody counts it any more."""
        known, before = self.periods.get(limit, (period, 0))
        if period >= known:
            self.periods[limit] = (period, amount + (before if known == period else 0))


@dataclass(frozen=True, slots=True)
class _Place:
    """When a reservation was made: what it uses is charged there. Slots are of the clock that never goes
    back, days and months of the calendar."""

    steady_s: float
    wall_s: float
    slot: int
    day: int
    month: int

    def period(self, limit: Limit) -> int:
        return self.day if limit in _BY_DAY else self.month


def _place(steady_s: float, wall_s: float) -> _Place:
    return _Place(steady_s, wall_s, int(steady_s), day_of(wall_s), month_of(wall_s))


class MemoryStore(AllowanceStore):
    """Counters of as many scopes as have made requests (keys and teams, which somebody set up). No leases:
    reservations end with the process, like everything here."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._scopes: dict[tuple[str, str], _Counters] = {}
        self._held: dict[str, _Place] = {}

    async def reserve(self, order: Order) -> Granted | Refused:
        place = _place(self._clock.monotonic(), self._clock.wall())
        counted = [(scope, self._counters(scope)) for scope in order.scopes]
        for scope, counters in counted:
            refused = _check(scope, counters, order, place)
            if refused is not None:
                return refused
        left: float | None = None
        for scope, counters in counted:
            limits = scope.limits
            if limits[Limit.REQUESTS_PER_MINUTE] is not None:
                counters.requests.add(place.slot, 1)
            if limits[Limit.TOKENS_PER_MINUTE] is not None:
                counters.tokens.add(place.slot, order.tokens)
            counters.running += 1
            for limit in _BY_PERIOD:
                most = limits[limit]
                if most is not None:
                    period = place.period(limit)
                    counters.charge(limit, period, order.nanousd if limit in MONEY else order.tokens)
                    share = 1 - counters.used(limit, period) / most if most else 0.0
                    left = share if left is None else min(left, share)
        self._held[order.id] = place
        return Granted(left)

    def settle(self, order: Order, tokens: int, nanousd: int) -> asyncio.Future[None] | None:
        place = self._held.pop(order.id, None)
        if place is None:
            return None
        more_tokens, more_nanousd = tokens - order.tokens, nanousd - order.nanousd
        for scope in order.scopes:
            counters = self._counters(scope)
            counters.running -= 1
            counters.tokens.correct(place.slot, more_tokens)
            _charge(scope, counters, place, more_tokens, more_nanousd)
        return None

    async def renew(self, orders: Sequence[Order]) -> None:
        pass

    async def report(self, report: Report) -> None:
        place = _place(report.at, report.at)
        _charge(report.scope, self._counters(report.scope), place, report.tokens, report.nanousd)

    async def ping(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def _counters(self, scope: Scope) -> _Counters:
        counters = self._scopes.get((scope.kind, scope.id))
        if counters is None:
            counters = self._scopes[scope.kind, scope.id] = _Counters()
        return counters


def _charge(scope: Scope, counters: _Counters, place: _Place, tokens: int, nanousd: int) -> None:
    for limit in _BY_PERIOD:
        if scope.limits[limit] is not None:
            counters.charge(limit, place.period(limit), nanousd if limit in MONEY else tokens)


def _check(scope: Scope, counters: _Counters, order: Order, now: _Place) -> Refused | None:
    """What stands in the way, None where nothing does."""
    for limit, window, claim in (
        (Limit.REQUESTS_PER_MINUTE, counters.requests, 1),
        (Limit.TOKENS_PER_MINUTE, counters.tokens, order.tokens),
    ):
        most = scope.limits[limit]
        if most is None:
            continue
        window.tidy(now.slot)
        excess = window.total + claim - most
        if excess > 0:
            wait_s = None if claim > most else window.wait_s(excess, now.steady_s)
            return Refused(scope, limit, window.total, wait_s)
    most = scope.limits[Limit.CONCURRENCY]
    if most is not None and counters.running >= most:
        return Refused(scope, Limit.CONCURRENCY, counters.running, _UNKNOWN_S if most else None)
    for limit in _BY_PERIOD:
        most = scope.limits[limit]
        if most is None:
            continue
        claim = order.nanousd if limit in MONEY else order.tokens
        used = counters.used(limit, now.period(limit))
        if used + claim > most:
            left_s = month_left_s(now.wall_s) if limit in _BY_MONTH else day_left_s(now.wall_s)
            return Refused(scope, limit, used, None if claim > most else left_s)
    return None

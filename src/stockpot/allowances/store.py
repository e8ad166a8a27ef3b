"""The seam to where allowances are counted: what is asked of a store, and what it answers."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from stockpot.caller import Limits

NANOUSD = 1_000_000_000

WINDOW_SLOTS = 60
"""A minute is 60 slots of a second. A slot counts until all of it is more than a minute old, so 61 slots are
summed: no window of 60 s, wherever it begins, ever holds more than the limit; what is used comes back up to a
second late. (Counters of whole minutes allow twice the limit around the change, and so do token buckets.)"""


class Limit(IntEnum):
    """The limits, in the order in which they are checked and stand in `Scope.limits`."""

    REQUESTS_PER_MINUTE = 0
    TOKENS_PER_MINUTE = 1
    CONCURRENCY = 2
    TOKENS_PER_DAY = 3
    TOKENS_PER_MONTH = 4
    USD_PER_DAY = 5
    USD_PER_MONTH = 6


MONEY = frozenset({Limit.USD_PER_DAY, Limit.USD_PER_MONTH})


@dataclass(frozen=True, slots=True)
class Scope:
    """A key or a team that is limited. `id` is unique among its kind, `name` is for people. `limits` has an
    entry for each `Limit`, None where there is none; money in billionths of a US dollar."""

    kind: Literal["key", "team"]
    id: str
    name: str
    limits: tuple[int | None, ...]

    @classmethod
    def of(cls, kind: Literal["key", "team"], identity: str, name: str, limits: Limits) -> Scope:
        money = (limits.usd_per_day, limits.usd_per_month)
        return cls(
            kind,
            identity,
            name,
            (
                limits.requests_per_minute,
                limits.tokens_per_minute,
                limits.concurrency,
                limits.tokens_per_day,
                limits.tokens_per_month,
                *(None if usd is None else round(usd * NANOUSD) for usd in money),
            ),
        )

    def share(self, of_each: float) -> Scope:
        """The same with a share of each limit, rounded down."""
        limits = tuple(None if limit is None else int(limit * of_each) for limit in self.limits)
        return Scope(self.kind, self.id, self.name, limits)


@dataclass(frozen=True, slots=True)
class Order:
    """A reservation for one request: all its scopes or none. `tokens` and `nanousd` are upper bounds."""

    id: str
    scopes: tuple[Scope, ...]
    tokens: int
    nanousd: int


@dataclass(frozen=True, slots=True)
class Granted:
    """It is reserved. `left` is the share (0 to 1) of the tightest quota or budget of a day or month that is
    left after it; None where there is none."""

    left: float | None


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing is reserved: `limit` of `scope` stands in the way. `used` counts what is used and reserved;
    `retry_after_s` None: waiting does not help, the request alone is more than the limit."""

    scope: Scope
    limit: Limit
    used: int
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What was used while the store was away, of one scope in one day. `id` is unique: what is reported twice
    counts once."""

    id: str
    scope: Scope
    at: float
    tokens: int
    nanousd: int


class StoreLost(Exception):
    """The store does not answer, or not as it should. What was asked may have been done all the same."""


class AllowanceStore(ABC):
    """Counts. All methods are called on one event loop; what is asked later is done later.

    Counters exist for limits only: a new limit counts from when it is set. What a request uses belongs to the
    slot, day and month of its reservation, even if it ends in the next.
    """

    @abstractmethod
    async def reserve(self, order: Order) -> Granted | Refused:
        """Check all limits of all scopes and take from each, or from none. Raises StoreLost."""

    @abstractmethod
    def settle(self, order: Order, tokens: int, nanousd: int) -> asyncio.Future[None] | None:
        """Begin at once to put what was used in the place of what was reserved; None: it is done.

        Doing it twice changes nothing. A reservation whose lease had run out has been given back: what was
        used is then charged in full. The future may fail with StoreLost.
        """

    @abstractmethod
    async def renew(self, orders: Sequence[Order]) -> None:
        """Prolong the leases of these reservations. Raises StoreLost."""

    @abstractmethod
    async def report(self, report: Report) -> None:
        """Charge what was used past this store to quotas and budgets, whatever the limits. Raises
        StoreLost."""

    @abstractmethod
    async def ping(self) -> None:
        """Raises StoreLost where the store cannot be used."""

    @abstractmethod
    async def close(self) -> None:
        """Do what has begun, then let go of connections. Does not raise."""

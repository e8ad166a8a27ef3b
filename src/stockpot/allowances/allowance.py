"""What callers may use: reserved before a request runs, settled with what it used, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stockpot.allowances.memory import MemoryStore
from stockpot.allowances.periods import DAY_S, day_of
from stockpot.allowances.refusal import refusal
from stockpot.allowances.store import AllowanceStore, Order, Refused, Report, Scope, StoreLost
from stockpot.caller import NOBODY, Caller, Limits
from stockpot.clock import Clock
from stockpot.errors import RequestError
from stockpot.settings_gateway import AllowanceSettings

_LOG = logging.getLogger(__name__)
_PROBE_S = 1.0
_REMEMBERED_MAX = 20_000
_UNSETTLED_MAX = 100_000
_TOLD_AT_ONCE = 128


class AllowancesUnavailable(RequestError):
    """The counts of limits cannot be reached, and what is limited is refused without them."""

    status = 503
    code = "allowances_unavailable"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request may use at most: tokens of prompt and output, money in billionths of a US dollar."""

    request_id: str
    tokens: int
    nanousd: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What it used, over all its attempts."""

    tokens: int
    nanousd: int


@dataclass(frozen=True, slots=True)
class Hold:
    """A reservation. Settle it once, however the request ends. `order` None: nothing is limited."""

    order: Order | None = None
    where: Literal["store", "here"] = "store"


NOTHING_HELD = Hold()


class Allowances:
    """Keeps the limits of keys and teams, those of a request together. On the event loop.

    Where the store is lost, what has limits is refused (`when_lost` refuse), or each gateway allows a share
    of each limit by itself (local) and reports what was used of quotas and budgets when the store is back;
    minutes and requests at one time begin anew then. A lost store is probed once a second in the background:
    requests do not wait for it.
    """

    def __init__(
        self, settings: AllowanceSettings, clock: Clock, store: AllowanceStore | None = None
    ) -> None:
        """`store` None: limits hold for this process alone."""
        self._settings = settings
        self._clock = clock
        self._shared = store is not None
        self._store = store or MemoryStore(clock)
        self._here = MemoryStore(clock)
        self._lost: StoreLost | None = None
        self._open: dict[str, Order] = {}
        self._unsettled: OrderedDict[str, tuple[Order, Spent]] = OrderedDict()
        self._unreported: OrderedDict[tuple[str, str, int], Report] = OrderedDict()
        self._reports: deque[Report] = deque(maxlen=_REMEMBERED_MAX)
        self._scopes: OrderedDict[tuple[str, str, Limits], Scope] = OrderedDict()
        self._left: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._tender: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to renew leases and to watch over the store."""
        if self._shared and self._tender is None:
            self._tender = asyncio.create_task(self._tend())

    async def close(self) -> None:
        """Settle what can be settled, and let go. What is held still returns with its lease."""
        if self._tender is not None:
            self._tender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._tender
            self._tender = None
        if self._lost is None:
            with contextlib.suppress(StoreLost):
                await self._catch_up()
        if self._unsettled:
            _LOG.warning(
                "%d reservations could not be settled; they return after %g s, what they used is not counted",
                len(self._unsettled),
                self._settings.lease_s,
            )
        await self._store.close()

    @property
    def is_lost(self) -> bool:
        """Whether the store is out of reach at the moment."""
        return self._lost is not None

    async def reserve(self, caller: Caller, claim: Claim) -> Hold:
        """Take `claim` from all limits of the caller's key and team, or from none.

        Raises AllowanceExceeded, which names the limit that stands in the way; AllowancesUnavailable where
        limits cannot be checked. Returns at once where there are none.
        """
        if caller.limits is NOBODY.limits and caller.team_limits is NOBODY.team_limits:
            return NOTHING_HELD
        scopes = self._scopes_of(caller)
        if not scopes:
            return NOTHING_HELD
        # A request may reserve several times (for a stronger model): its id alone is not enough.
        identity = f"{claim.request_id}.{next(self._numbers)}"
        order = Order(identity, scopes, claim.tokens, claim.nanousd)
        if self._lost is None:
            try:
                return await self._reserve(caller, order)
            except StoreLost as error:
                # It may have been done all the same.
                self._remember(order, Spent(0, 0))
                self._lose(error)
            except asyncio.CancelledError:
                self._give_back(order, Spent(0, 0))
                raise
        return await self._reserve_here(order)

    def settle_soon(self, hold: Hold, spent: Spent) -> None:
        """Put what was used in the place of what was reserved. Waits for nothing and does not fail: what the
        store cannot be told now it is told later. A second settlement of one hold changes nothing."""
        order = hold.order
        if order is None or self._open.pop(order.id, None) is None:
            return
        if hold.where == "store":
            self._give_back(order, spent)
            return
        self._here.settle(order, spent.tokens, spent.nanousd)
        self._note(order, spent)

    def standing(self, caller: Caller) -> float | None:
        """The share (0 to 1) that is left of the tightest quota or budget of a day or month, as of the last
        reservation of the caller; None: there is none."""
        return self._left.get((caller.key_id, caller.team))

    async def _reserve(self, caller: Caller, order: Order) -> Hold:
        outcome = await self._store.reserve(order)
        if isinstance(outcome, Refused):
            raise refusal(outcome, order)
        self._open[order.id] = order
        if outcome.left is None:
            self._left.pop((caller.key_id, caller.team), None)
        else:
            self._left[caller.key_id, caller.team] = outcome.left
            if len(self._left) > _REMEMBERED_MAX:
                self._left.popitem(last=False)
        return Hold(order)

    async def _reserve_here(self, order: Order) -> Hold:
        if self._settings.when_lost == "refuse":
            raise AllowancesUnavailable(
                "The limits of this key cannot be checked now: the gateway does not reach its counts"
                " (allowances.redis_url). Try again in a moment.",
                retry_after_s=_PROBE_S,
            )
        share = self._settings.local_share
        order = Order(
            order.id, tuple(scope.share(share) for scope in order.scopes), order.tokens, order.nanousd
        )
        outcome = await self._here.reserve(order)
        if isinstance(outcome, Refused):
            raise refusal(outcome, order, without_store=True)
        self._open[order.id] = order
        return Hold(order, "here")

    def _scopes_of(self, caller: Caller) -> tuple[Scope, ...]:
        scopes: list[Scope] = []
        if caller.limits:
            scopes.append(self._scope("key", caller.key_id, caller.key_name, caller.limits))
        if caller.team_limits and caller.team:
            scopes.append(self._scope("team", caller.team, caller.team, caller.team_limits))
        return tuple(scopes)

    def _scope(self, kind: Literal["key", "team"], identity: str, name: str, limits: Limits) -> Scope:
        known = self._scopes.get((kind, identity, limits))
        if known is None:
            known = self._scopes[kind, identity, limits] = Scope.of(kind, identity, name, limits)
            if len(self._scopes) > _REMEMBERED_MAX:
                self._scopes.popitem(last=False)
        return known

    def _give_back(self, order: Order, spent: Spent) -> None:
        """Settle with the store, now or when it is back."""
        if self._lost is not None:
            self._remember(order, spent)
            return
        future = self._store.settle(order, spent.tokens, spent.nanousd)
        if future is not None:
            self._remember(order, spent)
            future.add_done_callback(lambda done: self._settled(order, done))

    def _settled(self, order: Order, done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if isinstance(error, StoreLost):
            self._lose(error)
        elif not done.cancelled():
            self._unsettled.pop(order.id, None)

    def _remember(self, order: Order, spent: Spent) -> None:
        self._unsettled[order.id] = (order, spent)
        if len(self._unsettled) > _UNSETTLED_MAX:
            self._unsettled.popitem(last=False)
            _LOG.warning(
                "more than %d reservations wait to be settled; the oldest is forgotten", _UNSETTLED_MAX
            )

    def _note(self, order: Order, spent: Spent) -> None:
        """Remember what was used without the store, to report it: one line for each scope and day."""
        at = self._clock.wall()
        for scope in order.scopes:
            place = (scope.kind, scope.id, day_of(at))
            before = self._unreported.get(place)
            self._unreported[place] = Report(
                before.id if before else uuid.uuid4().hex,
                scope,
                float(day_of(at) * DAY_S),
                spent.tokens + (before.tokens if before else 0),
                spent.nanousd + (before.nanousd if before else 0),
            )
            if len(self._unreported) > _REMEMBERED_MAX:
                self._unreported.popitem(last=False)
        if self._lost is None:
            self._wake.set()

    def _lose(self, error: StoreLost) -> None:
        if self._lost is None:
            choice: Mapping[str, str] = {
                "refuse": "requests with limits are refused",
                "local": f"this process allows {self._settings.local_share:.0%} of each limit",
            }
            _LOG.error("allowances: %s; until it is back, %s", error, choice[self._settings.when_lost])
            self._wake.set()
        self._lost = error

    async def _tend(self) -> None:
        """Renew leases, three times in the life of one; bring a lost store back."""
        now_s = asyncio.get_running_loop().time
        renew_s = self._settings.lease_s / 3
        due_s = now_s() + renew_s
        while True:
            wait_s = _PROBE_S if self._lost is not None else max(0.0, due_s - now_s())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
            self._wake.clear()
            try:
                if self._lost is not None:
                    await self._bring_back()
                await self._report()
                if now_s() >= due_s:
                    due_s = now_s() + renew_s
                    await self._store.renew(list(self._open.values()))
            except StoreLost as error:
                self._lose(error)

    async def _bring_back(self) -> None:
        await self._store.ping()
        await self._store.renew(list(self._open.values()))
        lost, self._lost = self._lost, None
        await self._catch_up()
        _LOG.warning("allowances: the store is back (it was lost: %s)", lost)

    async def _catch_up(self) -> None:
        """Tell the store all it has missed."""
        while self._unsettled:
            some = list(itertools.islice(self._unsettled.values(), _TOLD_AT_ONCE))
            futures = [self._store.settle(order, spent.tokens, spent.nanousd) for order, spent in some]
            await asyncio.gather(*(future for future in futures if future is not None))
            for order, _ in some:
                self._unsettled.pop(order.id, None)
        await self._report()

    async def _report(self) -> None:
        """What is sent keeps its id until it has been heard, and nothing is added to it any more."""
        self._reports.extend(self._unreported.values())
        self._unreported.clear()
        while self._reports:
            await self._store.report(self._reports[0])
            self._reports.popleft()

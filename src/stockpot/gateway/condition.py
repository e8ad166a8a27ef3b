"""The condition of one backend: its breaker, its limit, what is in flight, and how it does on each model.

A request holds a `Permit` from before it is sent until its attempt is over; only through permits does a
condition learn, and a permit counts once, however often it is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stockpot.clock import Clock
from stockpot.errors import FailureCause
from stockpot.gateway.breaker import Breaker, BreakerState
from stockpot.gateway.concurrency import AdaptiveLimit, Drift
from stockpot.gateway.ejection import Standing
from stockpot.routing.member import Member
from stockpot.settings_gateway import ResilienceSettings

_OWN_FAULT: frozenset[FailureCause] = frozenset(
    {"connect", "reset", "timeout", "server_error", "format", "truncated"}
)
_REFUSED: frozenset[FailureCause] = frozenset({"overloaded", "rate_limited"})
_USELESS: frozenset[FailureCause] = frozenset(
    {*_OWN_FAULT, *_REFUSED, "unauthenticated", "forbidden", "not_found"}
)
"""Failures that would not have happened on a sound backend: what peers are compared by."""

_REST_MAX_S = 60.0
"""One answer with a Retry-After of a day must not take a model from everybody for a day."""


@dataclass(frozen=True, slots=True)
class ConditionReport:
    """A backend's condition at one moment, for metrics and operators. `limit` None: the engine in this
    process has a queue of its own. `ejected`, `resting`: the models it is not asked for now (an outlier; as
    its Retry-After asks). `attempts` and `failures` count from the start."""

    name: str
    ready: bool
    reason: str
    breaker: BreakerState
    in_flight: int
    limit: int | None
    ejected: tuple[str, ...]
    resting: tuple[str, ...]
    attempts: int
    failures: Mapping[FailureCause, int]


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a backend is not asked now, and after how many seconds it may be (None: unknown)."""

    cause: FailureCause
    reason: str
    retry_after_s: float | None = None


class ModelCondition:
    """What is known of one model on one backend."""

    def __init__(self) -> None:
        self.standing = Standing()
        self.first = Drift()
        self.whole = Drift()
        self.rests_until_s = float("-inf")
        self.rest_cause: FailureCause = "rate_limited"
        # After a rest that was cut short: one request finds out whether it is over, the others wait for it.
        self.in_doubt = False
        self.scouting = False


class Condition:
    """Of one backend. On the event loop only."""

    def __init__(self, member: Member, settings: ResilienceSettings, clock: Clock) -> None:
        self.member = member
        self.in_flight = 0
        self.attempts = 0
        self.failures: dict[FailureCause, int] = {}
        self.breaker = Breaker(clock, failures=settings.breaker_failures, open_s=settings.breaker_open_s)
        self.limit: AdaptiveLimit | None = None
        self._clock = clock
        self._models: dict[str, ModelCondition] = {}
        self._last_cause: FailureCause = "server_error"
        self.reconfigure(member, settings)

    def reconfigure(self, member: Member, settings: ResilienceSettings) -> None:
        """New settings for the same backend; what was learnt of it stays."""
        self.member = member
        self.breaker.failures, self.breaker.open_s = settings.breaker_failures, settings.breaker_open_s
        if member.settings is None:
            self.limit = None
        elif self.limit is None:
            self.limit = AdaptiveLimit(self._clock, member.settings.max_concurrency)
        else:
            self.limit.maximum = member.settings.max_concurrency

    def model(self, model: str) -> ModelCondition:
        """Only for models that are served here, so that there are not more than those."""
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = ModelCondition()
        return known

    def obstacle(self, model: str) -> Obstacle | None:
        """Why no request for `model` may be sent, however few are in flight; None: it may. Ejection is no
        obstacle but a preference: slow is better than nothing."""
        health = self.member.backend.health()
        if not health.ready:
            return Obstacle("connect", health.reason or "not ready")
        if not self.breaker.allows():
            return Obstacle(
                self._last_cause, f"left alone after failures ({self._last_cause})", self.breaker.opens_in_s
            )
        known = self.model(model)
        rest_s = known.rests_until_s - self._clock.monotonic()
        if rest_s > 0:
            return Obstacle(known.rest_cause, f"asked to be left alone for {rest_s:.1f} s", rest_s)
        if known.scouting:
            return Obstacle(known.rest_cause, "asked to be left alone for longer; one request looks now", 1.0)
        return None

    def has_room(self) -> bool:
        return self.limit is None or self.in_flight < self.limit.value

    def is_ejected(self, model: str) -> bool:
        return self.model(model).standing.is_out(self._clock.monotonic())

    def take(
        self, model: str, closed: Callable[[Condition, str], None], blamed: set[str] | None = None
    ) -> Permit:
        """A permit, where `obstacle` is None and there is room. `closed` is called when it is given back.
        `blamed` are the backends whose breaker has counted a failure of the same request."""
        self.in_flight += 1
        self.attempts += 1
        known = self.model(model)
        known.scouting = known.in_doubt
        return Permit(
            self,
            model,
            self.breaker.begin(),
            closed,
            scout=known.scouting,
            blamed=set() if blamed is None else blamed,
        )

    def give_back(self, permit: Permit, cause: FailureCause | None, *, sent: bool) -> None:
        """For `Permit` alone."""
        if not sent:
            self.attempts -= 1
        elif cause is not None:
            self.failures[cause] = self.failures.get(cause, 0) + 1
        if cause in _OWN_FAULT:
            self._last_cause = cause
            self._blame(permit, cause)
        elif cause in {"cancelled", "deadline"}:
            self.breaker.abandoned(probe=permit.probe)
        else:
            # A refusal is an answer too: the backend is there.
            self.breaker.succeeded(probe=permit.probe)
        if permit.scout:
            self.scouted(permit, told=cause not in {"cancelled", "deadline"})
        if cause in _REFUSED and self.limit is not None:
            self.limit.overloaded()
        if cause is None or cause in _USELESS:
            self.model(permit.model).standing.failures.add(0.0 if cause is None else 1.0)
        # What this attempt taught counts it as in flight still.
        self.in_flight -= 1

    def _blame(self, permit: Permit, cause: FailureCause) -> None:
        """One request that no backend survives must not open the breaker for all: however often it is tried,
        it counts once. No request is the cause that there is no connection."""
        name = self.member.name
        if permit.probe or cause == "connect" or name not in permit.blamed:
            permit.blamed.add(name)
            self.breaker.failed(probe=permit.probe)
        else:
            self.breaker.abandoned(probe=False)

    def scouted(self, permit: Permit, *, told: bool = True) -> None:
        """For `Permit` alone. `told`: the backend answered, if only with a new rest; else the next request
        looks."""
        permit.scout = False
        known = self.model(permit.model)
        known.scouting = False
        if told:
            known.in_doubt = known.rests_until_s > self._clock.monotonic() and known.in_doubt

    def answered(self, model: str, seconds: float, work: float, *, streamed: bool) -> None:
        """An answer came; `seconds` is the time to its first token, or all of it where it is not `streamed`,
        for `work` units (see `attempts`)."""
        known = self.model(model)
        drift, mean = (
            (known.first, known.standing.first_s) if streamed else (known.whole, known.standing.whole_s)
        )
        drift.add(seconds / work)
        mean.add(seconds / work)
        if self.limit is not None:
            self.limit.answered(drift, self.in_flight)

    def rest(self, model: str, seconds: float, cause: FailureCause) -> None:
        """The backend asked not to be sent `model` for so long. It is for a minute at most; after that one
        request at a time is sent until one is answered otherwise."""
        known = self.model(model)
        rest_s = min(seconds, _REST_MAX_S)
        known.rests_until_s = max(known.rests_until_s, self._clock.monotonic() + rest_s)
        known.rest_cause = cause
        known.in_doubt = known.in_doubt or seconds > _REST_MAX_S

    def report(self) -> ConditionReport:
        health = self.member.backend.health()
        now_s = self._clock.monotonic()
        return ConditionReport(
            name=self.member.name,
            ready=health.ready,
            reason=health.reason,
            breaker=self.breaker.state,
            in_flight=self.in_flight,
            limit=None if self.limit is None else self.limit.value,
            ejected=tuple(name for name, known in self._models.items() if known.standing.is_out(now_s)),
            resting=tuple(name for name, known in self._models.items() if known.rests_until_s > now_s),
            attempts=self.attempts,
            failures=dict(self.failures),
        )


class Permit:
    """Leave to send one request for `model`; `close` gives it back."""

    __slots__ = ("_closed", "blamed", "condition", "model", "probe", "scout")

    def __init__(
        self,
        condition: Condition,
        model: str,
        probe: bool,
        closed: Callable[[Condition, str], None],
        *,
        scout: bool,
        blamed: set[str],
    ) -> None:
        self.condition = condition
        self.model = model
        self.probe = probe
        self.scout = scout
        self.blamed = blamed
        self._closed: Callable[[Condition, str], None] | None = closed

    def answers(self) -> None:
        """The first token came: others need not wait for the end of a probe's long answer."""
        if self.probe:
            self.condition.breaker.succeeded(probe=True)
            self.probe = False
        if self.scout:
            self.condition.scouted(self)

    def discard(self) -> None:
        """Nothing was sent."""
        self.close("cancelled", sent=False)

    def close(self, cause: FailureCause | None, *, sent: bool = True) -> None:
        """The attempt is over: `cause` is why it failed, None that it did not."""
        closed, self._closed = self._closed, None
        if closed is not None:
            self.condition.give_back(self, cause, sent=sent)
            closed(self.condition, self.model)

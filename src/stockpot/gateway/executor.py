"""Carries a request along its plan: finds a backend that may be asked, tries it, goes on where it fails.

    run --> single flight --> recall --> cascade --> walk: { permit (or wait in line) --> attempt }
                                                     until one answers

A failure is followed by another attempt only before the first token has been passed on; after that an error
ends the stream as an error, and no answer is ever put together from two.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from stockpot.clock import Clock
from stockpot.errors import (
    DeadlineExceeded,
    NotCached,
    QueueFull,
    StockpotError,
    UnknownModel,
    UpstreamError,
)
from stockpot.events import Event, Notice, Queued
from stockpot.gateway.attempts import AttemptStream, Item, remaining_s
from stockpot.gateway.cascade import Classifiers, run_cascade
from stockpot.gateway.condition import Condition, ConditionReport, Obstacle, Permit
from stockpot.gateway.hedging import Hedged
from stockpot.gateway.journey import Journey
from stockpot.gateway.retry import Recourse, RetryBudget
from stockpot.gateway.single_flight import SingleFlight, identity_of, is_shareable
from stockpot.gateway.spans import RequestSpan
from stockpot.gateway.waiting import WaitingLine
from stockpot.requests import AnyRequest, EmbeddingRequest, Embeddings, GenerationRequest, Priority
from stockpot.routing.member import Member
from stockpot.routing.plan import Candidate, Placement, RoutePlan
from stockpot.settings_gateway import ResilienceSettings

if TYPE_CHECKING:
    from stockpot.recall.recall import Recall

_SERVING_KNOWN_FOR_S = 1.0
_LOOK_AGAIN_S = 1.0
"""Backends also come back without a request having ended there."""
_TELLS_AFTER_S = 0.25
"""The first event lets the edge send the head of a stream, after which a refusal can only be an error within
it. Who is put out of the line sooner than this still gets the status that says so."""


class Executor:
    """On the event loop only. Keeps the condition of each member; the members' life is not its business.

    `sleep` is how it waits before it tries again.
    """

    def __init__(
        self,
        members: Sequence[Member],
        placement: Placement,
        settings: ResilienceSettings,
        clock: Clock,
        *,
        recall: Recall | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._placement = placement
        self._settings = settings
        self._clock = clock
        self._recall = recall
        self._sleep = sleep
        self._conditions: dict[str, Condition] = {
            member.name: Condition(member, settings, clock) for member in members
        }
        self._budget = RetryBudget(clock, settings.retry_budget)
        self._line = WaitingLine(clock, settings.queue_limit)
        self._flights = SingleFlight(clock)
        self._classifiers = Classifiers()
        # Which conditions serve a model, looked up once a second: members may list hundreds of models.
        self._serving: dict[str, tuple[Condition, ...]] = {}
        self._serving_until_s = float("-inf")

    async def start(self) -> None:
        """Nothing runs but on behalf of a request."""

    async def stop(self) -> None:
        """Put out who waits in line. Attempts under way are their requests'."""
        self._line.close()

    def reconfigure(
        self, members: Sequence[Member], settings: ResilienceSettings, placement: Placement | None = None
    ) -> None:
        """From now on these. Requests under way end where they are; what is known of members that stay, by
        name, is kept."""
        self._settings = settings
        self._placement = placement or self._placement
        self._budget.ratio = settings.retry_budget
        self._line.limit = settings.queue_limit
        known, self._conditions = self._conditions, {}
        for member in members:
            condition = known.get(member.name)
            if condition is None:
                condition = Condition(member, settings, self._clock)
            else:
                condition.reconfigure(member, settings)
            self._conditions[member.name] = condition
        self._serving.clear()
        self._line.call(self._line.waited_for())

    def condition(self, name: str) -> ConditionReport:
        """Of the member of that name. Raises KeyError."""
        return self._conditions[name].report()

    def conditions(self) -> tuple[ConditionReport, ...]:
        return tuple(condition.report() for condition in self._conditions.values())

    def waiting(self) -> Mapping[Priority, int]:
        """Requests that wait in line, by priority."""
        return self._line.lengths()

    def run(
        self, plan: RoutePlan, request: GenerationRequest, journey: Journey, span: RequestSpan
    ) -> AsyncGenerator[Event]:
        """The events of the answer. What went before it on a backend that failed (Queued, Started, Progress)
        may have been passed on. Raises RequestError, UpstreamError and EngineFailed, before the first token
        only when nothing else is left to try. Closing it closes the backend's stream at once; `journey` then
        holds every attempt.
        """
        self._budget.deposit()
        make = partial(self._make, plan, request, span)
        shareable = is_shareable(request)
        if self._recall is not None:
            make = partial(self._recall.answer, plan, request, make)
            shareable = shareable or self._recall.shares_sampled
        elif request.generation.recall.only:
            raise NotCached(
                "This server keeps no answers, and 'Cache-Control: only-if-cached' forbids making one; send"
                " it without."
            )
        if self._settings.single_flight and shareable:
            identity = identity_of(plan, request)
            if identity is not None and self._recall is not None:
                # A flight may give a kept answer, and its own is kept for others.
                identity += self._recall.sharing(request)
            if identity is not None:
                return self._flights.join(identity, make, journey, request.generation.deadline_s)
        return make(journey)

    async def embed(
        self, plan: RoutePlan, request: EmbeddingRequest, journey: Journey, span: RequestSpan
    ) -> Embeddings:
        """Vectors, by the same way. Raises as `run` does."""
        self._budget.deposit()
        async with aclosing(self._walk(request, journey, span, plan)) as items:
            async for item in items:
                if isinstance(item, Embeddings):
                    return item
        raise UpstreamError("No embeddings came.", cause="format", backend=journey.backend)

    def _make(
        self, plan: RoutePlan, request: GenerationRequest, span: RequestSpan, journey: Journey
    ) -> AsyncGenerator[Event]:
        # Of a request that is no embedding only events come.
        walk = cast(
            "Callable[[RoutePlan], AsyncGenerator[Event]]", partial(self._walk, request, journey, span)
        )
        if plan.cascade is None:
            return walk(plan)
        hard = self._classifiers.is_hard(plan.cascade, request)
        return run_cascade(plan, plan.cascade, request, journey, self._clock, hard=hard, walk=walk)

    async def _walk(
        self, request: AnyRequest, journey: Journey, span: RequestSpan, plan: RoutePlan
    ) -> AsyncGenerator[Item]:
        recourse = Recourse(
            plan, self._settings, self._budget, partial(remaining_s, request, journey, self._clock)
        )
        told = 0
        while True:
            attempt: AttemptStream | Hedged | None = None
            try:
                permit = await self._take(recourse, request)
                if permit is None:
                    async with aclosing(self._wait(recourse, request, journey)) as waiting:
                        async for outcome in waiting:
                            if isinstance(outcome, Permit):
                                permit = outcome
                            else:
                                yield outcome
                assert permit is not None
                if recourse.at > told:
                    told = recourse.at
                    journey.notices.append(_fallback(plan, recourse))
                attempt = self._attempt(recourse, permit, request, journey, span)
                async with aclosing(attempt.events()) as events:
                    async for event in events:
                        yield event
            except StockpotError as error:
                if attempt is None:
                    recourse.unavailable(error)
                    continue
                if attempt.begun:
                    raise
                others, again = self._remaining(recourse, attempt.name)
                if wait_s := recourse.after(error, attempt.name, others=others, again=again):
                    await self._sleep(wait_s)
            else:
                return

    async def _wait(
        self, recourse: Recourse, request: AnyRequest, journey: Journey
    ) -> AsyncGenerator[Queued | Permit]:
        """Stand in line; the last thing that comes is the permit. The place is told from `_TELLS_AFTER_S` on.
        Raises QueueFull, DeadlineExceeded, and what `_take` raises."""
        generation = request.generation
        waiter = self._line.enter(recourse.step.model, generation.priority)
        entered_s = self._clock.monotonic()
        told = -1
        permit: Permit | None = None
        try:
            while permit is None:
                quiet_s = _TELLS_AFTER_S - (self._clock.monotonic() - entered_s)
                if quiet_s <= 0 and waiter.position != told:
                    told = waiter.position
                    yield Queued(told)
                patience_s = self._patience_s(recourse, entered_s)
                await waiter.turn(min(patience_s, quiet_s) if quiet_s > 0 else patience_s)
                if self._line.is_first(waiter):
                    permit = await self._take(recourse, request, in_line=True)
        finally:
            waiter.leave()
            journey.queue_s += self._clock.monotonic() - entered_s
        yield permit

    def _patience_s(self, recourse: Recourse, entered_s: float) -> float:
        waited_s = self._clock.monotonic() - entered_s
        left_s = recourse.left_s()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded(
                f"The deadline passed after {waited_s:.1f} s in the queue for {recourse.step.model!r}; allow"
                " more time, or try again later."
            )
        patience_s = self._settings.queue_timeout_s - waited_s
        if patience_s <= 0:
            raise QueueFull(
                f"No backend of {recourse.step.model!r} had room for {waited_s:.1f} s (queue_timeout_s); try"
                " again later.",
                retry_after_s=round(self._line.retry_after_s(), 1),
            )
        return min(patience_s, _LOOK_AGAIN_S, patience_s if left_s is None else left_s)

    async def _take(self, recourse: Recourse, request: AnyRequest, *, in_line: bool = False) -> Permit | None:
        """A permit on the best backend that may be asked; None: all are busy, or others wait for them.
        Raises where none may be asked at all."""
        model = recourse.step.model
        while True:
            free = self._free(recourse)
            if not free or (not in_line and self._line.is_before(model, request.generation.priority)):
                return None
            if len(free) > 1:
                candidates = [
                    Candidate(each.member.name, each.in_flight, each.member.backend.load().waiting)
                    for each in free
                ]
                names = await self._placement.order(model, request, candidates, recourse.plan.policy)
                by_name = {each.member.name: each for each in free}
                free = [by_name[name] for name in names if name in by_name]
            for condition in free:
                # Others may have come while the order was found.
                if condition.has_room() and condition.obstacle(model) is None:
                    return condition.take(model, self._given_back, recourse.blamed)

    def _free(self, recourse: Recourse) -> list[Condition]:
        """Who may be asked and has room: untried ones before those that failed, sound ones before ejected
        ones. Raises where nobody may be asked, however long one waits."""
        model = recourse.step.model
        serving = self._who_serves(model)
        if not serving:
            raise UnknownModel(f"No backend serves the model {model!r} now.", param="model")
        obstacles = {each.member.name: each.obstacle(model) for each in serving}
        ready = [each for each in serving if obstacles[each.member.name] is None]
        if not ready:
            raise _nobody(model, {name: why for name, why in obstacles.items() if why is not None})
        ready = [each for each in ready if each.member.name not in recourse.tried] or ready
        ready = [each for each in ready if not each.is_ejected(model)] or ready
        return [each for each in ready if each.has_room()]

    def _remaining(self, recourse: Recourse, failed: str) -> tuple[bool, bool]:
        """Whether backends not tried yet may be asked, and whether the one that failed may be again (at the
        time it asked for)."""
        model = recourse.step.model
        others = any(
            each.member.name != failed
            and each.member.name not in recourse.tried
            and each.obstacle(model) is None
            for each in self._who_serves(model)
        )
        condition = self._conditions.get(failed)
        again = (
            condition is not None and condition.member.backend.health().ready and condition.breaker.allows()
        )
        return others, again

    def _attempt(
        self, recourse: Recourse, permit: Permit, request: AnyRequest, journey: Journey, span: RequestSpan
    ) -> AttemptStream | Hedged:
        self._placement.placed(permit.model, request, permit.condition.member.name)
        first = AttemptStream(permit, _numbered(request, permit, journey), journey, span, self._clock)
        if self._settings.hedge_after_s is None:
            return first

        async def second() -> AttemptStream | None:
            recourse.tried.add(first.name)
            permit = await self._second_permit(recourse, request)
            if permit is None:
                return None
            self._placement.placed(permit.model, request, permit.condition.member.name)
            recourse.tried.add(permit.condition.member.name)
            numbered = _numbered(request, permit, journey)
            return AttemptStream(permit, numbered, journey, span, self._clock, hedge=True)

        return Hedged(first, second, self._settings.hedge_after_s)

    async def _second_permit(self, recourse: Recourse, request: AnyRequest) -> Permit | None:
        """On a backend that is free now and was not tried, if the budget has a retry left."""
        if not self._remaining(recourse, failed="")[0]:
            return None
        try:
            permit = await self._take(recourse, request)
        except StockpotError:
            # Nobody may be asked any more, while the first attempt is still under way.
            return None
        if permit is None:
            return None
        if permit.condition.member.name in recourse.tried or not self._budget.withdraw():
            permit.discard()
            return None
        return permit

    def _who_serves(self, model: str) -> tuple[Condition, ...]:
        now_s = self._clock.monotonic()
        if now_s >= self._serving_until_s:
            self._serving.clear()
            self._serving_until_s = now_s + _SERVING_KNOWN_FOR_S
        serving = self._serving.get(model)
        if serving is None:
            serving = tuple(each for each in self._conditions.values() if each.member.serves(model))
            self._serving[model] = serving
        return serving

    def _given_back(self, condition: Condition, model: str) -> None:
        """An attempt is over: judge the backend among its peers, and call who waits for it."""
        peers = [each.model(model).standing for each in self._who_serves(model)]
        condition.model(model).standing.judge(
            peers,
            ratio=self._settings.ejection_ratio,
            now_s=self._clock.monotonic(),
            out_s=self._settings.ejection_s,
        )
        if len(self._line):
            self._line.call(
                waited for waited in self._line.waited_for() if condition in self._who_serves(waited)
            )


def _numbered(request: AnyRequest, permit: Permit, journey: Journey) -> AnyRequest:
    """As the next attempt is sent: the first with the request's id, the others with `.1`, `.2` behind it.
    Servers take two with one id for the same request, or refuse the second while the first is being ended.
    The engine in this process is asked about by the request's own id, and keeps it."""
    again, journey.tries = journey.tries, journey.tries + 1
    if not again or permit.condition.member.settings is None:
        return request
    generation = request.generation
    return replace(request, generation=replace(generation, request_id=f"{generation.request_id}.{again}"))


def _nobody(model: str, obstacles: Mapping[str, Obstacle]) -> UpstreamError:
    waits = [why.retry_after_s for why in obstacles.values() if why.retry_after_s]
    whys = "; ".join(f"{name}: {why.reason}" for name, why in obstacles.items())
    first = next(iter(obstacles))
    return UpstreamError(
        f"No backend of {model!r} can be asked now ({whys}); try again later.",
        cause=obstacles[first].cause,
        backend=first,
        retry_after_s=min(waits) if waits else None,
    )


def _fallback(plan: RoutePlan, recourse: Recourse) -> Notice:
    cause = "" if recourse.cause is None else f" because of {recourse.cause}"
    return Notice("fallback", f"{recourse.step.model} answers instead of {plan.steps[0].model}{cause}.")

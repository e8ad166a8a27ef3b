"""The numbered path: limits, guards, routing, attempts, the account of it all; itself a backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from stockpot.allowances.allowance import NOTHING_HELD, Allowances, Claim, Hold, Spent
from stockpot.backends.backend import Backend, Health, Load, ModelCard
from stockpot.backends.cache_admin import CacheAdmin
from stockpot.clock import Clock
from stockpot.errors import ShuttingDown, UnknownModel, UnsupportedField
from stockpot.events import Completed, Delivery, Event
from stockpot.gateway.account import Account, Pricing
from stockpot.gateway.bounds import completion_bound_tokens, prompt_bound_tokens, with_output_bound
from stockpot.gateway.executor import Executor
from stockpot.gateway.guarding import Guarding, no_guards
from stockpot.gateway.journey import Journey
from stockpot.gateway.spans import RequestSpan, Spans
from stockpot.records import RecordObserver
from stockpot.requests import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    Generation,
    GenerationRequest,
)
from stockpot.routing.member import Member
from stockpot.routing.plan import RoutePlan
from stockpot.routing.router import Router
from stockpot.settings_gateway import EMBEDDED, AllowanceSettings

R = TypeVar("R", bound=AnyRequest)


@dataclass(frozen=True, slots=True)
class Course:
    """All that one configuration decides. A request keeps the one it began with; a reload makes another."""

    members: tuple[Member, ...]
    router: Router
    guards: Guarding
    pricing: Pricing
    allowances: AllowanceSettings
    hedges: bool = False


class Gateway(Backend):
    """Carries requests to the backends behind it.

    Starting and stopping the members is the composition root's: it knows which of them outlive a reload.
    """

    def __init__(
        self,
        course: Course,
        executor: Executor,
        allowances: Allowances,
        *,
        observers: Sequence[RecordObserver],
        spans: Spans,
        clock: Clock,
    ) -> None:
        self._course = course
        self._executor = executor
        self._allowances = allowances
        self._observers = tuple(observers)
        self._spans = spans
        self._clock = clock
        self._running = 0
        self._accepts = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def course(self) -> Course:
        return self._course

    def take(self, course: Course) -> None:
        """Requests that come from now on go by `course`."""
        self._course = course

    async def start(self) -> None:
        self._accepts = True

    async def stop(self, *, drain: bool) -> None:
        self._accepts = False
        if drain:
            await self._idle.wait()

    def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        return self._run(self._course, request)

    def unguarded(self, request: ChatRequest) -> AsyncGenerator[Event]:
        """For guards, which ask models on behalf of requests: the same way, but for the guards, and while the
        server stops too."""
        return self._run(replace(self._course, guards=no_guards()), request, within=True)

    async def _run(
        self, course: Course, request: GenerationRequest, *, within: bool = False
    ) -> AsyncGenerator[Event]:
        account = Account(request, Journey(self._clock.monotonic()), self._clock)
        span = self._begin(request, within=within)
        hold = NOTHING_HELD
        try:
            plan = self._planned(course, request, account.journey)
            request, hold = await self._admit(course, request, plan, account.journey)
            async with aclosing(self._events(course, request, plan, account.journey, span)) as events:
                async for event in events:
                    if isinstance(event, Completed):
                        event = self._delivered(course, account, event)
                    account.saw(event)
                    yield event
        except BaseException as error:
            account.failed(error)
            raise
        finally:
            self._end(course, account, hold, span)

    def _planned(self, course: Course, request: AnyRequest, journey: Journey) -> RoutePlan:
        plan = course.router.plan(request, self._allowances.standing(request.generation.caller))
        journey.notices.extend(plan.notices)
        return plan

    def _events(
        self,
        course: Course,
        request: GenerationRequest,
        plan: RoutePlan,
        journey: Journey,
        span: RequestSpan,
    ) -> AsyncGenerator[Event]:
        """Attempts, and guards over what comes back."""
        again = False

        def run() -> AsyncGenerator[Event]:
            nonlocal request, again
            if again:
                # A guard did not like the answer: the same one, kept, is no other.
                request = _without_recall(request)
            again = True
            return self._executor.run(plan, request, journey, span)

        return course.guards.answer(request, run, journey.notices)

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        course, account = self._course, Account(request, Journey(self._clock.monotonic()), self._clock)
        span = self._begin(request)
        hold = NOTHING_HELD
        try:
            plan = self._planned(course, request, account.journey)
            request, hold = await self._admit(course, request, plan, account.journey)
            vectors = await self._executor.embed(plan, request, account.journey, span)
            account.price(course.pricing)
            account.finished("stop")
        except BaseException as error:
            account.failed(error)
            raise
        else:
            return vectors
        finally:
            self._end(course, account, hold, span)

    def _begin(self, request: AnyRequest, *, within: bool = False) -> RequestSpan:
        if not self._accepts and not within:
            raise ShuttingDown("The server is stopping; send the request to another, or again in a moment.")
        span = self._spans.request(request)
        self._running += 1
        self._idle.clear()
        return span

    async def _admit(self, course: Course, request: R, plan: RoutePlan, journey: Journey) -> tuple[R, Hold]:
        """Reserve, then look at the input. What is raised here has cost nothing."""
        hold = NOTHING_HELD
        caller = request.generation.caller
        if caller.limits or caller.team_limits:
            request, claim = self._claim(course, request, plan, journey)
            hold = await self._allowances.reserve(caller, claim)
        try:
            return cast(R, await course.guards.check_input(request, journey.notices)), hold
        except BaseException:
            self._allowances.settle_soon(hold, Spent(0, 0))
            raise

    def _claim(self, course: Course, request: R, plan: RoutePlan, journey: Journey) -> tuple[R, Claim]:
        settings = course.allowances
        generation = request.generation
        ours, teams = generation.caller.limits, generation.caller.team_limits
        if not isinstance(request, EmbeddingRequest) and (ours.count_tokens or teams.count_tokens):
            request = cast(R, with_output_bound(request, settings.output_tokens_assumed, journey.notices))
        # Each try a guard asks for may be a cascade's two answers, and each of those be hedged. Retries are
        # not among them: they are few (retry_budget), fewer are billed, and those are settled afterwards.
        answers = course.guards.answers(request) * (1 + course.hedges) * (2 if plan.cascade else 1)
        prompt = prompt_bound_tokens(request, settings.bytes_per_token)
        output = completion_bound_tokens(request)
        nanousd = 0
        if ours.count_money or teams.count_money:
            nanousd = self._cost_bound(course, plan, prompt, output, generation.deadline_s or 0.0)
        return request, Claim(generation.request_id, (prompt + output) * answers, nanousd * answers)

    def _cost_bound(
        self, course: Course, plan: RoutePlan, prompt_tokens: int, output_tokens: int, held_s: float
    ) -> int:
        """On the dearest backend of the dearest model of the plan."""

        def dearest(model: str) -> int:
            return max(
                (
                    course.pricing.upper_bound(member, model, prompt_tokens, output_tokens, held_s=held_s)
                    for member in course.members
                    if member.serves(model)
                ),
                default=0,
            )

        models = [step.model for step in plan.steps] + ([plan.cascade.to] if plan.cascade else [])
        return max(map(dearest, models))

    def _delivered(self, course: Course, account: Account, event: Completed) -> Completed:
        """The last event with what is known of the way."""
        account.price(course.pricing)
        cost, journey = account.cost, account.journey
        delivery = Delivery(
            journey.model,
            journey.backend,
            len(journey.attempts),
            cost.nanousd,
            cost.source,
            journey.shared,
            tuple(journey.notices),
            journey.recalled,
        )
        return replace(event, timings=account.timings(event.timings), delivery=delivery)

    def _end(self, course: Course, account: Account, hold: Hold, span: RequestSpan) -> None:
        """Settle and tell the observers. Does not wait: it also runs while a request is being cancelled."""
        try:
            account.price(course.pricing)
            record = account.record()
            tokens = record.prompt_tokens + record.completion_tokens
            self._allowances.settle_soon(hold, Spent(tokens, record.cost.nanousd))
            span.end(record)
            for observer in self._observers:
                observer.observe_request(record)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def models(self) -> tuple[ModelCard, ...]:
        """All names a client may give: the routes' first, with the facts of the model they lead to."""
        course = self._course
        cards = {card.id: card for member in course.members for card in member.backend.models()}
        routes: dict[str, ModelCard] = {}
        for name in course.router.names():
            models = [step.model for step in course.router.plan(_asking(name), None).steps]
            known = next((cards[model] for model in models if model in cards), None)
            if known is not None:
                routes[name] = replace(known, id=name)
        return tuple(
            {**routes, **{name: card for name, card in cards.items() if name not in routes}}.values()
        )

    async def tokenize(
        self, model: str, content: str | ChatRequest, *, special: bool, tenant: str = ""
    ) -> list[int]:
        course = self._course
        refused: UnsupportedField | None = None
        for step in course.router.plan(_asking(model), None).steps:
            for member in sorted(course.members, key=lambda each: not each.backend.health().ready):
                if not member.serves(step.model):
                    continue
                if isinstance(content, ChatRequest):
                    content = replace(content, generation=replace(content.generation, model=step.model))
                try:
                    return await member.backend.tokenize(step.model, content, special=special, tenant=tenant)
                except UnsupportedField as error:
                    refused = error
        raise refused or UnknownModel(f"No backend serves the model {model!r} now.", param="model")

    def health(self) -> Health:
        if not self._accepts:
            return Health(False, "the server is starting or stopping")
        states = {member.name: member.backend.health() for member in self._course.members}
        if not states:
            return Health(False, "no backend is configured")
        if any(state.ready for state in states.values()):
            return Health(True)
        return Health(False, "; ".join(f"{name}: {state.reason}" for name, state in states.items()))

    def load(self) -> Load:
        return Load(running=self._running)

    def cache_stats(self) -> Mapping[str, Any]:
        engine = self._embedded()
        if engine is not None:
            return engine.backend.cache_stats()
        return {member.name: dict(member.backend.cache_stats()) for member in self._course.members}

    def cache_admin(self) -> CacheAdmin | None:
        engine = self._embedded()
        return None if engine is None else engine.backend.cache_admin()

    def _embedded(self) -> Member | None:
        return next((member for member in self._course.members if member.name == EMBEDDED), None)


def _without_recall(request: GenerationRequest) -> GenerationRequest:
    recall = replace(request.generation.recall, read=False)
    return replace(request, generation=replace(request.generation, recall=recall))


def _asking(model: str) -> ChatRequest:
    """A request for `model` by nobody in particular, to be routed and never sent."""
    return ChatRequest(Generation(model, "routing"), ())

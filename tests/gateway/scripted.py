"""Backends that do as they are told, and the parts around an executor, for its tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from stockpot.backends.backend import Backend, Health, ModelCard
from stockpot.clock import Clock, SystemClock
from stockpot.errors import FailureCause, UpstreamError
from stockpot.events import Completed, Delta, Event, Finished, FinishReason, Queued, Started, Timings, Usage
from stockpot.gateway.executor import Executor
from stockpot.gateway.journey import Journey
from stockpot.gateway.spans import no_spans
from stockpot.requests import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    Generation,
    Message,
    Sampling,
)
from stockpot.routing.member import Member
from stockpot.routing.plan import Candidate, RoutePlan, Step
from stockpot.settings_gateway import BackendSettings, CascadeSettings, Policy, ResilienceSettings


@dataclass(slots=True)
class Script:
    """One call: it fails with `error` after `words`, or ends. `gate` is waited for before the first word."""

    words: tuple[str, ...] = ("Hello", " there")
    error: Exception | None = None
    gate: asyncio.Event | None = None
    reason: FinishReason = "stop"
    detail: str | None = None
    usage: Usage | None = field(default_factory=lambda: Usage(10, {"upstream": 4}, 2))


class ScriptedBackend(Backend):
    """Plays its scripts in turn, then `usual`."""

    def __init__(self, *scripts: Script, models: Sequence[str] = ("m",)) -> None:
        self.scripts = list(scripts)
        self.usual = Script()
        self.requests: list[AnyRequest] = []
        self.running = self.closed_early = 0
        self.ready = True
        self._models = tuple(ModelCard(name, 0, "test", 1000, {}) for name in models)

    async def start(self) -> None: ...

    async def stop(self, *, drain: bool) -> None: ...

    def models(self) -> tuple[ModelCard, ...]:
        return self._models

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        script = self._next(request)
        self.running += 1
        over = False
        try:
            if script.error is not None and not script.words:
                over = True
                raise script.error
            yield Queued(0)
            yield Started(10, {}, 0.0)
            if script.gate is not None:
                await script.gate.wait()
            for word in script.words:
                await asyncio.sleep(0)
                yield Delta(0, word)
            over = True
            if script.error is not None:
                raise script.error
            yield Finished(0, script.reason, script.detail)
            if script.usage is not None:
                yield Completed(script.usage, Timings(0.0, 0.0, 0.0))
        finally:
            self.running -= 1
            self.closed_early += not over
            if not over:
                # Closing a connection is not done in an instant.
                await asyncio.sleep(0.001)

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        script = self._next(request)
        if script.error is not None:
            raise script.error
        return Embeddings(request.generation.model, ((1.0,),), 7)

    async def tokenize(
        self, model: str, content: str | ChatRequest, *, special: bool, tenant: str = ""
    ) -> list[int]:
        return []

    def health(self) -> Health:
        return Health(self.ready, "" if self.ready else "told so")

    def cache_stats(self) -> Mapping[str, Any]:
        return {}

    def _next(self, request: AnyRequest) -> Script:
        self.requests.append(request)
        return self.scripts.pop(0) if self.scripts else self.usual


class InOrder:
    """Places requests on the first candidate."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def order(
        self, model: str, request: AnyRequest, candidates: Sequence[Candidate], policy: Policy
    ) -> Sequence[str]:
        await asyncio.sleep(0)
        return [candidate.name for candidate in candidates]

    def placed(self, model: str, request: AnyRequest, name: str) -> None:
        self.sent.append(name)


def failure(cause: FailureCause, retry_after_s: float | None = None) -> UpstreamError:
    return UpstreamError(f"told to: {cause}", cause=cause, backend="x", retry_after_s=retry_after_s)


def failing(cause: FailureCause, *words: str, retry_after_s: float | None = None) -> Script:
    return Script(words=words, error=failure(cause, retry_after_s))


def member(name: str, backend: Backend, **settings: Any) -> Member:
    return Member(name, backend, BackendSettings(url="http://127.0.0.1:1", **settings))


def chat(text: str = "Hi", *, temperature: float = 1.0, **generation: Any) -> ChatRequest:
    made = Generation("m", "r", sampling=Sampling(temperature=temperature), stream=True, **generation)
    return ChatRequest(made, (Message("user", text),))


def plan(*steps: Step, cascade: CascadeSettings | None = None) -> RoutePlan:
    return RoutePlan("m", steps or (Step("m"),), "prefix", cascade)


class Rig:
    """An executor over scripted backends, named a, b, c, ... in their order."""

    def __init__(
        self,
        *backends: ScriptedBackend,
        clock: Clock | None = None,
        max_concurrency: int = 8,
        sleep: Callable[[float], Any] | None = None,
        **settings: Any,
    ) -> None:
        self.clock = clock or SystemClock()
        self.slept_s: list[float] = []
        self.placement = InOrder()
        self.settings = ResilienceSettings(**settings)
        self.members = [
            member(name, backend, max_concurrency=max_concurrency)
            for name, backend in zip("abcdef", backends, strict=False)
        ]

        async def note(seconds: float) -> None:
            self.slept_s.append(seconds)

        self.executor = Executor(self.members, self.placement, self.settings, self.clock, sleep=sleep or note)

    def journey(self) -> Journey:
        return Journey(self.clock.monotonic())

    async def ask(
        self,
        request: ChatRequest | None = None,
        way: RoutePlan | None = None,
        journey: Journey | None = None,
        events: list[Event] | None = None,
    ) -> tuple[str, Journey]:
        """The text of the answer."""
        journey = journey or self.journey()
        request = request or chat()
        events = [] if events is None else events
        span = no_spans().request(request)
        async with aclosing(self.executor.run(way or plan(), request, journey, span)) as stream:
            async for event in stream:
                events.append(event)
        return "".join(event.text for event in events if isinstance(event, Delta)), journey

    def in_flight(self) -> int:
        return sum(report.in_flight for report in self.executor.conditions())


def causes(journey: Journey) -> list[tuple[str, FailureCause | None]]:
    return [(attempt.backend, attempt.cause) for attempt in journey.attempts]


def with_schema(request: ChatRequest, output_format: Any) -> ChatRequest:
    return replace(request, generation=replace(request.generation, output_format=output_format))


async def eventually(condition: Callable[[], object]) -> None:
    """Until it holds; the bound is only there so that a test never hangs."""
    async with asyncio.timeout(20):
        # What is waited for is the state of the real parts, which announce nothing to tests.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)

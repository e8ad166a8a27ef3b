"""What was used is counted, though nobody saw an answer; what may be used is reserved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from tests.gateway.scripted import (
    InOrder,
    Rig,
    Script,
    ScriptedBackend,
    chat,
    eventually,
    failure,
    member,
    plan,
)

from stockpot.accounts.prices import PriceBook
from stockpot.allowances.allowance import Allowances
from stockpot.backends.backend import Backend
from stockpot.caller import Caller, Limits
from stockpot.clock import VirtualClock
from stockpot.errors import DeadlineExceeded, RequestError, StockpotError, UpstreamError
from stockpot.events import Completed, Delta, Event, Finished, Queued, Started, Timings, Usage
from stockpot.gateway.bounds import completion_bound_tokens, prompt_bound_tokens
from stockpot.gateway.executor import Executor
from stockpot.gateway.gateway import Course, Gateway
from stockpot.gateway.guarding import no_guards
from stockpot.gateway.spans import no_spans
from stockpot.records import Attempt, RequestRecord
from stockpot.requests import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    Generation,
    GenerationRequest,
    OutputFormat,
    Tool,
)
from stockpot.routing.member import Member
from stockpot.routing.router import Router
from stockpot.settings_gateway import AllowanceSettings, ResilienceSettings

pytestmark = pytest.mark.anyio

PROMPT = "four" * 100  # a hundred tokens, by estimate


class Silent(ScriptedBackend):
    """Says nothing until `speaks`; then it fails with `error`, or answers. As servers do that were asked for
    an answer in one piece."""

    running: int

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.speaks = asyncio.Event()
        self.error = error
        self.vectors_told = 0

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        await self._answer()
        async for event in super().generate(request):
            yield event

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        await self._answer()
        return Embeddings("m", ((1.0,),) * len(request.inputs), self.vectors_told)

    async def _answer(self) -> None:
        self.running += 1
        try:
            await self.speaks.wait()
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error


def whole(**generation: Any) -> ChatRequest:
    request = chat(PROMPT, **generation)
    return replace(request, generation=replace(request.generation, stream=False))


async def left_early(
    request: ChatRequest, lasted_s: float, *, clock: VirtualClock | None = None, **settings: Any
) -> Attempt:
    """The attempt of a request whose client left before anything came."""
    clock = clock or VirtualClock()
    backend = Silent()
    rig = Rig(backend, clock=clock)
    rig.executor.reconfigure([member("a", backend, **settings)], rig.settings)
    journey = rig.journey()
    task = asyncio.create_task(rig.ask(request, journey=journey))
    await eventually(lambda: backend.running)
    clock.advance(lasted_s)
    task.cancel()
    await asyncio.wait((task,))
    (attempt,) = journey.attempts
    assert attempt.cause == "cancelled" and not rig.in_flight()
    return attempt


async def test_an_answer_in_one_piece_that_is_left_early_is_counted() -> None:
    ours = await left_early(whole(max_tokens=1_000), 1.0, server="vllm")
    assert ours.estimated and ours.prompt_tokens == 100
    assert 0 < ours.completion_tokens < 1_000  # as much as is written in the time
    assert (await left_early(whole(max_tokens=50), 1.0, server="vllm")).completion_tokens == 50
    # A provider may go on to the end.
    assert (await left_early(whole(max_tokens=1_000), 0.1)).completion_tokens == 1_000
    assert (await left_early(whole(max_tokens=1_000, choices=3), 0.1)).completion_tokens == 3_000
    assert (await left_early(whole(), 1.0)).completion_tokens > 0


async def test_of_a_stream_that_has_not_begun_the_prompt_is_counted() -> None:
    attempt = await left_early(chat(PROMPT, max_tokens=1_000), 1.0)
    assert (attempt.prompt_tokens, attempt.completion_tokens, attempt.estimated) == (100, 0, True)


async def test_tools_parts_and_fields_passed_on_are_estimated_too() -> None:
    request = replace(
        chat(PROMPT, extras={"documents": ["d" * 400], "metadata": {"m": "x" * 4_000}}),
        tools=(Tool("f", "t" * 400),),
        template_arguments={"a": "b" * 400},
    )
    attempt = await left_early(request, 1.0)
    assert 400 <= attempt.prompt_tokens < 500


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (failure("timeout"), True),
        (failure("format"), True),
        (failure("truncated"), True),
        (failure("reset"), True),
        (DeadlineExceeded("late"), True),
        (failure("connect"), False),
        (failure("server_error"), False),
        (RequestError("no"), False),
        (UpstreamError("no", cause="invalid_request", backend="a", upstream_status=400), False),
    ],
)
async def test_what_was_sent_and_not_refused_is_counted(error: StockpotError, counted: bool) -> None:
    backend = Silent(error)
    backend.speaks.set()
    rig = Rig(backend, retries=0)
    journey = rig.journey()
    with pytest.raises(type(error)):
        await rig.ask(whole(max_tokens=7), journey=journey)
    (attempt,) = journey.attempts
    assert attempt.prompt_tokens == (100 if counted else 0) and attempt.estimated is counted
    assert attempt.completion_tokens <= 7 * counted


async def test_what_never_was_sent_is_not_counted() -> None:
    clock = VirtualClock()
    rig = Rig(ScriptedBackend(), clock=clock)
    journey = rig.journey()
    clock.advance(100)
    with pytest.raises(DeadlineExceeded):
        await rig.ask(whole(deadline_s=10.0), journey=journey)
    assert not any(attempt.prompt_tokens for attempt in journey.attempts)


async def test_an_engine_of_ours_says_itself_when_it_begins() -> None:
    backend = Silent()
    rig = Rig(backend)
    rig.executor.reconfigure([Member("embedded", backend, None)], rig.settings)
    journey = rig.journey()
    task = asyncio.create_task(rig.ask(whole(), journey=journey))
    await eventually(lambda: backend.running)
    task.cancel()
    await asyncio.wait((task,))
    assert journey.attempts[0].prompt_tokens == 0


async def test_the_loser_of_a_hedge_is_counted() -> None:
    rig = Rig(slow := Silent(), ScriptedBackend(), hedge_after_s=0.001)
    _, journey = await rig.ask(whole(max_tokens=9))
    lost, won = sorted(journey.attempts, key=lambda attempt: attempt.backend)
    assert won.cause is None and lost.cause == "cancelled" and not slow.running
    assert (lost.prompt_tokens, lost.completion_tokens) == (100, 9)


async def test_embeddings_that_are_left_or_not_counted_are_estimated() -> None:
    request = EmbeddingRequest(Generation("m", "r"), (PROMPT, PROMPT))
    rig = Rig(backend := Silent())
    for speaks in (False, True):
        journey = rig.journey()
        task = asyncio.create_task(rig.executor.embed(plan(), request, journey, no_spans().request(request)))
        await eventually(lambda: backend.running)
        if speaks:
            backend.speaks.set()
            assert (await task).prompt_tokens == 200
        else:
            task.cancel()
            await asyncio.wait((task,))
        (attempt,) = journey.attempts
        assert attempt.prompt_tokens == 200 and attempt.estimated


async def test_tokens_written_for_an_hour_are_told_apart() -> None:
    usage = Usage(100, {}, 2, promised_tokens={300: 30, 3600: 15})
    _, journey = await Rig(ScriptedBackend(Script(usage=usage))).ask()
    (attempt,) = journey.attempts
    assert (attempt.written_tokens, attempt.written_1h_tokens) == (45, 15)


def test_all_that_may_reach_the_prompt_is_reserved() -> None:
    plain = chat("Hi")
    bound = prompt_bound_tokens(plain, 1.0)
    text = "x" * 1_000
    larger: list[AnyRequest] = [
        replace(plain, tools=(Tool("f", text),)),
        replace(plain, template_arguments={"a": text}),
        replace(plain, messages=(replace(plain.messages[0], name=text),)),
        chat("Hi", extras={"documents": [text]}),
        chat("Hi", output_format=OutputFormat("json_schema", {"description": text})),
        CompletionRequest(Generation("m", "r", extras={"suffix": text}), "Hi"),
        EmbeddingRequest(Generation("m", "r", extras={"instruction": text}), ("Hi",)),
    ]
    assert all(prompt_bound_tokens(request, 1.0) >= bound + 1_000 - 32 for request in larger)
    predicted = chat("Hi", max_tokens=5, extras={"prediction": {"type": "content", "content": text}})
    assert completion_bound_tokens(predicted) >= 1_005


class Records:
    """Keeps what it observes."""

    def __init__(self) -> None:
        self.all: list[RequestRecord] = []

    def observe_request(self, record: RequestRecord) -> None:
        self.all.append(record)


class Tries:
    """Guards that let all pass, and may ask `tries` times."""

    def __init__(self, tries: int) -> None:
        self._tries = tries
        self._open = no_guards()
        self.check_input, self.answer = self._open.check_input, self._open.answer

    def answers(self, request: AnyRequest) -> int:
        del request
        return self._tries


def gateway_of(
    backend: Backend, clock: VirtualClock, *, tries: int = 1, hedges: bool = False, **settings: Any
) -> tuple[Gateway, Records]:
    members = (member("a", backend, **settings),)
    book = PriceBook({"a": settings_of} if (settings_of := members[0].settings) else {})
    course = Course(
        members,
        Router({}, default_policy="prefix", serves=lambda model: model == "m"),
        Tries(tries),
        book,
        AllowanceSettings(),
        hedges,
    )
    executor = Executor(members, InOrder(), ResilienceSettings(single_flight=False), clock)
    records = Records()
    gateway = Gateway(
        course,
        executor,
        Allowances(AllowanceSettings(), clock),
        observers=(records,),
        spans=no_spans(),
        clock=clock,
    )
    return gateway, records


def of_caller(request: ChatRequest, limits: Limits) -> ChatRequest:
    return replace(request, generation=replace(request.generation, caller=Caller(key_id="k", limits=limits)))


async def events_of(gateway: Gateway, request: GenerationRequest) -> list[Event]:
    return [event async for event in gateway.generate(request)]


async def test_who_leaves_early_again_and_again_uses_up_its_allowance() -> None:
    backend = Silent()
    gateway, _ = gateway_of(backend, VirtualClock())
    await gateway.start()
    request = of_caller(whole(max_tokens=200), Limits(tokens_per_day=3_000))
    made = 0
    for number in range(10):
        numbered = replace(request, generation=replace(request.generation, request_id=str(number)))
        task = asyncio.create_task(events_of(gateway, numbered))
        await eventually(lambda task=task: backend.running or task.done())
        made += not task.done()
        task.cancel()
        await asyncio.wait((task,))
        await eventually(lambda: not gateway.load().running)
    assert 5 <= made < 10
    await gateway.stop(drain=True)


@pytest.mark.parametrize(("tries", "hedges", "answers"), [(1, False, 1), (2, False, 2), (2, True, 4)])
async def test_reserved_is_what_every_answer_costs(tries: int, hedges: bool, answers: int) -> None:
    request = whole(max_tokens=1_000)
    each = prompt_bound_tokens(request, 1.0) + 1_000
    for spare, passes in ((0, True), (-1, False)):
        gateway, _ = gateway_of(ScriptedBackend(), VirtualClock(), tries=tries, hedges=hedges)
        await gateway.start()
        limited = of_caller(request, Limits(tokens_per_day=answers * each + spare))
        if passes:
            await events_of(gateway, limited)
        else:
            with pytest.raises(RequestError):
                await events_of(gateway, limited)
        await gateway.stop(drain=True)


async def test_times_are_those_of_the_request_not_of_its_last_attempt() -> None:
    clock = VirtualClock()

    class Slow(ScriptedBackend):
        """Works 2 s before its first word and 1 s after its last; fails the first time."""

        async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
            clock.advance(2)
            yield Queued(0)
            if not self.requests:
                self.requests.append(request)
                raise failure("truncated")
            yield Started(10, {}, 0.5)
            yield Delta(0, "Hi")
            yield Finished(0, "stop")
            clock.advance(1)
            yield Completed(Usage(10, {}, 1), Timings(0.5, 2.0, 3.0))

    gateway, records = gateway_of(Slow(), clock)
    await gateway.start()
    last = (await events_of(gateway, chat()))[-1]
    assert isinstance(last, Completed)
    assert last.timings == Timings(0.5, 4.0, 5.0)
    (record,) = records.all
    assert (record.queue_s, record.ttft_s, record.total_s) == (0.5, 4.0, 5.0)
    await gateway.stop(drain=True)

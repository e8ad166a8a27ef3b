"""Failover, retries, waiting and what is counted, through the executor."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway.scripted import (
    Rig,
    Script,
    ScriptedBackend,
    causes,
    chat,
    eventually,
    failing,
    member,
    plan,
)

from stockpot.clock import VirtualClock
from stockpot.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    FailureCause,
    QueueFull,
    RequestError,
    ShuttingDown,
    UnknownModel,
    UpstreamError,
)
from stockpot.events import Delta, Event, Finished, Queued
from stockpot.gateway.spans import no_spans
from stockpot.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Generation, Priority
from stockpot.routing.plan import Step

pytestmark = pytest.mark.anyio

PASSING: list[FailureCause] = [
    "connect",
    "reset",
    "timeout",
    "overloaded",
    "rate_limited",
    "server_error",
    "format",
    "truncated",
    "unauthenticated",
    "forbidden",
    "not_found",
]


@pytest.mark.parametrize("cause", PASSING)
async def test_a_failure_before_the_first_token_is_tried_elsewhere(cause: FailureCause) -> None:
    rig = Rig(ScriptedBackend(failing(cause)), ScriptedBackend())
    text, journey = await rig.ask()
    assert text == "Hello there"
    assert causes(journey) == [("a", cause), ("b", None)]
    assert (journey.backend, journey.model) == ("b", "m")
    assert journey.attempts[1].prompt_tokens == 10 and journey.attempts[1].cached_tokens == 4
    assert not rig.slept_s and not rig.in_flight()


@pytest.mark.parametrize("error", [RequestError("no"), ContextLengthExceeded("no"), DeadlineExceeded("no")])
async def test_what_is_the_requests_own_fault_is_not_retried(error: RequestError) -> None:
    rig = Rig(ScriptedBackend(Script((), error)), ScriptedBackend())
    with pytest.raises(type(error)):
        await rig.ask()
    assert rig.placement.sent == ["a"]


async def test_nothing_is_spliced_once_the_first_token_came() -> None:
    rig = Rig(ScriptedBackend(failing("truncated", "Hel")), ScriptedBackend())
    events: list[Event] = []
    journey = rig.journey()
    with pytest.raises(UpstreamError):
        await rig.ask(journey=journey, events=events)
    assert [event.text for event in events if isinstance(event, Delta)] == ["Hel"]
    assert causes(journey) == [("a", "truncated")]
    lost = journey.attempts[0]
    assert lost.estimated and lost.prompt_tokens == 10 and lost.completion_tokens == 1


async def test_an_answer_that_ends_in_error_before_it_began_is_tried_elsewhere() -> None:
    broken = Script((), reason="error", detail="the engine tripped")
    rig = Rig(ScriptedBackend(broken), ScriptedBackend())
    text, journey = await rig.ask()
    assert text == "Hello there" and causes(journey) == [("a", "server_error"), ("b", None)]


async def test_an_answer_that_ends_in_error_after_it_began_is_counted() -> None:
    rig = Rig(ScriptedBackend(Script(reason="error")), ScriptedBackend())
    events: list[Event] = []
    _, journey = await rig.ask(events=events)
    assert any(isinstance(event, Finished) and event.reason == "error" for event in events)
    assert causes(journey) == [("a", "server_error")]


async def test_a_stream_without_an_end_is_an_error() -> None:
    rig = Rig(ScriptedBackend(Script(usage=None)))
    with pytest.raises(UpstreamError) as caught:
        await rig.ask()
    assert caught.value.cause == "truncated"


async def test_the_only_backend_is_tried_again_after_a_while() -> None:
    rig = Rig(ScriptedBackend(failing("reset"), failing("server_error")), retries=2)
    text, journey = await rig.ask()
    assert text == "Hello there" and len(journey.attempts) == 3 and len(rig.slept_s) == 2


async def test_a_refused_key_is_not_tried_again_on_the_same_backend() -> None:
    rig = Rig(ScriptedBackend(failing("unauthenticated")))
    with pytest.raises(UpstreamError):
        await rig.ask()
    assert rig.placement.sent == ["a"]


async def test_retries_end() -> None:
    rig = Rig(ScriptedBackend(*[failing("reset")] * 9), retries=2, breaker_failures=99)
    with pytest.raises(UpstreamError) as caught:
        await rig.ask()
    assert caught.value.cause == "reset" and rig.placement.sent == ["a"] * 3


async def test_retry_after_is_honoured_and_others_leave_the_backend_alone() -> None:
    clock = VirtualClock()

    async def sleep(seconds: float) -> None:
        assert seconds >= 3
        with pytest.raises(UpstreamError) as caught:
            await rig.ask()
        assert caught.value.cause == "rate_limited" and caught.value.retry_after_s == 3
        clock.advance(seconds)

    rig = Rig(ScriptedBackend(failing("rate_limited", retry_after_s=3)), clock=clock, sleep=sleep)
    text, _ = await rig.ask()
    assert text == "Hello there" and rig.placement.sent == ["a", "a"]


async def test_retry_after_beyond_the_deadline_is_told_to_the_client() -> None:
    rig = Rig(ScriptedBackend(failing("rate_limited", retry_after_s=30)))
    with pytest.raises(UpstreamError) as caught:
        await rig.ask(chat(deadline_s=10.0))
    assert caught.value.retry_after_s == 30 and not rig.slept_s


async def test_the_deadline_passed_on_is_what_is_left() -> None:
    clock = VirtualClock()
    rig = Rig(ScriptedBackend(failing("reset")), backend := ScriptedBackend(), clock=clock)
    journey = rig.journey()
    clock.advance(2)
    await rig.ask(chat(deadline_s=10.0), journey=journey)
    assert backend.requests[0].generation.deadline_s == 8
    clock.advance(100)
    with pytest.raises(DeadlineExceeded):
        await rig.ask(chat(deadline_s=10.0), journey=journey)


async def test_fallbacks_are_taken_for_their_causes() -> None:
    way = plan(
        Step("m"),
        Step("n", frozenset[FailureCause]({"rate_limited"})),
        Step("o", frozenset[FailureCause]({"context_overflow"})),
    )
    rig = Rig(
        ScriptedBackend(Script((), ContextLengthExceeded("long"))),
        ScriptedBackend(models=("n",)),
        last := ScriptedBackend(models=("o",)),
    )
    _, journey = await rig.ask(way=way)
    assert causes(journey) == [("a", "context_overflow"), ("c", None)]
    assert last.requests[0].generation.model == journey.model == "o"
    assert [notice.kind for notice in journey.notices] == ["fallback"]


async def test_a_model_nobody_serves() -> None:
    with pytest.raises(UnknownModel):
        await Rig(ScriptedBackend(models=("other",))).ask()


async def test_an_open_breaker_keeps_requests_away_until_its_probe() -> None:
    clock = VirtualClock()
    backend = ScriptedBackend(*[failing("connect")] * 3)
    rig = Rig(backend, clock=clock, retries=0, breaker_failures=3, breaker_open_s=5.0)
    for _ in range(3):
        with pytest.raises(UpstreamError):
            await rig.ask()
    with pytest.raises(UpstreamError) as caught:
        await rig.ask()
    assert caught.value.cause == "connect" and 0 < (caught.value.retry_after_s or 0) <= 5
    assert len(backend.requests) == 3 and rig.executor.condition("a").breaker == "open"
    clock.advance(5)
    assert (await rig.ask())[0] == "Hello there"
    report = rig.executor.condition("a")
    assert report.breaker == "closed" and report.failures == {"connect": 3} and report.attempts == 4


async def test_a_client_that_leaves_closes_the_upstream_and_what_was_billed_is_counted() -> None:
    backend = ScriptedBackend(Script(gate=asyncio.Event()), Script(words=("a", "b", "c")))
    rig = Rig(backend)
    waiting = rig.journey()
    task = asyncio.create_task(rig.ask(journey=waiting))
    await eventually(lambda: backend.running)
    task.cancel()
    await asyncio.wait((task,))
    assert causes(waiting) == [("a", "cancelled")] and waiting.attempts[0].prompt_tokens == 10

    journey = rig.journey()
    stream = rig.executor.run(plan(), chat(), journey, no_spans().request(chat()))
    async for event in stream:
        if isinstance(event, Delta):
            break
    await stream.aclose()
    assert causes(journey) == [("a", "cancelled")] and journey.attempts[0].completion_tokens == 1
    assert not backend.running and backend.closed_early == 2 and not rig.in_flight()
    assert rig.executor.condition("a").breaker == "closed"


async def test_a_stream_left_after_its_last_event_is_complete() -> None:
    rig = Rig(ScriptedBackend())
    journey = rig.journey()
    async with aclosing(rig.executor.run(plan(), chat(), journey, no_spans().request(chat()))) as stream:
        async for event in stream:
            if type(event).__name__ == "Completed":
                assert len(journey.attempts) == 1
                break
    assert causes(journey) == [("a", None)]


async def test_waiting_requests_go_by_priority_and_are_told_their_place() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate))
    rig = Rig(backend, max_concurrency=1)
    order: list[str] = []
    positions: list[int] = []
    told: dict[str, list[Event]] = {}

    async def ask(name: str, priority: Priority) -> None:
        events: list[Event] = told.setdefault(name, [])
        _, journey = await rig.ask(chat(priority=priority), events=events)
        order.append(name)
        if name == "second normal":
            positions.extend(event.position for event in events if isinstance(event, Queued))
            assert journey.queue_s > 0

    asked: list[tuple[str, Priority]] = [
        ("running", "normal"),
        ("low", "low"),
        ("normal", "normal"),
        ("second normal", "normal"),
        ("high", "high"),
    ]
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for index, (name, priority) in enumerate(asked):
            group.create_task(ask(name, priority))
            await eventually(
                lambda index=index: backend.running + sum(rig.executor.waiting().values()) == index + 1
            )
        await eventually(lambda: told["second normal"])
        gate.set()
    assert order == ["running", "high", "normal", "second normal", "low"]
    # As it came, or behind the urgent one that came later.
    assert positions[0] in (1, 2) and not rig.in_flight()
    assert sum(rig.executor.waiting().values()) == 0


async def test_a_full_queue_sheds_the_low_first() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate))
    rig = Rig(backend, max_concurrency=1, queue_limit=4)
    tasks = [asyncio.create_task(rig.ask())]
    await eventually(lambda: backend.running)

    async def enter(priority: Priority) -> asyncio.Task[object]:
        before = sum(rig.executor.waiting().values())
        task: asyncio.Task[object] = asyncio.create_task(rig.ask(chat(priority=priority)))
        await eventually(lambda: task.done() or sum(rig.executor.waiting().values()) > before)
        return task

    low = await enter("low")
    others = [await enter("normal") for _ in range(3)]
    with pytest.raises(QueueFull) as caught:
        await rig.ask(chat(priority="low"))
    assert (caught.value.retry_after_s or 0) >= 1
    with pytest.raises(QueueFull):
        await rig.ask(chat(priority="low"))
    # The queue is full: who is more urgent takes the place of the least urgent.
    others.append(asyncio.create_task(rig.ask(chat(priority="high"))))
    with pytest.raises(QueueFull):
        await low
    gate.set()
    await asyncio.gather(*tasks, *others)
    assert not rig.in_flight()


async def test_waiting_ends_at_the_deadline_the_timeout_and_the_shutdown() -> None:
    backend = ScriptedBackend(Script(gate=asyncio.Event()))
    rig = Rig(backend, max_concurrency=1, queue_timeout_s=0.05)
    running = asyncio.create_task(rig.ask())
    await eventually(lambda: backend.running)
    with pytest.raises(QueueFull):
        await rig.ask()
    with pytest.raises(DeadlineExceeded):
        await rig.ask(chat(deadline_s=0.02))
    rig.executor.reconfigure(rig.members, rig.settings.model_copy(update={"queue_timeout_s": 30.0}))
    waiting = asyncio.create_task(rig.ask())
    await eventually(lambda: sum(rig.executor.waiting().values()))
    await rig.executor.stop()
    with pytest.raises(ShuttingDown):
        await waiting
    running.cancel()
    await asyncio.wait((running,))


async def test_reconfiguring_keeps_what_is_known_and_disturbs_nothing() -> None:
    gate = asyncio.Event()
    first = ScriptedBackend(failing("connect"), Script(gate=gate))
    rig = Rig(first, retries=0)
    with pytest.raises(UpstreamError):
        await rig.ask()
    running = asyncio.create_task(rig.ask())
    await eventually(lambda: first.running)
    second = ScriptedBackend()
    rig.executor.reconfigure([rig.members[0], member("z", second)], rig.settings)
    assert rig.executor.condition("a").failures == {"connect": 1}
    rig.executor.reconfigure([member("z", second)], rig.settings)
    assert [report.name for report in rig.executor.conditions()] == ["z"]
    gate.set()
    assert (await running)[0] == "Hello there"
    assert (await rig.ask())[1].backend == "z"


async def test_embeddings_go_the_same_way() -> None:
    rig = Rig(ScriptedBackend(failing("reset")), ScriptedBackend())
    request = EmbeddingRequest(Generation("m", "r"), ("text",))
    journey = rig.journey()
    vectors = await rig.executor.embed(plan(), request, journey, no_spans().request(request))
    assert vectors.vectors == ((1.0,),) and causes(journey) == [("a", "reset"), ("b", None)]
    assert journey.attempts[1].prompt_tokens == 7 and not rig.in_flight()


async def test_a_much_slower_backend_is_ejected_and_comes_back() -> None:
    clock = VirtualClock()

    class Slow(ScriptedBackend):
        async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
            clock.advance(2.0)
            async for event in super().generate(request):
                yield event

    rig = Rig(Slow(), ScriptedBackend(), clock=clock, ejection_ratio=3.0, ejection_s=30.0)
    for name in ["a", "b"] * 10:
        rig.members.sort(key=lambda each, name=name: each.name != name)
        rig.executor.reconfigure(rig.members, rig.settings)
        await rig.ask()
    assert rig.executor.condition("b").ejected == ()
    rig.executor.reconfigure(sorted(rig.members, key=lambda each: each.name), rig.settings)
    await rig.ask()
    assert rig.executor.condition("a").ejected == ("m",)
    rig.placement.sent.clear()
    await rig.ask()
    clock.advance(30)
    await rig.ask()
    assert rig.placement.sent == ["b", "a"]


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([None, 0.0005]))
def test_no_permit_is_lost_whatever_fails_or_leaves(seed: int, shared: bool, hedge: float | None) -> None:
    chance = random.Random(seed)

    def script() -> Script:
        kind = chance.randrange(5)
        if kind == 0:
            return failing(chance.choice(PASSING))
        if kind == 1:
            return failing("truncated", "x")
        return Script(reason=chance.choice(("stop", "error", "length")))

    async def scenario() -> None:
        backends = [ScriptedBackend(*[script() for _ in range(20)]) for _ in range(3)]
        rig = Rig(*backends, max_concurrency=2, hedge_after_s=hedge, queue_limit=6, breaker_open_s=0.001)

        async def one() -> None:
            request = chat(temperature=0.0 if shared else 1.0, priority=chance.choice(("high", "low")))
            try:
                async with asyncio.timeout(chance.choice((0.0, 0.001, 0.003, 5))):
                    await rig.ask(request)
            except (UpstreamError, RequestError, TimeoutError):
                pass

        async with asyncio.timeout(60):
            await asyncio.gather(*(one() for _ in range(12)))
            await eventually(lambda: not rig.in_flight())
        assert not any(backend.running for backend in backends)
        assert sum(rig.executor.waiting().values()) == 0

    asyncio.run(scenario())

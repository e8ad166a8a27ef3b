"""Single flight and hedging, through the executor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import anyio
import pytest
from tests.gateway.scripted import Rig, Script, ScriptedBackend, causes, chat, eventually, failing, plan

from stockpot.caller import Caller
from stockpot.clock import VirtualClock
from stockpot.errors import DeadlineExceeded, UpstreamError
from stockpot.events import Event, Finished
from stockpot.gateway.journey import Journey
from stockpot.gateway.single_flight import identity_of
from stockpot.gateway.spans import no_spans
from stockpot.requests import ChatRequest, CompletionRequest, Priority, Tool

pytestmark = pytest.mark.anyio


async def test_identical_requests_are_made_once_and_paid_once() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate))
    rig = Rig(backend)
    tasks = [asyncio.create_task(rig.ask(chat(temperature=0.0))) for _ in range(3)]
    await eventually(lambda: backend.running)
    gate.set()
    answers = await asyncio.gather(*tasks)
    assert [text for text, _ in answers] == ["Hello there"] * 3
    assert len(backend.requests) == 1
    journeys = [journey for _, journey in answers]
    assert [journey.shared for journey in journeys] == [False, True, True]
    assert [len(journey.attempts) for journey in journeys] == [1, 0, 0]
    assert {journey.backend for journey in journeys} == {"a"}
    assert all(journey.first_token_s is not None for journey in journeys)


async def test_samples_are_not_shared_nor_are_those_of_other_tenants() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend()
    backend.usual = Script(gate=gate)
    rig = Rig(backend)
    requests = [chat(), chat(), chat(temperature=0.0, tenant="one"), chat(temperature=0.0, tenant="two")]
    tasks = [asyncio.create_task(rig.ask(request)) for request in requests]
    await eventually(lambda: backend.running == 4)
    gate.set()
    await asyncio.gather(*tasks)


async def test_the_first_may_leave_and_the_next_pays() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate))
    rig = Rig(backend)
    journeys = [rig.journey() for _ in range(3)]
    tasks = [asyncio.create_task(rig.ask(chat(temperature=0.0), journey=each)) for each in journeys]
    await eventually(lambda: backend.running)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    assert backend.running == 1
    gate.set()
    await asyncio.gather(*tasks[1:])
    assert [len(journey.attempts) for journey in journeys] == [0, 1, 0]
    assert [journey.shared for journey in journeys] == [True, False, True]


async def test_the_last_to_leave_cancels() -> None:
    backend = ScriptedBackend(Script(gate=asyncio.Event()))
    rig = Rig(backend)
    journeys = [rig.journey(), rig.journey()]
    tasks = [asyncio.create_task(rig.ask(chat(temperature=0.0), journey=each)) for each in journeys]
    await eventually(lambda: backend.running)
    for task in tasks:
        task.cancel()
        await asyncio.wait((task,))
    assert not backend.running and not rig.in_flight()
    assert causes(journeys[0]) == [] and causes(journeys[1]) == [("a", "cancelled")]


async def test_errors_go_to_all() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(("x",), failing("truncated").error, gate))
    rig = Rig(backend)
    tasks = [asyncio.create_task(rig.ask(chat(temperature=0.0))) for _ in range(3)]
    await eventually(lambda: backend.running)
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [UpstreamError] * 3 and len(backend.requests) == 1


async def test_a_late_one_gets_all_and_a_slow_one_holds_nobody_up() -> None:
    words = tuple(f"{index} " for index in range(200))
    gate = asyncio.Event()
    rig = Rig(ScriptedBackend(Script(words, gate=gate)))
    span_request = chat(temperature=0.0)
    slow = rig.executor.run(plan(), span_request, rig.journey(), no_spans().request(span_request))
    first = await anext(slow)
    gate.set()
    late, _ = await rig.ask(span_request)
    assert late == "".join(words)
    rest = [event async for event in slow]
    assert type(first).__name__ == "Queued" and len(rest) == 200 + 3


def late() -> DeadlineExceeded:
    return DeadlineExceeded("The deadline passed.")


class EndsLate(ScriptedBackend):
    """The deadline of its first request passes when `gate` opens; it says so by an error, or by an end."""

    def __init__(self, gate: asyncio.Event, *, raises: bool) -> None:
        super().__init__(Script((), reason="deadline", gate=gate))
        self._gate = gate
        self._raises = raises

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        first = not self.requests
        async for event in super().generate(request):
            if first and self._raises and isinstance(event, Finished):
                raise late()
            yield event


@pytest.mark.parametrize("raises", [False, True])
async def test_who_came_later_outlives_the_deadline_of_the_first(raises: bool) -> None:
    clock, gate = VirtualClock(), asyncio.Event()
    backend = EndsLate(gate, raises=raises)
    rig = Rig(backend, clock=clock)
    journeys: list[Journey] = []
    told: list[list[Event]] = []
    tasks: list[asyncio.Task[tuple[str, Journey]]] = []
    for index in range(3):
        journeys.append(rig.journey())
        told.append([])
        request = chat(temperature=0.0, deadline_s=100.0)
        tasks.append(asyncio.create_task(rig.ask(request, journey=journeys[index], events=told[index])))
        await eventually(lambda index=index: told[index])
        clock.advance(4)
    assert len(backend.requests) == 1
    # The first has no time left, the others have 4 s and 8 s.
    clock.advance(88)
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    reasons = [[event.reason for event in events if isinstance(event, Finished)] for events in told]
    assert isinstance(results[0], DeadlineExceeded) == raises
    assert reasons == [[] if raises else ["deadline"], ["stop"], ["stop"]]
    # Made anew once, for both; one of them pays.
    assert len(backend.requests) == 2
    assert [len(journey.attempts) for journey in journeys] == [1, 1, 0]
    assert [journey.shared for journey in journeys] == [False, False, True]


async def test_who_would_lose_much_time_by_joining_does_not() -> None:
    clock, gate = VirtualClock(), asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate), Script(gate=gate))
    rig = Rig(backend, clock=clock)
    tasks: list[asyncio.Task[tuple[str, Journey]]] = []
    for running in (1, 2):
        tasks.append(asyncio.create_task(rig.ask(chat(temperature=0.0, deadline_s=2.6))))
        await eventually(lambda running=running: backend.running == running)
        clock.advance(2)
    gate.set()
    await asyncio.gather(*tasks)


async def test_a_deadline_that_is_ones_own_is_not_tried_again() -> None:
    backend = ScriptedBackend(*[Script((), late())] * 9)
    with pytest.raises(DeadlineExceeded):
        await Rig(backend).ask(chat(temperature=0.0, deadline_s=100.0))
    assert len(backend.requests) == 1


async def test_the_urgent_do_not_wait_where_others_wait() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate))
    rig = Rig(backend, max_concurrency=1)
    order: list[str] = []

    async def ask(priority: Priority, temperature: float = 0.0) -> None:
        await rig.ask(chat(temperature=temperature, priority=priority))
        order.append(priority)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(ask("normal", 1.0))
        await eventually(lambda: backend.running)
        asked: list[tuple[Priority, float]] = [("low", 0.0), ("normal", 1.0), ("high", 0.0)]
        for waiting, (priority, temperature) in enumerate(asked, 1):
            group.create_task(ask(priority, temperature))
            await eventually(lambda waiting=waiting: sum(rig.executor.waiting().values()) == waiting)
        gate.set()
    assert order == ["normal", "high", "normal", "low"]


@pytest.mark.parametrize("value", [10**30, -(10**30), {"deep": [2**64]}, "\ud800"])
async def test_what_has_no_identity_is_not_shared(value: object) -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate), Script(gate=gate))
    rig = Rig(backend)
    request = chat(temperature=0.0, extras={"field": value})
    tasks = [asyncio.create_task(rig.ask(request)) for _ in range(2)]
    await eventually(lambda: backend.running == 2)
    gate.set()
    assert [(await task)[0] for task in tasks] == ["Hello there"] * 2


async def test_every_attempt_has_an_id_of_its_own() -> None:
    backend = ScriptedBackend(failing("reset"), failing("reset"))
    other = ScriptedBackend(failing("reset"))
    await Rig(backend, other, retries=3).ask()
    ids = [each.generation.request_id for each in (*backend.requests, *other.requests)]
    assert sorted(ids) == ["r", "r.1", "r.2", "r.3"]

    slow, quick = ScriptedBackend(Script(gate=asyncio.Event())), ScriptedBackend()
    await Rig(slow, quick, hedge_after_s=0.01).ask()
    assert [each.generation.request_id for each in (*slow.requests, *quick.requests)] == ["r", "r.1"]


async def test_identity_is_all_that_makes_a_difference() -> None:
    base = chat(temperature=0.0)
    generation = base.generation
    same = replace(
        base, generation=replace(generation, request_id="q", caller=Caller(key_id="k"), session="s", task="t")
    )
    assert identity_of(plan(), same) == identity_of(plan(), base)
    different = [
        replace(base, tools=(Tool("f"),)),
        replace(base, messages=(*base.messages, *base.messages)),
        *(
            replace(base, generation=replace(generation, **change))
            for change in (
                {"tenant": "other"},
                {"max_tokens": 5},
                {"stop": ("x",)},
                {"extras": {"reasoning_effort": "high"}},
                {"logprobs": 1},
                {"stream": False},
                {"user": "u"},
                {"deadline_s": 3.0},
                {"priority": "high"},
            )
        ),
        CompletionRequest(generation, "Hi"),
    ]
    digests = {identity_of(plan(), each) for each in different}
    assert len(digests) == len(different) and identity_of(plan(), base) not in digests


async def test_a_hedge_wins_and_the_loser_is_closed_and_counted() -> None:
    slow = ScriptedBackend(Script(gate=asyncio.Event()))
    rig = Rig(slow, ScriptedBackend(), hedge_after_s=0.01)
    text, journey = await rig.ask()
    assert text == "Hello there" and journey.backend == "b"
    assert sorted((each.backend, each.cause, each.hedge) for each in journey.attempts) == [
        ("a", "cancelled", False),
        ("b", None, True),
    ]
    assert all(each.prompt_tokens == 10 for each in journey.attempts)
    assert not slow.running and not rig.in_flight()


async def test_the_first_may_win_against_its_hedge() -> None:
    gate = asyncio.Event()
    other = ScriptedBackend(Script(gate=asyncio.Event()))
    rig = Rig(ScriptedBackend(Script(gate=gate)), other, hedge_after_s=0.01)
    task = asyncio.create_task(rig.ask())
    await eventually(lambda: other.running)
    gate.set()
    text, journey = await task
    assert text == "Hello there" and journey.backend == "a" and not other.running
    assert sorted(causes(journey), key=str) == [("a", None), ("b", "cancelled")]


async def test_a_failed_hedge_leaves_the_first_and_both_failing_is_a_failure() -> None:
    gate = asyncio.Event()
    rig = Rig(
        ScriptedBackend(Script(gate=gate)), hedge := ScriptedBackend(failing("reset")), hedge_after_s=0.01
    )
    task = asyncio.create_task(rig.ask())
    await eventually(lambda: hedge.requests)
    gate.set()
    assert (await task)[1].backend == "a"


async def test_no_hedge_without_another_backend_or_budget() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(Script(gate=gate))
    other = ScriptedBackend()
    for rig in (
        Rig(backend, hedge_after_s=0.001),
        Rig(backend, other, hedge_after_s=0.001, retry_budget=0.0),
    ):
        task = asyncio.create_task(rig.ask(journey=Journey(rig.clock.monotonic())))
        await asyncio.sleep(0.05)
        gate.set()
        assert len((await task)[1].attempts) == 1
        backend.scripts = [Script(gate=gate)]
        gate.clear()
    assert not other.requests


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("hedge_after_s", [None, 0.001])
async def test_attempts_are_counted_under_cancellation_that_repeats(
    temperature: float, hedge_after_s: float | None
) -> None:
    """As the web framework's: anyio cancels at each await until its scope is left."""
    backends = [ScriptedBackend(Script(gate=asyncio.Event())) for _ in range(2)]
    rig = Rig(*backends, hedge_after_s=hedge_after_s)
    journey = rig.journey()
    wanted = 1 if hedge_after_s is None else 2
    async with anyio.create_task_group() as group:
        group.start_soon(rig.ask, chat(temperature=temperature), None, journey)
        await eventually(lambda: sum(backend.running for backend in backends) == wanted)
        group.cancel_scope.cancel()
    assert [attempt.cause for attempt in journey.attempts] == ["cancelled"] * wanted
    assert not rig.in_flight() and not any(backend.running for backend in backends)

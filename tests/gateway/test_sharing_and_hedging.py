"""Single flight and hedging, through the executor."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import anyio
import pytest
from tests.gateway.scripted import Rig, Script, ScriptedBackend, causes, chat, eventually, failing, plan

from stockpot.caller import Caller
from stockpot.errors import UpstreamError
from stockpot.gateway.journey import Journey
from stockpot.gateway.single_flight import identity_of
from stockpot.gateway.spans import no_spans
from stockpot.requests import CompletionRequest, Tool

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

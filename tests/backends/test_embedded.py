"""The embedded backend over the fake driver: events in order, cancellation, refusals, draining."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from stockpot.backends.embedded import EmbeddedBackend
from stockpot.engine.core import EngineLimits
from stockpot.engine.fake_driver import FakeDriver
from stockpot.engine.reports import RefusalReport, Report
from stockpot.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailed,
    QueueFull,
    RequestError,
    ShuttingDown,
    UnknownModel,
)
from stockpot.events import Completed, Delta, Event, Finished, Queued, Started
from stockpot.requests import ChatRequest, CompletionRequest, Generation, Message, OutputFormat, Sampling

pytestmark = pytest.mark.anyio


def backend_of(driver: FakeDriver | None = None, **limits: Any) -> EmbeddedBackend:
    driver = driver or FakeDriver()
    return EmbeddedBackend(driver, replace(EngineLimits(block_tokens=8), **limits), served_name="fake")


def generation(**values: Any) -> Generation:
    return replace(Generation("fake", "r", Sampling(temperature=0), max_tokens=6), **values)


def completion(prompt: str = "once upon a time", **values: Any) -> CompletionRequest:
    return CompletionRequest(generation(**values), prompt)


async def collect(backend: EmbeddedBackend, request: ChatRequest | CompletionRequest) -> list[Event]:
    return [event async for event in backend.generate(request)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_events_come_in_the_stated_order() -> None:
    backend = backend_of()
    await backend.start()
    events = await collect(backend, completion())
    assert isinstance(events[0], Queued)
    assert isinstance(events[1], Started)
    assert isinstance(events[-1], Completed)
    assert isinstance(events[-2], Finished)
    assert events[-1].usage.completion_tokens == sum(
        len(event.token_ids) for event in events if isinstance(event, Delta)
    )
    again = await collect(backend, completion())
    assert text_of(again) == text_of(events)
    assert isinstance(again[-1], Completed)
    assert again[-1].usage.cached_tokens == {"ram": 15}
    await backend.stop(drain=True)


async def test_chat_uses_the_template_and_keeps_control_text_literal() -> None:
    backend = backend_of()
    await backend.start()
    plain = ChatRequest(generation(), [Message("user", "hi")])
    assert await backend.tokenize("fake", plain, special=True) == [
        257, *b"user\nhi", 258, *b"\n", 257, *b"assistant\n"
    ]  # fmt: skip
    sly = ChatRequest(generation(), [Message("user", "<|im_end|>")])
    tokens = await backend.tokenize("fake", sly, special=True)
    assert tokens.count(258) == 1
    await backend.stop(drain=True)


async def test_a_closed_stream_frees_its_place() -> None:
    backend = backend_of(FakeDriver(token_cost_s=0.001))
    await backend.start()
    stream = backend.generate(completion(max_tokens=3000, ignore_eos=True))
    async for event in stream:
        if isinstance(event, Delta):
            break
    await stream.aclose()
    for _ in range(1000):  # the engine's thread sees the cancellation before its next step
        if not backend.engine_stats().running:
            break
        await asyncio.sleep(0.001)
    assert not backend.engine_stats().running
    events = await collect(backend, completion())
    assert isinstance(events[-1], Completed)
    await backend.stop(drain=True)


async def test_refusals_come_before_any_event() -> None:
    backend = backend_of(FakeDriver(cells=512, token_cost_s=0.002, max_sequences=1), queue_limit=1)
    await backend.start()
    for request, refusal in (
        (completion("x" * 600), ContextLengthExceeded),
        (CompletionRequest(Generation("other", "r"), "hi"), UnknownModel),
        (CompletionRequest(generation(), [1, 2, 999]), RequestError),
        (CompletionRequest(generation(), ""), RequestError),
        (completion(output_format=OutputFormat("json_schema", {"type": "no such type"})), RequestError),
    ):
        with pytest.raises(refusal):
            await collect(backend, request)
    tasks = [asyncio.create_task(collect(backend, completion(max_tokens=50))) for _ in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(QueueFull):
        await collect(backend, completion())
    await asyncio.gather(*tasks)
    await backend.stop(drain=True)


async def test_a_deadline_before_the_first_token_is_an_error() -> None:
    backend = backend_of(FakeDriver(token_cost_s=0.01))
    await backend.start()
    with pytest.raises(DeadlineExceeded):
        await collect(backend, completion(deadline_s=0.0))
    await backend.stop(drain=True)


async def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    backend = backend_of(FakeDriver(token_cost_s=0.002))
    await backend.start()
    running = asyncio.create_task(collect(backend, completion(max_tokens=40, ignore_eos=True)))
    await asyncio.sleep(0.02)
    stopping = asyncio.create_task(backend.stop(drain=True))
    await asyncio.sleep(0.01)
    with pytest.raises(ShuttingDown):
        await collect(backend, completion())
    finished = [event for event in await running if isinstance(event, Finished)]
    assert [event.reason for event in finished] == ["length"]
    await stopping


async def test_a_failing_driver_ends_every_request_with_an_error() -> None:
    driver = FakeDriver()
    backend = backend_of(driver)
    await backend.start()
    driver.fail_next_decode()
    events = await collect(backend, completion())
    assert [event.reason for event in events if isinstance(event, Finished)] == ["error"]
    assert not backend.health().ready
    with pytest.raises(EngineFailed):
        await collect(backend, completion())
    await backend.stop(drain=True)


async def test_json_output_is_json_and_stop_strings_are_not_shown() -> None:
    backend = backend_of()
    await backend.start()
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    events = await collect(
        backend, completion(max_tokens=100, output_format=OutputFormat("json_schema", schema))
    )
    assert json.loads(text_of(events)) in ({"a": "x"}, {"a": "y"})
    free = text_of(await collect(backend, completion(max_tokens=20)))
    cut = text_of(await collect(backend, completion(max_tokens=20, stop=(free[3:5],))))
    assert cut == free[: free.index(free[3:5])]
    await backend.stop(drain=True)


class Reports:
    """Remembers what observers are told."""

    def __init__(self) -> None:
        self.causes: list[str] = []

    def observe(self, report: Report) -> None:
        if isinstance(report, RefusalReport):
            self.causes.append(report.cause)


async def test_every_refusal_is_reported_with_its_cause() -> None:
    reports = Reports()
    backend = EmbeddedBackend(
        FakeDriver(), EngineLimits(block_tokens=8), served_name="fake", observers=[reports]
    )
    await backend.start()
    refused = (
        (completion(model="other"), "model_not_found"),
        (completion("x" * 10**6), "context_length_exceeded"),
        (completion("x" * 5000), "context_length_exceeded"),
        (completion(output_format=OutputFormat("json_schema", {"type": "nothing"})), None),
    )
    for request, cause in refused:
        with pytest.raises(RequestError) as error:
            await collect(backend, request)
        assert reports.causes.pop() == error.value.code
        assert cause in (None, error.value.code)
    await backend.stop(drain=False)

"""Cascade: what of a small model's answer is delivered, and when the strong one is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.gateway.scripted import (
    Rig,
    Script,
    ScriptedBackend,
    causes,
    chat,
    eventually,
    failing,
    plan,
    with_schema,
)

from stockpot.errors import ConfigurationError, FailureCause, RequestError
from stockpot.events import Delta, Event, FinishReason, Started
from stockpot.gateway.answer_checks import Answer, objection
from stockpot.gateway.difficulty import load_classifier, words
from stockpot.requests import OutputFormat
from stockpot.routing.plan import Step
from stockpot.settings_gateway import CascadeSettings

pytestmark = pytest.mark.anyio

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["n"],
    "properties": {"n": {"type": "integer"}},
}
JSON = OutputFormat("json_schema", SCHEMA)


def rig(small: Script, **settings: Any) -> Rig:
    strong = ScriptedBackend(models=("strong",))
    strong.usual = Script(("strong ", "answer"))
    return Rig(ScriptedBackend(small), strong, **settings)


def way(**settings: Any) -> Any:
    return plan(Step("m"), cascade=CascadeSettings(to="strong", **settings))


async def test_a_good_small_answer_is_delivered() -> None:
    events: list[Event] = []
    text, journey = await rig(Script(('{"n"', ": 1}"))).ask(
        with_schema(chat(), JSON), way=way(), events=events
    )
    assert text == '{"n": 1}' and causes(journey) == [("a", None)]
    assert journey.model == "m" and not journey.notices and journey.first_token_s is not None
    assert [type(event).__name__ for event in events] == [
        "Queued",
        "Started",
        "Delta",
        "Delta",
        "Finished",
        "Completed",
    ]


@pytest.mark.parametrize(
    ("small", "settings", "output"),
    [
        (Script(('{"n": "one"}',)), {}, JSON),
        (Script(("no json",)), {}, JSON),
        (Script(("[1]",)), {}, OutputFormat("json_object")),
        (Script(("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I can't do that.",)), {}, OutputFormat()),
        (Script(("Fine",), reason="content_filter"), {}, OutputFormat()),
        (Script(("cut",), reason="length"), {}, OutputFormat()),
        (Script(("no figure",)), {"on": ("regex",), "pattern": r"\d+"}, OutputFormat()),
        (Script(("broken",), reason="error"), {}, OutputFormat()),
    ],
)
async def test_a_bad_small_answer_is_replaced_and_paid_for(
    small: Script, settings: dict[str, Any], output: OutputFormat
) -> None:
    events: list[Event] = []
    text, journey = await rig(small).ask(with_schema(chat(), output), way=way(**settings), events=events)
    assert text == "strong answer"
    first: FailureCause = "server_error" if small.reason == "error" else "validation"
    assert causes(journey) == [("a", first), ("b", None)]
    assert journey.attempts[0].completion_tokens == 2
    assert journey.model == "strong" and [notice.kind for notice in journey.notices] == ["cascade"]
    assert sum(isinstance(event, Started) for event in events) == 2


async def test_a_small_model_that_fails_is_survived_even_after_its_first_token() -> None:
    text, journey = await rig(failing("truncated", "some")).ask(way=way())
    assert text == "strong answer" and causes(journey) == [("a", "truncated"), ("b", None)]


async def test_a_request_at_fault_is_not() -> None:
    with pytest.raises(RequestError):
        await rig(Script((), RequestError("no"))).ask(way=way())


async def test_the_strong_answer_streams() -> None:
    gate = asyncio.Event()
    both = Rig(
        ScriptedBackend(Script(("x",), reason="length")), strong := ScriptedBackend(models=("strong",))
    )
    strong.usual = Script(gate=gate)
    events: list[Event] = []
    task = asyncio.create_task(both.ask(way=way(), events=events))
    await eventually(lambda: any(isinstance(event, Started) for event in events[2:]))
    assert not any(isinstance(event, Delta) for event in events)
    gate.set()
    assert (await task)[0] == "Hello there"


async def test_a_hard_question_goes_to_the_strong_model_at_once() -> None:
    text = "Prove step by step, then compare and analyze: ```def f(x): return x + 1``` and 3 + 4 = 7."
    answer, journey = await rig(Script()).ask(chat(text), way=way(classifier="words", difficulty=0.5))
    assert answer == "strong answer" and causes(journey) == [("b", None)]
    answer, journey = await rig(Script()).ask(way=way(classifier="words", difficulty=0.5))
    assert answer == "Hello there"


def test_classifiers_are_found_by_name() -> None:
    assert load_classifier("words") is words
    assert load_classifier("statistics:mean") is not None
    for name in ("nowhere", "no.such:thing", "statistics:nothing", "string:digits"):
        with pytest.raises(ConfigurationError, match=r"cannot be loaded|no function"):
            load_classifier(name)


def test_difficulty_is_within_its_bounds() -> None:
    assert 0 <= words(chat("Hi")) < 0.01
    assert words(chat("prove then first finally `` ```code``` 1+1 " * 1000)) == 1


@pytest.mark.parametrize("reason", ["stop", "tool_calls"])
async def test_a_client_schema_reaches_nothing_and_runs_no_expression(reason: FinishReason) -> None:
    settings = CascadeSettings(to="strong")
    answer = Answer('{"a": "' + "a" * 40 + '!"}', "", False, reason)
    slow = {"properties": {"a": {"pattern": "^(a+)+$"}}, "patternProperties": {"(a+)+$": False}}
    assert await objection(answer, OutputFormat("json_schema", slow), settings) is None
    remote = {"$ref": "http://127.0.0.1:1/schema"}
    assert "cannot be checked" in (
        await objection(answer, OutputFormat("json_schema", remote), settings) or ""
    )

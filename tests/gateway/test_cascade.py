"""Cascade: what of a small model's answer is delivered, and when the strong one is asked."""

from __future__ import annotations

import asyncio
import json
import sys
from types import ModuleType
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
from stockpot.gateway.cascade import check_cascade
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


def bomb(depth: int) -> dict[str, Any]:
    """A small schema whose checking takes 2 ** depth steps."""
    below = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(depth)}
    return {"$defs": {**below, f"a{depth}": {"type": "string"}}, "$ref": "#/$defs/a0"}


BOUND: list[tuple[Any, str]] = [
    (bomb(40), "1"),
    ({"anyOf": [{"type": "string"}] * 5000}, json.dumps(["a" * 20] * 50_000)),
    ({"allOf": [{"items": {}}] * 5000}, json.dumps([1] * 50_000)),
    ({"items": {"enum": [*range(50_000)]}}, json.dumps([-1] * 50_000)),
    ({"enum": [*range(200_000)]}, "1"),
    ({"type": "soup"}, "1"),
    ({"minItems": "x"}, "[1]"),
    ({"$ref": "#"}, "1"),
]


@pytest.mark.parametrize(("schema", "text"), BOUND)
async def test_a_client_schema_is_checked_in_bounded_steps(schema: dict[str, Any], text: str) -> None:
    """Each took minutes, or raised what no one caught."""
    answer, settings = Answer(text, "", False, "stop"), CascadeSettings(to="strong")
    said = await objection(answer, OutputFormat("json_schema", schema), settings)
    assert said == "has a schema that cannot be checked"


async def test_other_tasks_go_on_while_an_answer_is_checked() -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turning = asyncio.create_task(turn())
    settings = CascadeSettings(to="strong", on=("schema", "regex"), pattern=r"(a|aa)+\d")
    await objection(Answer("1", "", False, "stop"), OutputFormat("json_schema", bomb(40)), settings)
    before = turns
    said = await objection(Answer("a" * 5000, "", False, "stop"), OutputFormat(), settings)
    turning.cancel()
    assert before > 0 and turns > before
    assert said in ("could not be matched with the pattern in time", "did not match the pattern")


def breaks(request: object) -> float:
    raise RuntimeError("no weights")


async def soon(request: object) -> float:
    return 1.0


def undecided(request: object) -> object:
    return None


@pytest.mark.parametrize("name", ["breaks", "undecided", "absent"])
async def test_a_classifier_that_fails_leaves_the_question_to_the_small_model(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = ModuleType("measures")
    vars(module).update(breaks=breaks, undecided=undecided)
    monkeypatch.setitem(sys.modules, "measures", module)
    answer, journey = await rig(Script()).ask(way=way(classifier=f"measures:{name}"))
    assert answer == "Hello there" and causes(journey) == [("a", None)]
    assert f"'measures:{name}' of a cascade failed" in caplog.text


def test_mistakes_of_a_cascade_are_found_before_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("measures")
    vars(module).update(soon=soon)
    monkeypatch.setitem(sys.modules, "measures", module)
    check_cascade(CascadeSettings(to="strong", on=("regex",), pattern=r"\d+", classifier="words"))
    for mistake, said in (
        ({"pattern": "(("}, "no regular expression"),
        ({"classifier": "nope:nope"}, "cannot be loaded"),
        ({"classifier": "measures:soon"}, "no function"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            check_cascade(CascadeSettings.model_validate({"to": "strong", **mistake}))

"""Checks of whole texts: classifiers of every kind, patterns and schemas that are none, functions by name."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from stockpot.errors import ConfigurationError
from stockpot.guards.checks import ClassifierCheck, PatternCheck, SchemaCheck, load_function
from stockpot.settings_guards import GuardSettings

pytestmark = pytest.mark.anyio


def score(text: str) -> float:
    return len(text) / 10


def is_long(text: str) -> bool:
    return len(text) >= 5


async def score_later(text: str) -> float:
    await asyncio.sleep(0)
    return len(text) / 10


class Scorer:
    async def __call__(self, text: str) -> float:
        return await score_later(text)


def check(classify: Callable[[str], Any], *, refuse: bool = True, timeout_s: float = 30.0) -> ClassifierCheck:
    return ClassifierCheck(classify, threshold=0.5, timeout_s=timeout_s, refuse=refuse)


@pytest.mark.parametrize("classify", [score, is_long, score_later, Scorer()])
async def test_a_classifier_flags_from_its_threshold_on(classify: Callable[[str], Any]) -> None:
    assert await check(classify).objection("tiny") is None
    assert await check(classify).objection("large") == "was flagged"


def fails(text: str) -> float:
    raise RuntimeError("no model loaded")


async def fails_later(text: str) -> float:
    raise RuntimeError("no model loaded")


def no_score(text: str) -> object:
    return None


def no_number(text: str) -> float:
    return float("nan")


async def never(text: str) -> float:
    await asyncio.Event().wait()
    return 0.0


@pytest.mark.parametrize("classify", [fails, fails_later, no_score, no_number, never])
async def test_a_classifier_that_fails_does_as_configured(
    classify: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    timeout_s = 0.05 if classify is never else 30.0
    assert await check(classify, timeout_s=timeout_s).objection("private words") == "could not be classified"
    assert await check(classify, refuse=False, timeout_s=timeout_s).objection("private words") is None
    assert "classifier failed" in caplog.text
    assert "private words" not in caplog.text


async def test_a_blocking_classifier_does_not_stop_the_loop() -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    def slow(text: str) -> float:
        while turns < 5:
            time.sleep(0.001)
        return 1.0

    turning = asyncio.create_task(turn())
    assert await check(slow).objection("text") == "was flagged"
    turning.cancel()


async def test_a_pattern_that_takes_for_ever_is_given_up() -> None:
    assert await PatternCheck(r"(a|aa)+\d").objection("a" * 5000) in (
        "could not be matched with the pattern in time",
        "does not match the pattern",
    )


@pytest.mark.parametrize("text", ["[" * 100_000, "\ud800", "NaN", '{"a": 1} {"b": 2}', "```json\n{}\n```"])
async def test_what_is_no_json_is_said_to_be_none(text: str) -> None:
    assert await SchemaCheck({"type": "object"}).objection(text) == "is not JSON"


def test_what_cannot_be_checked_is_a_mistake_of_the_settings() -> None:
    with pytest.raises(ConfigurationError, match="no regular expression"):
        PatternCheck("(")
    with pytest.raises(ConfigurationError, match="not valid"):
        SchemaCheck({"type": "soup"})


def test_functions_are_found_by_name() -> None:
    assert load_function("math:sqrt")(0.25) == 0.5  # pyright: ignore[reportArgumentType]
    for name, said in (
        ("no.such.module:f", "cannot be loaded"),
        ("math:no_such", "cannot be loaded"),
        ("math", "no function"),
        ("math:pi", "no function"),
        (":f", "cannot be loaded"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            load_function(name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "block-list"}, "'words' or 'words_file'"),
        ({"rule": "pattern"}, "needs 'pattern'"),
        ({"rule": "json-schema"}, "needs 'schema'"),
        ({"rule": "classifier"}, "either 'classifier' or 'judge'"),
        ({"rule": "classifier", "classifier": "a:b", "judge": "m"}, "either 'classifier' or 'judge'"),
        ({"rule": "pattern", "pattern": "a", "on": "input"}, "about answers"),
        ({"rule": "secrets", "action": "retry"}, "only answers can be asked for again"),
        ({"rule": "classifier", "judge": "m", "action": "redact"}, "no place in a text"),
    ],
)
def test_settings_that_make_no_rule(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GuardSettings.model_validate(settings)


async def test_a_huge_answer_is_checked_in_bounded_steps() -> None:
    check = SchemaCheck({"type": "array", "items": {"allOf": [{"minimum": 0}] * 20}})
    assert await check.objection(json.dumps([1] * 100)) is None
    assert await check.objection(json.dumps([1] * 100_000)) == "could not be checked with the schema"


@pytest.mark.parametrize(
    ("items", "are_unique"),
    [
        ([1, True, 0, False, "1", None, [1], {"a": 1}], True),
        ([1, 1.0], False),
        ([{"a": [1, 2], "b": 1}, {"b": 1, "a": [1, 2]}], False),
        ([[True], [1]], True),
        ([{"n": n} for n in range(5_000)], True),
    ],
)
async def test_unique_items_are_those_of_json(items: list[Any], are_unique: bool) -> None:
    said = await SchemaCheck({"uniqueItems": True}).objection(json.dumps(items))
    assert said == (None if are_unique else "does not satisfy the schema (uniqueItems at /)")


async def test_a_slow_expression_in_a_schema_is_given_up() -> None:
    check = SchemaCheck({"type": "string", "pattern": r"^(a|aa)+\d$"})
    assert await check.objection('"aa1"') is None
    assert await check.objection(json.dumps("a" * 5000)) in (
        "could not be checked with the schema",
        "does not satisfy the schema (pattern at /)",
    )

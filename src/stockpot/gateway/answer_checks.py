"""Whether the small model's answer will do: schema, pattern, refusal, length."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import regex

from stockpot.errors import ConfigurationError
from stockpot.guards.bounded_schema import BoundedSchema, CannotBeChecked
from stockpot.requests import OutputFormat
from stockpot.settings_gateway import CascadeSettings

_REFUSALS = (
    "i'm sorry, but i can",
    "i am sorry, but i can",
    "sorry, but i can",
    "i cannot help",
    "i can't help",
    "i cannot assist",
    "i can't assist",
    "i'm unable to",
    "i am unable to",
    "i'm not able to",
    "i am not able to",
    "as an ai language model",
    "i don't know",
    "i do not know",
)
_REFUSAL_CHARACTERS = 80
_MATCH_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, complete, and the `reason` it ended. `calls`: it asks for tools, its text is no answer."""

    text: str
    refusal: str
    calls: bool
    reason: str


async def objection(answer: Answer, output: OutputFormat, settings: CascadeSettings) -> str | None:
    """What is wrong with an answer, for people, without its text; None: nothing that is looked for.
    What reads the whole answer does so beside the event loop."""
    checks = settings.on
    if answer.reason in ("error", "cancelled"):
        return "broke off"
    wrong: str | None = None
    if "length" in checks and answer.reason == "length":
        wrong = "was cut off at its length"
    elif "refusal" in checks and is_refusal(answer):
        wrong = "was a refusal"
    elif answer.calls:
        return None
    elif "schema" in checks and output.kind != "text":
        wrong = await asyncio.to_thread(_against, output, answer.text)
    if wrong is None and "regex" in checks and settings.pattern is not None:
        wrong = await asyncio.to_thread(_unmatched, settings.pattern, answer.text)
    return wrong


def check_pattern(pattern: str) -> None:
    """Raises ConfigurationError for what is no regular expression."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ConfigurationError(
            f"The pattern {pattern!r} of a cascade is no regular expression: {error}. Correct it."
        ) from error


def is_refusal(answer: Answer) -> bool:
    """The model said so, its provider did, or it begins as refusals begin (in English)."""
    if answer.reason == "content_filter" or answer.refusal:
        return True
    start = (
        answer.text.lstrip()[:_REFUSAL_CHARACTERS].casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    return start.startswith(_REFUSALS)


def _unmatched(pattern: str, text: str) -> str | None:
    try:
        # Compiled once: the library keeps what it has compiled.
        found = regex.search(pattern, text, timeout=_MATCH_TIMEOUT_S, concurrent=True)
    except TimeoutError:
        return "could not be matched with the pattern in time"
    return None if found else "did not match the pattern"


def _against(output: OutputFormat, text: str) -> str | None:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "was no JSON"
    if output.kind == "json_object" or output.schema is None:
        return None if isinstance(value, dict) else "was no JSON object"
    try:
        wrong = BoundedSchema(output.schema, trusted=False).error(value)
    except CannotBeChecked:
        return "has a schema that cannot be checked"
    return None if wrong is None else "did not satisfy its schema"

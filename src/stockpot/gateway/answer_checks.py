"""Whether the small model's answer will do: schema, pattern, refusal, length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

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


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, complete, and the `reason` it ended. `calls`: it asks for tools, its text is no answer."""

    text: str
    refusal: str
    calls: bool
    reason: str


def objection(answer: Answer, output: OutputFormat, settings: CascadeSettings) -> str | None:
    """What is wrong with an answer, for people, without its text; None: nothing that is looked for."""
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
        wrong = _against(output, answer.text)
    if wrong is None and "regex" in checks and settings.pattern is not None:
        wrong = None if re.search(settings.pattern, answer.text) else "did not match the pattern"
    return wrong


def is_refusal(answer: Answer) -> bool:
    """The model said so, its provider did, or it begins as refusals begin (in English)."""
    if answer.reason == "content_filter" or answer.refusal:
        return True
    start = (
        answer.text.lstrip()[:_REFUSAL_CHARACTERS].casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    return start.startswith(_REFUSALS)


def _against(output: OutputFormat, text: str) -> str | None:
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "was no JSON"
    if output.kind == "json_object" or output.schema is None:
        return None if isinstance(value, dict) else "was no JSON object"
    try:
        return None if _validator(output.schema).is_valid(value) else "did not satisfy its schema"
    except (SchemaError, Unresolvable, RecursionError):
        return "has a schema that cannot be checked"


def _validator(schema: Mapping[str, Any] | bool) -> Any:
    """A validator that fetches nothing (the schema is the client's: its references stay within it) and leaves
    `pattern` and `patternProperties` alone: a client's regular expression can take exponential time."""
    from jsonschema import validators
    from referencing import Registry

    library: Any = validators
    unchecked: Any = {"pattern": _nothing, "patternProperties": _nothing}
    if '"patternProperties"' in json.dumps(schema):
        # Which properties are additional would have to be matched with those expressions.
        unchecked["additionalProperties"] = unchecked["unevaluatedProperties"] = _nothing
    return library.extend(library.validator_for(schema), unchecked)(schema, registry=cast(Any, Registry)())


def _nothing(*_: object) -> Sequence[object]:
    return ()

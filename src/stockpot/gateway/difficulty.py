"""How hard a request looks, from 0 to 1, before any model has seen it: what a cascade starts with.

The built-in measure, `words`, is a heuristic from the text alone: what is long, holds code or mathematics, or
asks for several steps is rather a case for the strong model. It costs microseconds and knows nothing.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import cast

from stockpot.errors import ConfigurationError
from stockpot.requests import ChatRequest, GenerationRequest

Classifier = Callable[[GenerationRequest], float]
"""Gives a difficulty from 0 to 1. Called on the event loop: it must not block."""

_READ_CHARACTERS = 20_000
_LONG_WORDS = 400
_CODE = re.compile(
    r"```|\b(?:def|class|import|SELECT|function|return|struct|async)\b|[{};]\s*$", re.MULTILINE
)
_MATHEMATICS = re.compile(
    r"[∑∫√≤≥≠∀∃]|\\(?:frac|sum|int)\b|\d\s*[-+*/^=]\s*\d|\b(?:integral|derivative|theorem)\b"
)
_STEPS = re.compile(
    r"\b(?:step by step|prove|proof|explain why|analy[sz]e|compare|derive|optimi[sz]e|refactor|debug|design"
    r"|plan|trade-?offs?|first|then|finally|therefore)\b",
    re.IGNORECASE,
)


def words(request: GenerationRequest) -> float:
    """Of the last turn of a chat (what is asked now), or of a prompt in text; one in token ids is 0."""
    if isinstance(request, ChatRequest):
        asked = next((turn.content for turn in reversed(request.messages) if turn.role == "user"), "")
    else:
        asked = request.prompt if isinstance(request.prompt, str) else ""
    asked = asked[-_READ_CHARACTERS:]
    length = min(len(asked.split()) / _LONG_WORDS, 1.0)
    steps = min(len(_STEPS.findall(asked)) / 4, 1.0)
    code = _CODE.search(asked) is not None
    mathematics = _MATHEMATICS.search(asked) is not None
    return min(0.35 * length + 0.3 * steps + 0.3 * code + 0.3 * mathematics, 1.0)


def load_classifier(name: str) -> Classifier:
    """`words`, or the function that `module:function` names. Raises ConfigurationError."""
    if name == "words":
        return words
    module_name, colon, function_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), function_name) if colon else None
    except Exception as error:  # what a module does when it is imported is its own
        raise ConfigurationError(
            f"The classifier {name!r} of a cascade cannot be loaded: {error}. Name an importable"
            " module:function, or words."
        ) from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise ConfigurationError(
            f"The classifier {name!r} of a cascade is no function, or an async one. Name an importable"
            " module:function, or words."
        )
    return cast(Classifier, found)

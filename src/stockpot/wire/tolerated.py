"""Fields this server does not act on, and the values at which that makes no difference.

Rule of the house: a field is honoured or refused, never accepted and ignored. Clients send many fields at
the value that means "nothing special", and annotations that ask for nothing; refusing those would help
nobody. This table is the whole list. Any other value of these fields, and any other field, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from stockpot.errors import UnsupportedField


@dataclass(frozen=True, slots=True)
class Tolerated:
    """`values` that make no difference (null always does not); empty: a pure annotation, any value."""

    values: tuple[Any, ...]
    reason: str


_NO_TOOLS = "tool calls are not supported; these values ask for none"
_ANNOTATION = "an annotation for the provider's records; asks for nothing"
_HINT = "prefixes are found by their content here, so a hint where to look changes nothing"
_ALWAYS = "this is what happens anyway"

GENERATION: Mapping[str, Tolerated] = {
    "user": Tolerated((), _ANNOTATION),
    "safety_identifier": Tolerated((), _ANNOTATION),
    "metadata": Tolerated((), _ANNOTATION),
    "prompt_cache_key": Tolerated((), _HINT),
    "prompt_cache_retention": Tolerated(("in_memory", "in-memory"), _ALWAYS),
    "cache_prompt": Tolerated((True,), _ALWAYS),
    "store": Tolerated((False,), "nothing is stored for later retrieval"),
    "service_tier": Tolerated(("auto", "default"), "there is one tier"),
    "best_of": Tolerated((1,), "one candidate for each choice"),
    "use_beam_search": Tolerated((False,), _ALWAYS),
    "length_penalty": Tolerated((1,), "without beam search it has no effect"),
    "min_tokens": Tolerated((0,), _ALWAYS),
    "stop_token_ids": Tolerated(([],), _ALWAYS),
    "include_stop_str_in_output": Tolerated((False,), _ALWAYS),
    "skip_special_tokens": Tolerated((True,), _ALWAYS),
}

CHAT: Mapping[str, Tolerated] = {
    **GENERATION,
    "tools": Tolerated(([],), _NO_TOOLS),
    "tool_choice": Tolerated(("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": Tolerated((True, False), "without tools it has no effect"),
    "functions": Tolerated(([],), _NO_TOOLS),
    "function_call": Tolerated(("none", "auto"), _NO_TOOLS),
    "modalities": Tolerated((["text"],), _ALWAYS),
    "audio": Tolerated((None,), "text only"),
    "prediction": Tolerated((None,), "not supported"),
    "web_search_options": Tolerated((None,), "not supported"),
    "reasoning_effort": Tolerated(("none",), _ALWAYS),
    "verbosity": Tolerated(("medium",), "the default"),
    "add_generation_prompt": Tolerated((True,), _ALWAYS),
    "continue_final_message": Tolerated((False,), _ALWAYS),
}

COMPLETION: Mapping[str, Tolerated] = {
    **GENERATION,
    "suffix": Tolerated(("",), "no infilling; an empty suffix asks for none"),
}

# What clients send back with an answer of ours that they put into the next request.
MESSAGE: Mapping[str, Tolerated] = {
    "refusal": Tolerated((None,), "says that there was none"),
    "tool_calls": Tolerated(([],), _NO_TOOLS),
    "tool_call_id": Tolerated((None,), _NO_TOOLS),
    "function_call": Tolerated((None,), _NO_TOOLS),
    "audio": Tolerated((None,), "text only"),
    "annotations": Tolerated(([],), "says that there were none"),
    "reasoning_content": Tolerated(("",), "says that there was none"),
}

STREAM_OPTIONS: Mapping[str, Tolerated] = {
    "include_obfuscation": Tolerated((False,), _ALWAYS),
}


def without_tolerated(
    fields: Mapping[str, Any], honoured: frozenset[str], table: Mapping[str, Tolerated], path: str = ""
) -> dict[str, Any]:
    """`fields` without those of `table`. Raises UnsupportedField, naming the field under `path`, for a value
    that would make a difference and for a field that is neither in `table` nor `honoured`."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name in honoured:
            kept[name] = value
            continue
        param = f"{path}.{name}" if path else name
        entry = table.get(name)
        if entry is None:
            raise UnsupportedField(
                f"The field {_shown(param)} is not supported by this server; remove it.", param=param[:200]
            )
        if value is not None and entry.values and not any(_same(value, one) for one in entry.values):
            allowed = ", ".join(_json(one) for one in entry.values if one is not None)
            raise UnsupportedField(
                f"The field {_shown(param)} is supported only {f'as {allowed} or ' if allowed else ''}"
                f"as null ({entry.reason}); remove it.",
                param=param,
            )
    return kept


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _json(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_json(item) for item in cast(list[Any], value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other

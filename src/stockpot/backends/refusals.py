"""What our own engine cannot do, refused: tools, parts that are not text, fields of remote backends alone.

Rule of the house: a field is honoured or refused, never accepted and ignored. Clients send many fields at
the value that means "nothing special", and annotations that ask for nothing; refusing those would help
nobody. The tables here are the whole list. Any other value of these fields, and any other field, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from stockpot.errors import UnsupportedField
from stockpot.requests import ChatRequest, CompletionRequest, Dialect, ImagePart, Part, TextPart


@dataclass(frozen=True, slots=True)
class Tolerated:
    """`values` that make no difference (null always does not); empty: a pure annotation, any value."""

    values: tuple[Any, ...]
    reason: str


NO_TOOLS = "tool calls are not supported; these values ask for none"
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

ANTHROPIC: Mapping[str, Tolerated] = {
    "metadata": Tolerated((), _ANNOTATION),
    "service_tier": Tolerated(("auto", "standard_only"), "there is one tier"),
    "thinking": Tolerated(({"type": "disabled"},), _ALWAYS),
}


def refuse_extras(request: ChatRequest | CompletionRequest) -> None:
    """Raise UnsupportedField for the first of the extra fields that asks for something."""
    generation = request.generation
    if not generation.extras:
        return
    if generation.dialect == "anthropic":
        table = ANTHROPIC
    else:
        table = CHAT if isinstance(request, ChatRequest) else COMPLETION
    without_tolerated(generation.extras, frozenset(), table)


def refuse_tools_and_parts(request: ChatRequest | CompletionRequest) -> None:
    """Raise UnsupportedField for tools, calls of tools, and what is not text."""
    if isinstance(request, CompletionRequest):
        return
    if request.tools:
        raise UnsupportedField(
            f"The field 'tools' is supported only as [] or as null ({NO_TOOLS}); remove it.", param="tools"
        )
    choice = request.tool_choice
    if choice is not None and choice.mode not in ("none", "auto"):
        raise UnsupportedField(
            f'The field \'tool_choice\' is supported only as "none", "auto" or as null ({NO_TOOLS}); remove'
            " it.",
            param="tool_choice",
        )
    dialect = request.generation.dialect
    for index, message in enumerate(request.messages):
        if message.role == "tool":
            raise UnsupportedField(
                f"'messages[{index}].role' is 'tool', but tool calls are not supported by this model; remove"
                " the message.",
                param=f"messages[{index}].role",
            )
        if message.tool_calls:
            raise UnsupportedField(
                f"The field 'messages[{index}].tool_calls' is supported only as [] or as null ({NO_TOOLS});"
                " remove it.",
                param=f"messages[{index}].tool_calls",
            )
        for place, part in enumerate(message.parts):
            if not isinstance(part, TextPart):
                path = f"messages[{index}].content[{place}]"
                raise UnsupportedField(
                    f"'{path}' has the type {_kind(part, dialect)[:40]!r}; this server takes parts of type"
                    " 'text' alone.",
                    param=f"{path}.type",
                )


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


def _kind(part: Part, dialect: Dialect) -> str:
    """What the client called a part."""
    if isinstance(part, ImagePart):
        return "image" if dialect == "anthropic" else "image_url"
    return "text" if isinstance(part, TextPart) else str(part.value.get("type", ""))


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _json(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_json(item) for item in cast(list[Any], value)) + "]"
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value).items()
        return "{" + ", ".join(f'"{name}": {_json(item)}' for name, item in entries) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other

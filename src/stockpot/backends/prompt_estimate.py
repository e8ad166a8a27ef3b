"""About how many tokens a prompt has, for what no backend has counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from stockpot.requests import AnyRequest, ChatRequest, EmbeddingRequest, ImagePart, Message, OpaquePart

CHARACTERS_PER_TOKEN = 4
"""Of English text and the vocabularies of today (OpenAI, "What are tokens and how to count them?")."""

_MEDIUM_TOKENS = 1000
"""An image, a recording, a page: nothing in its bytes says how many tokens a provider makes of it."""

_MEDIUM_KEYS = frozenset({"data", "file_data", "url"})
_LABELS = frozenset({"metadata", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})


def estimated_prompt_tokens(request: AnyRequest) -> int:
    """At least 1. Counted: messages with their parts and calls, tools, the schema of the answer, arguments of
    the template, and fields a backend may put into the prompt (`documents`, `suffix`, ...)."""
    generation = request.generation
    tokens = 0
    if isinstance(request, EmbeddingRequest):
        tokens = sum(map(_prompt_tokens, request.inputs))
    elif isinstance(request, ChatRequest):
        characters = sum(map(_message_characters, request.messages))
        characters += _json_characters(request.tools) + _json_characters(request.template_arguments)
        media = sum(_media(message) for message in request.messages)
        tokens = tokens_of(characters) + media * _MEDIUM_TOKENS
    else:
        tokens = _prompt_tokens(request.prompt)
    extras = {name: value for name, value in generation.extras.items() if name not in _LABELS}
    return max(
        1, tokens + tokens_of(_json_characters(extras) + _json_characters(generation.output_format.schema))
    )


def tokens_of(characters: int) -> int:
    """Rounded up."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def _prompt_tokens(prompt: object) -> int:
    """Of text, or of token ids."""
    size = len(cast("str | list[int]", prompt))
    return tokens_of(size) if isinstance(prompt, str) else size


def _message_characters(message: Message) -> int:
    characters = len(message.content) + len(message.name or "")
    characters += sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return characters + sum(_text_characters(part.value) for part in _opaque(message))


def _media(message: Message) -> int:
    return sum(
        isinstance(part, ImagePart) or (isinstance(part, OpaquePart) and _is_medium(part.value))
        for part in message.parts
    )


def _opaque(message: Message) -> Iterable[OpaquePart]:
    return (part for part in message.parts if isinstance(part, OpaquePart))


def _is_medium(value: Mapping[str, Any]) -> bool:
    """Whether there are bytes in it, one level down as the providers have it: `input_audio.data`, ..."""
    inner = (cast("Mapping[str, Any]", each) for each in value.values() if isinstance(each, Mapping))
    return any(_MEDIUM_KEYS & each.keys() and each.get("type") != "text" for each in inner)


def _text_characters(part: Mapping[str, Any]) -> int:
    """Of the text in it; bytes in base64 are no text."""
    if not _is_medium(part):
        return _json_characters(part)
    return sum(len(each) for each in part.values() if isinstance(each, str))


def _json_characters(value: object) -> int:
    return len(msgspec.json.encode(value)) if value else 0

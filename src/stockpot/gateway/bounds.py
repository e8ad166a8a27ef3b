"""The most a request may use, reckoned before it runs: what is reserved of its allowances."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from stockpot.events import Notice
from stockpot.requests import (
    AnyRequest,
    ChatRequest,
    EmbeddingRequest,
    GenerationRequest,
    ImagePart,
    Message,
    OpaquePart,
)

_TURN_TOKENS = 16
"""Control tokens a template writes around a turn, at most."""

_IMAGE_TOKENS = 4096
"""An image at the providers' highest resolution, at most (OpenAI and Anthropic, "Vision": below 3,000)."""

R = TypeVar("R", bound=GenerationRequest)


def prompt_bound_tokens(request: AnyRequest, bytes_per_token: float) -> int:
    """Prompt tokens at most. A token of text is one byte of UTF-8 at least, so `bytes_per_token` 1 never
    reserves too little; images count as the largest ones do. Fields that are passed on unread may be put into
    the prompt (`documents`, `suffix`, ...), and so count as text does, as do schemas and tools."""
    generation = request.generation
    unread = _json_bytes(generation.extras) + _json_bytes(generation.output_format.schema)
    more = math.ceil(unread / bytes_per_token)
    if isinstance(request, ChatRequest):
        texts = sum(map(_message_bytes, request.messages))
        texts += _json_bytes(request.tools) + _json_bytes(request.template_arguments)
        images = sum(isinstance(part, ImagePart) for message in request.messages for part in message.parts)
        turns = len(request.messages) + 1 + len(request.tools)
        return math.ceil(texts / bytes_per_token) + turns * _TURN_TOKENS + images * _IMAGE_TOKENS + more
    if isinstance(request, EmbeddingRequest):
        return sum(_text_tokens(each, bytes_per_token) for each in request.inputs) + more
    return _text_tokens(request.prompt, bytes_per_token) + more


def with_output_bound(request: R, assumed_tokens: int, notices: list[Notice]) -> R:
    """The request with a bound on its output: its own, or `assumed_tokens`, which its sender is told of."""
    if request.generation.max_tokens is not None:
        return request
    notices.append(
        Notice(
            "max_tokens",
            f"The request has no 'max_tokens' and its key is limited: {assumed_tokens} were reserved and are"
            " the most it may generate (allowances.output_tokens_assumed).",
        )
    )
    return replace(request, generation=replace(request.generation, max_tokens=assumed_tokens))


def completion_bound_tokens(request: AnyRequest) -> int:
    """Output tokens at most, over all choices; 0 without a bound. What of a predicted output does not come
    true is billed as output too (OpenAI, "Predicted Outputs")."""
    if isinstance(request, EmbeddingRequest):
        return 0
    generation = request.generation
    predicted = _json_bytes(generation.extras.get("prediction"))
    return (generation.max_tokens or 0) * generation.choices + predicted


def _message_bytes(message: Message) -> int:
    size = _bytes(message.content) + _bytes(message.name or "")
    size += sum(_bytes(call.arguments) + _bytes(call.name) for call in message.tool_calls)
    size += sum(len(msgspec.json.encode(part.value)) for part in _opaque(message))
    return size


def _opaque(message: Message) -> Iterable[OpaquePart]:
    return (part for part in message.parts if isinstance(part, OpaquePart))


def _text_tokens(text: str | Sequence[int], bytes_per_token: float) -> int:
    if isinstance(text, str):
        return math.ceil(_bytes(text) / bytes_per_token) + _TURN_TOKENS
    return len(text) + _TURN_TOKENS


def _json_bytes(value: object) -> int:
    return len(msgspec.json.encode(value)) if value else 0


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))

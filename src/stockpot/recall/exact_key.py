"""Says which requests are the same: a digest of the scope and all that can change the answer.

Whatever a request has is part of it, new fields too, but for what is named here as naming or transporting it.
The order of a JSON object's keys and the white space between its tokens do not count; nothing else is made
alike: texts are compared character by character, 1 is not 1.0, and the arguments of a tool call, which the
model sees as the text they are, stay text.

The form that is digested is MessagePack, which tells kinds and lengths, so different values have different
forms: arrays of fixed order, objects sorted by key, integers of more than 64 bits as extension 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import Any, cast

import blake3
import msgspec

from stockpot.requests import (
    ChatRequest,
    CompletionRequest,
    Generation,
    GenerationRequest,
    Message,
    Sampling,
    TextPart,
)
from stockpot.routing.plan import RoutePlan

_FORM = 1
"""Raise it when the form changes, or what backends make of a request: what was kept before is not found."""

_NAMING = frozenset(
    (
        # `model` is the name that was asked for; the one that answers is in the plan.
        *("model", "request_id", "client_request_id", "session", "task", "trace_parent"),
        *("tenant", "caller", "user", "priority", "deadline_s", "stream", "recall"),
    )
)
"""Fields of `Generation` that are no part of it; whose caches are used is said by the scope."""

_NAMING_EXTRAS: Mapping[str, frozenset[str]] = {
    "openai": frozenset(
        ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "stream_options")
    ),
    # Anthropic knows `user_id` in it and nothing else.
    "anthropic": frozenset(("metadata",)),
}
"""By dialect; at OpenAI `metadata` is free, and servers behind that dialect act on it."""


def _all_but(kind: type[Any], left_out: frozenset[str]) -> attrgetter[tuple[Any, ...]]:
    return attrgetter(*(each.name for each in fields(kind) if each.name not in left_out))


_of_generation = _all_but(Generation, _NAMING | {"sampling", "extras"})
_of_sampling = _all_but(Sampling, frozenset(("logit_bias",)))
_of_chat = _all_but(ChatRequest, frozenset(("generation", "messages", "boundaries")))
_of_completion = _all_but(CompletionRequest, frozenset(("generation", "boundaries")))


def exact_key(scope: str, plan: RoutePlan, version: str, request: GenerationRequest) -> bytes | None:
    """32 bytes, equal for equal requests in one scope. `version` is that of the models of the plan.

    None where the request holds what has no such form (half a surrogate pair, an object nested too deeply).
    """
    messages = request.messages if isinstance(request, ChatRequest) else ()
    form = _form(("exact", _FORM, scope, *_way(plan, version), *_decisive(request), messages))
    return None if form is None else blake3.blake3(form).digest()


def partition_key(
    scope: str, plan: RoutePlan, version: str, request: ChatRequest, embedder: str, *, exact_context: bool
) -> bytes | None:
    """16 bytes, equal for requests that differ in nothing but what is compared by meaning: the text of the
    last user message and, without `exact_context`, the turns of plain text before it. Instructions and turns
    that hold more than text count either way, and so does whose vectors are compared (`embedder`).

    None as of `exact_key`.
    """
    messages = _without_question(request.messages, exact_context=exact_context)
    part = ("partition", _FORM, scope, embedder, exact_context)
    form = _form((*part, *_way(plan, version), *_decisive(request), messages))
    return None if form is None else blake3.blake3(form).digest(16)


def _way(plan: RoutePlan, version: str) -> tuple[Any, ...]:
    """Who answers. Where another stands in for the first, its answer is not kept."""
    cascade = None if plan.cascade is None else plan.cascade.model_dump(mode="json")
    return plan.steps[0].model, version, cascade


def _decisive(request: GenerationRequest) -> tuple[Any, ...]:
    """All that counts but the messages of a chat, in an order that does not change."""
    generation, sampling = request.generation, request.generation.sampling
    extras = generation.extras
    if extras and not (naming := _NAMING_EXTRAS[generation.dialect]).isdisjoint(extras):
        extras = {name: value for name, value in extras.items() if name not in naming}
    return (
        type(request).__name__,
        _of_generation(generation),
        _of_sampling(sampling),
        sorted(sampling.logit_bias.items()),
        extras,
        _of_chat(request) if isinstance(request, ChatRequest) else _of_completion(request),
    )


def _without_question(messages: Sequence[Message], *, exact_context: bool) -> list[Message]:
    last = max((index for index, each in enumerate(messages) if each.role == "user"), default=-1)
    return [
        _without_text(message) if index == last else message
        for index, message in enumerate(messages)
        if index >= last or exact_context or not _is_plain_turn(message)
    ]


def _is_plain_turn(message: Message) -> bool:
    """Whether its role and its text are all there is to it."""
    return message.role in ("user", "assistant") and message == Message(message.role, message.content)


def _without_text(message: Message) -> Message:
    parts = tuple(TextPart("") if isinstance(part, TextPart) else part for part in message.parts)
    return replace(message, content="", parts=parts)


def _form(value: tuple[Any, ...]) -> bytes | None:
    try:
        try:
            return _encode(value)
        except OverflowError:
            return _encode(_with_wide_integers(value))
    except (UnicodeEncodeError, RecursionError, TypeError, ValueError):
        return None


def _encode(value: Any) -> bytes:
    return msgspec.msgpack.encode(value, enc_hook=_plain, order="deterministic")


def _plain(value: Any) -> Any:
    """What msgspec has no form for: mappings and sequences of other types. Raises TypeError."""
    if isinstance(value, Mapping):
        return dict(cast(Mapping[Any, Any], value))
    if isinstance(value, Sequence):
        return list(cast(Sequence[Any], value))
    raise TypeError(f"a {type(value).__name__} has no canonical form")


def _with_wide_integers(value: Any) -> Any:
    """The same, with integers of more than 64 bits as extensions, which nothing else is."""
    if isinstance(value, int):
        if -(2**63) <= value < 2**64:
            return value
        return msgspec.msgpack.Ext(1, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {name: _with_wide_integers(item) for name, item in items}
    if isinstance(value, list | tuple):
        return [_with_wide_integers(item) for item in cast(Sequence[Any], value)]
    if is_dataclass(value):
        return {each.name: _with_wide_integers(getattr(value, each.name)) for each in fields(value)}
    return value

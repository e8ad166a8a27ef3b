"""The marker of a cache boundary in a prompt's text, for clients that have no field to say it with.

It counts on a line of its own, in the prompt of a plain completion and in instructions (system, developer):
what users and tools say is theirs. It is taken out before anything else sees the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from stockpot.context.marker import split_marked
from stockpot.requests import CacheBoundary, ChatRequest, CompletionRequest, Message
from stockpot.wire.shapes_common import TTL_S
from stockpot.wire.translate import BOUNDARIES_MAX

R = TypeVar("R", ChatRequest, CompletionRequest)


def with_marked_boundaries(request: R, marker: str) -> R:
    """The request with its markers as boundaries of five minutes. Of more than a request may have, those of
    fields (`cache_control`) stay, and of markers the last."""
    if not marker:
        return request
    if isinstance(request, CompletionRequest):
        return _completion(request, marker)
    return _chat(request, marker)


def _completion(request: CompletionRequest, marker: str) -> CompletionRequest:
    if not isinstance(request.prompt, str) or marker not in request.prompt:
        return request
    text, places = split_marked(request.prompt, marker)
    found = [_boundary(0, place) for place in places]
    return replace(request, prompt=text, boundaries=_bounded(request.boundaries, found))


def _chat(request: ChatRequest, marker: str) -> ChatRequest:
    found: list[CacheBoundary] = []
    changed: dict[int, Message] = {}
    for index, message in enumerate(request.messages):
        if message.role not in ("system", "developer") or marker not in message.content or message.parts:
            continue
        text, places = split_marked(message.content, marker)
        if text != message.content:
            changed[index] = replace(message, content=text)
            found += [_boundary(index, place) for place in places]
    if not changed:
        return request
    messages = tuple(changed.get(index, message) for index, message in enumerate(request.messages))
    moved = tuple(
        _moved(each, request, marker) if each.message in changed else each for each in request.boundaries
    )
    return replace(request, messages=messages, boundaries=_bounded(moved, found))


def _moved(boundary: CacheBoundary, request: ChatRequest, marker: str) -> CacheBoundary:
    """A boundary of a field, in the text without its markers."""
    if boundary.characters is None:
        return boundary
    before = request.messages[boundary.message].content[: boundary.characters]
    return replace(boundary, characters=len(split_marked(before, marker)[0]))


def _boundary(message: int, characters: int) -> CacheBoundary:
    return CacheBoundary(message, characters, ttl_s=TTL_S["5m"])


def _bounded(given: tuple[CacheBoundary, ...], found: list[CacheBoundary]) -> tuple[CacheBoundary, ...]:
    room = BOUNDARIES_MAX - len(given)
    return (*given, *(found[-room:] if room > 0 else ()))

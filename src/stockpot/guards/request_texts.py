"""Every text of a request: read for checks, or passed through a function that may change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from stockpot.errors import GuardRefused
from stockpot.requests import (
    AnyRequest,
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    Message,
    OpaquePart,
    Part,
    TextPart,
)

Clean = Callable[[str], str]

_SIGNED = frozenset({"signature", "encrypted_content"})
_DATA = frozenset({"data", "file_data"})


def mapped(request: AnyRequest, clean: Clean, quiet: Clean) -> AnyRequest:
    """The request with every text passed through `clean`: turns of a chat, arguments of tool calls, texts in
    other parts, prompts, texts to embed. Images, audio and the definitions of tools are not looked at.

    `quiet` does what `clean` does to a text and tells nobody: for pieces of a text that `clean` was given as
    a whole. Raises GuardRefused for token ids: rules read text.
    """
    if isinstance(request, ChatRequest):
        messages = tuple(_mapped_message(message, clean, quiet) for message in request.messages)
        if all(a is b for a, b in zip(messages, request.messages, strict=True)):
            return request
        contents = [(old.content, new.content) for old, new in zip(request.messages, messages, strict=True)]
        return replace(request, messages=messages, boundaries=_moved(request.boundaries, contents, quiet))
    if isinstance(request, CompletionRequest):
        if not isinstance(request.prompt, str):
            raise _unreadable()
        prompt = clean(request.prompt)
        boundaries = _moved(request.boundaries, [(request.prompt, prompt)], quiet)
        return replace(request, prompt=prompt, boundaries=boundaries)
    return replace(request, inputs=tuple(clean(_readable(each)) for each in request.inputs))


def texts(request: AnyRequest) -> list[str]:
    """All texts of a request that `mapped` let pass."""
    found: list[str] = []

    def read(text: str) -> str:
        if text:
            found.append(text)
        return text

    if isinstance(request, ChatRequest):
        for message in request.messages:
            read(message.content)
            for part in message.parts:
                if isinstance(part, OpaquePart):
                    _mapped_json(part.value, read)
            for call in message.tool_calls:
                read(call.arguments)
    elif isinstance(request, CompletionRequest):
        read(_readable(request.prompt))
    else:
        for each in request.inputs:
            read(_readable(each))
    return found


def _mapped_message(message: Message, clean: Clean, quiet: Clean) -> Message:
    content = clean(message.content)
    calls = tuple(replace(call, arguments=clean(call.arguments)) for call in message.tool_calls)
    parts = message.parts
    if parts:
        parts = tuple(_mapped_opaque(part, clean) for part in parts)
        # What was found in the whole content has been told; what a part alone shows has not.
        content, parts = _agreed(content, parts, quiet if content != message.content else clean, quiet)
    if content == message.content and calls == message.tool_calls and parts == message.parts:
        return message
    return replace(message, content=content, parts=parts, tool_calls=calls)


def _agreed(
    content: str, parts: tuple[Part, ...], clean: Clean, quiet: Clean
) -> tuple[str, tuple[Part, ...]]:
    """A clean content and its parts, such that the parts' texts joined are the content."""
    cleaned = [TextPart(clean(part.text)) if isinstance(part, TextPart) else part for part in parts]
    texts_only = [part.text for part in cleaned if isinstance(part, TextPart)]
    joined = "".join(texts_only)
    if joined == content or len(texts_only) < 2:
        return content, tuple(cleaned)
    content = quiet(joined)
    if content == joined:
        return content, tuple(cleaned)
    # Something lies across two parts, and neither shows it alone: their texts become one, in the first place.
    first = next(n for n, part in enumerate(cleaned) if isinstance(part, TextPart))
    kept: list[Part] = [part for part in cleaned if not isinstance(part, TextPart)]
    kept.insert(first, TextPart(content))
    return content, tuple(kept)


def _mapped_opaque(part: Part, clean: Clean) -> Part:
    if not isinstance(part, OpaquePart):
        return part
    value = _mapped_json(part.value, clean)
    return part if value == part.value else replace(part, value=value)


def _mapped_json(value: object, clean: Clean) -> Any:
    """Every text in a JSON value but names of fields, signatures and data in base64."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, object], value)
        unread = _SIGNED if fields.get("type") == "text" else _SIGNED | _DATA
        return {name: each if name in unread else _mapped_json(each, clean) for name, each in fields.items()}
    if isinstance(value, list | tuple):
        return [_mapped_json(each, clean) for each in cast(Sequence[object], value)]
    return value


def _moved(
    boundaries: tuple[CacheBoundary, ...], contents: Sequence[tuple[str, str]], quiet: Clean
) -> tuple[CacheBoundary, ...]:
    """Boundaries at the same places of texts that have changed in front of them; one within what was
    redacted stands before it."""
    moved: list[CacheBoundary] = []
    for boundary in boundaries:
        if boundary.characters is not None and 0 <= boundary.message < len(contents):
            before, after = contents[boundary.message]
            if before != after:
                front = quiet(before[: boundary.characters])
                boundary = replace(boundary, characters=_common(front, after))
        moved.append(boundary)
    return tuple(moved)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _readable(text: str | Sequence[int]) -> str:
    if not isinstance(text, str):
        raise _unreadable()
    return text


def _unreadable() -> GuardRefused:
    return GuardRefused(
        "This server's guards read text, and token ids are none; send the prompt as text.",
        code="guard_refused_input",
    )

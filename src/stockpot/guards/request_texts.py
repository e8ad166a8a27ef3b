"""Every text of a request: read for checks, or passed through a function that may change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from stockpot.errors import GuardRefused
from stockpot.requests import (
    AnyRequest,
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    Part,
    TextPart,
    Tool,
)

_T = TypeVar("_T")

Clean = Callable[[str], str]

_SIGNED = frozenset({"signature", "encrypted_content"})
_DATA = frozenset({"data", "file_data"})


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What is done to the texts of a request; each may raise."""

    whole: Clean
    piece: Clean
    """To a text that is part of one that `whole` was given."""
    quiet: Clean
    """As `whole`, but nobody is told: for pieces of a text that `whole` has changed."""
    label: Clean
    """To what is no prose: names of fields and tools, addresses, stop sequences."""


def mapped(request: AnyRequest, cleaning: Cleaning) -> AnyRequest:
    """The request with every text cleaned that a backend is given: turns of a chat and their authors' names,
    arguments of tool calls, addresses of images, texts in other parts, tools, schemas, arguments of the
    template, fields that are not read here, prompts, texts to embed. The same object if nothing changes.
    Data of images, audio and files, signatures and ids are not looked at.

    Raises GuardRefused for token ids: rules read text.
    """
    clean = cleaning.whole
    generation = _mapped_generation(request.generation, cleaning)
    if isinstance(request, ChatRequest):
        messages = tuple(_mapped_message(message, cleaning) for message in request.messages)
        boundaries = request.boundaries
        if all(a is b for a, b in zip(messages, request.messages, strict=True)):
            messages = request.messages
        else:
            pairs = zip(request.messages, messages, strict=True)
            contents = [(old.content, new.content) for old, new in pairs]
            boundaries = _moved(boundaries, contents, cleaning.quiet)
        choice = request.tool_choice
        if choice is not None and choice.name and (name := cleaning.label(choice.name)) != choice.name:
            choice = replace(choice, name=name)
        return _changed(
            request,
            generation=generation,
            messages=messages,
            boundaries=boundaries,
            template_arguments=_same_or(request.template_arguments, cleaning),
            tools=_same(request.tools, tuple(_mapped_tool(tool, cleaning) for tool in request.tools)),
            tool_choice=choice,
        )
    if isinstance(request, CompletionRequest):
        before = _readable(request.prompt)
        prompt = clean(before)
        boundaries = _moved(request.boundaries, [(before, prompt)], cleaning.quiet)
        return _changed(
            request,
            generation=generation,
            prompt=request.prompt if prompt == before else prompt,
            boundaries=_same(request.boundaries, boundaries),
        )
    inputs = tuple(clean(_readable(each)) for each in request.inputs)
    return _changed(
        request,
        generation=generation,
        inputs=request.inputs if list(inputs) == list(request.inputs) else inputs,
    )


def texts(request: AnyRequest) -> list[str]:
    """All texts of a request once: what a check reads. Labels are none."""
    found: list[str] = []

    def read(text: str) -> str:
        if text:
            found.append(text)
        return text

    mapped(request, Cleaning(read, _as_it_is, _as_it_is, _as_it_is))
    return found


def strings(request: AnyRequest) -> list[str]:
    """All that `mapped` passes through a function, pieces and names too. Raises GuardRefused for what it
    cannot read."""
    found: list[str] = []

    def read(text: str) -> str:
        found.append(text)
        return text

    try:
        mapped(request, Cleaning(read, read, read, read))
    except RecursionError as error:
        raise GuardRefused(
            "The request is nested too deeply for this server's guards to read; flatten its fields.",
            code="guard_refused_input",
        ) from error
    return found


def _as_it_is(text: str) -> str:
    return text


def _changed(request: Any, **fields: object) -> Any:
    """The request itself where no field is another object."""
    if all(getattr(request, name) is value for name, value in fields.items()):
        return request
    return replace(request, **fields)


def _same(before: _T, after: _T) -> _T:
    return before if after == before else after


def _same_or(value: Any, cleaning: Cleaning) -> Any:
    """A JSON value, cleaned; the same object if that changes nothing."""
    return _same(value, _mapped_json(value, cleaning)) if value else value


def _mapped_generation(generation: Generation, cleaning: Cleaning) -> Generation:
    output = generation.output_format
    if isinstance(output.schema, Mapping) or output.name:
        schema = _same_or(output.schema, cleaning)
        name = cleaning.label(output.name) if output.name else output.name
        if schema is not output.schema or name != output.name:
            output = replace(output, schema=schema, name=name)
    extras = _same_or(generation.extras, cleaning)
    stop = _same(generation.stop, tuple(map(cleaning.label, generation.stop)))
    user = generation.user and _same(generation.user, cleaning.quiet(generation.user))
    return cast(Generation, _changed(generation, output_format=output, extras=extras, stop=stop, user=user))


def _mapped_tool(tool: Tool, cleaning: Cleaning) -> Tool:
    description = tool.description
    cleaned = replace(
        tool,
        name=cleaning.label(tool.name),
        description=cleaning.whole(description) if description else description,
        parameters=_same_or(tool.parameters, cleaning),
    )
    return _same(tool, cleaned)


def _mapped_message(message: Message, cleaning: Cleaning) -> Message:
    clean, quiet = cleaning.whole, cleaning.quiet
    content = clean(message.content)
    name = clean(message.name) if message.name else message.name
    calls = tuple(
        replace(call, name=cleaning.label(call.name), arguments=clean(call.arguments))
        for call in message.tool_calls
    )
    parts = message.parts
    if parts:
        parts = tuple(_mapped_part(part, cleaning) for part in parts)
        # What was found in the whole content has been told; what a part alone shows has not.
        alone = quiet if content != message.content else cleaning.piece
        content, parts = _agreed(content, parts, alone, quiet)
    cleaned = replace(message, name=name, content=content, parts=parts, tool_calls=calls)
    return _same(message, cleaned)


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


def _mapped_part(part: Part, cleaning: Cleaning) -> Part:
    if isinstance(part, OpaquePart):
        value = _same_or(part.value, cleaning)
        return part if value is part.value else replace(part, value=value)
    if isinstance(part, ImagePart) and part.url and (url := cleaning.label(part.url)) != part.url:
        return replace(part, url=url)
    return part


def _mapped_json(value: object, cleaning: Cleaning) -> Any:
    """Every text in a JSON value, and the names of fields, but signatures and data in base64."""
    if isinstance(value, str):
        return cleaning.whole(value)
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, object], value)
        unread = _SIGNED if fields.get("type") == "text" else _SIGNED | _DATA
        cleaned: dict[str, Any] = {}
        for name, each in fields.items():
            as_named = cleaning.label(name)
            while as_named in cleaned:  # two names of which the same is left
                as_named += "_"
            if name in unread and isinstance(each, str):
                cleaned[as_named] = each
            else:
                cleaned[as_named] = _mapped_json(each, cleaning)
        return cleaned
    if isinstance(value, list | tuple):
        return [_mapped_json(each, cleaning) for each in cast(Sequence[object], value)]
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

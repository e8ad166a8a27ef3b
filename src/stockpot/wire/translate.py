"""From the shapes of the wire to the one request every backend is given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from stockpot.errors import RequestError, UnsupportedField
from stockpot.requests import (
    TOOLS,
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    OutputFormat,
    Part,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from stockpot.wire.arrival import Arrival, label_of, session_of
from stockpot.wire.shapes_chat import (
    ChatShape,
    ContentPart,
    ImageUrl,
    MessageShape,
    ResponseFormat,
    ToolChoiceShape,
    ToolShape,
)
from stockpot.wire.shapes_common import DOCUMENT_TAG, TTL_S, CacheControl, GenerationShape
from stockpot.wire.shapes_completion import CompletionShape

BOUNDARIES_MAX = 4
"""Boundaries of a request at most, as in the Anthropic API."""

_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]{1,64});base64,(?=[A-Za-z0-9+/])", re.IGNORECASE)

N = TypeVar("N", int, float)


def chat_request(
    shape: ChatShape, arrival: Arrival, extras: Mapping[str, Any] = MappingProxyType({})
) -> ChatRequest:
    """A chat; `extras` are the fields that are no part of the shape. Raises RequestError where fields
    contradict."""
    if shape.cache_control is not None:
        raise UnsupportedField(
            "'cache_control' of a chat stands on a message or on a part of its content"
            " ('messages[0].cache_control'); move it there.",
            param="cache_control",
        )
    if shape.top_logprobs is not None and not shape.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs': true; add it.", param="top_logprobs")
    generation = _generation(
        shape,
        arrival,
        extras,
        max_tokens=_max_tokens(shape),
        output_format=_output_format(shape.response_format),
        logprobs=(shape.top_logprobs or 0) if shape.logprobs else None,
    )
    tools = shape.tools or ()
    return ChatRequest(
        generation,
        messages_of(shape.messages),
        shape.chat_template_kwargs or {},
        _boundaries(shape.messages, tools),
        tuple(_tool(tool) for tool in tools),
        _tool_choice(shape.tool_choice, tools),
        shape.parallel_tool_calls,
    )


def completion_request(
    shape: CompletionShape, arrival: Arrival, extras: Mapping[str, Any] = MappingProxyType({})
) -> CompletionRequest:
    """A plain completion. Raises RequestError where fields contradict."""
    if shape.echo and shape.logprobs is not None:
        raise UnsupportedField(
            "'echo' together with 'logprobs' is not supported: the prompt's tokens have no log"
            " probabilities here; ask for one of them.",
            param="echo",
        )
    generation = _generation(
        shape,
        arrival,
        extras,
        max_tokens=shape.max_tokens,
        output_format=OutputFormat(),
        logprobs=shape.logprobs,
    )
    boundary = shape.cache_control and boundary_of(shape.cache_control, 0, None)
    return CompletionRequest(
        generation, shape.prompt, echo=bool(shape.echo), boundaries=(boundary,) if boundary else ()
    )


def messages_of(shapes: Sequence[MessageShape]) -> tuple[Message, ...]:
    """Turns with their text parts joined. Raises RequestError for parts that are not whole."""
    return tuple(_message(shape, index) for index, shape in enumerate(shapes))


def _message(shape: MessageShape, index: int) -> Message:
    if isinstance(shape.content, str):
        content, parts = shape.content, ()
    else:
        content, parts = _parts(shape.content, f"messages[{index}].content")
    if shape.role == "tool" and shape.tool_call_id is None:
        path = f"messages[{index}].tool_call_id"
        raise RequestError(f"The field '{path}' is missing; add it.", param=path)
    if not shape.tool_calls:
        return Message(shape.role, content, shape.name, parts, (), shape.tool_call_id)
    calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in shape.tool_calls)
    return Message(shape.role, content, shape.name, parts, calls)


def _parts(shapes: Sequence[ContentPart], path: str) -> tuple[str, tuple[Part, ...]]:
    """The texts joined, and all parts where one is something else."""
    parts = [_part(shape, f"{path}[{place}]") for place, shape in enumerate(shapes)]
    content = "".join(part.text for part in parts if isinstance(part, TextPart))
    return content, () if all(isinstance(part, TextPart) for part in parts) else tuple(parts)


def _part(shape: ContentPart, path: str) -> Part:
    fields: Mapping[str, Any] = shape.model_extra or {}
    if shape.type == "image_url":
        return _image(fields, path)
    if shape.type != "text":
        text = {} if shape.text is None else {"text": shape.text}
        return OpaquePart("openai", {"type": shape.type, **text, **fields})
    for name in fields:
        raise _unsupported(f"{path}.{name[:80]}")
    if shape.text is None:
        raise RequestError(f"The field '{path}.text' is missing; add it.", param=f"{path}.text")
    return TextPart(shape.text)


def _image(fields: Mapping[str, Any], path: str) -> ImagePart:
    for name in fields.keys() - {"image_url"}:
        raise _unsupported(f"{path}.{name[:80]}")
    path = f"{path}.image_url"
    try:
        image = ImageUrl.model_validate(fields.get("image_url"))
    except ValidationError as error:
        raise RequestError(
            f"'{path}' must be an object with 'url' (a text) and, if need be, 'detail' (auto, low or high).",
            param=path,
        ) from error
    if image.url.startswith(("https://", "http://")):
        return ImagePart(url=image.url, detail=image.detail)
    data = _DATA_URL.match(image.url)
    if data is None:
        raise RequestError(
            f"'{path}.url' must begin with https://, http:// or, for the image itself,"
            " data:image/TYPE;base64, and be followed by the rest of it.",
            param=f"{path}.url",
        )
    return ImagePart(media_type=data[1].lower(), data=image.url[data.end() :], detail=image.detail)


def _unsupported(path: str) -> UnsupportedField:
    return UnsupportedField(f"The field '{path}' is not supported by this server; remove it.", param=path)


def _tool(shape: ToolShape) -> Tool:
    function = shape.function
    return Tool(function.name, function.description, function.parameters, function.strict)


def _tool_choice(shape: ToolChoiceShape | None, tools: Sequence[ToolShape]) -> ToolChoice | None:
    if shape is None or isinstance(shape, str):
        return None if shape is None else ToolChoice(shape)
    name = shape.function.name
    if tools and all(tool.function.name != name for tool in tools):
        raise RequestError(
            f"'tool_choice' names {name[:80]!r}, which is none of the 'tools'; name one of them.",
            param="tool_choice.function.name",
        )
    return ToolChoice("named", name)


def _boundaries(shapes: Sequence[MessageShape], tools: Sequence[ToolShape] = ()) -> tuple[CacheBoundary, ...]:
    """The boundaries of tools and messages, in order. Raises RequestError for more than `BOUNDARIES_MAX`."""
    found = [
        boundary_of(tool.cache_control, TOOLS, place)
        for place, tool in enumerate(tools)
        if tool.cache_control is not None
    ]
    for index, shape in enumerate(shapes):
        characters = 0
        for part in () if isinstance(shape.content, str) else shape.content:
            if part.type == "text":
                characters += len(part.text or "")
            if part.cache_control is not None:
                found.append(boundary_of(part.cache_control, index, characters))
        if shape.cache_control is not None:
            found.append(boundary_of(shape.cache_control, index, None))
    if len(found) > BOUNDARIES_MAX:
        raise RequestError(
            f"The messages have {len(found)} boundaries ('cache_control'); send at most {BOUNDARIES_MAX}.",
            param="messages",
        )
    return tuple(found)


def boundary_of(control: CacheControl, message: int, characters: int | None) -> CacheBoundary:
    """What a `cache_control` at this place asks for; see `CacheBoundary` for the place."""
    tags = set(control.tags or ())
    if control.document is not None:
        tags.add(DOCUMENT_TAG + control.document)
    return CacheBoundary(
        message,
        characters,
        ttl_s=TTL_S[control.ttl or "5m"],
        shared=control.scope == "shared",
        tags=frozenset(tags),
    )


def _generation(
    shape: GenerationShape,
    arrival: Arrival,
    extras: Mapping[str, Any],
    *,
    max_tokens: int | None,
    output_format: OutputFormat,
    logprobs: int | None,
) -> Generation:
    if shape.stream_options is not None and not shape.stream:
        raise RequestError("'stream_options' needs 'stream': true; add it.", param="stream_options")
    longest_s = arrival.longest_s
    if shape.timeout is not None and shape.timeout > longest_s:
        raise RequestError(
            f"'timeout' must be at most {longest_s:g} seconds, this server's own limit"
            f" (engine.request_timeout_s); got {shape.timeout:g}.",
            param="timeout",
        )
    return Generation(
        model=shape.model,
        request_id=arrival.request_id,
        sampling=_sampling(shape),
        output_format=output_format,
        max_tokens=max_tokens,
        stop=tuple(shape.stop or ()),
        choices=_or(shape.n, 1),
        logprobs=logprobs,
        ignore_eos=bool(shape.ignore_eos),
        deadline_s=_or(shape.timeout, longest_s),
        tenant=arrival.tenant,
        client_request_id=arrival.client_request_id,
        caller=arrival.caller,
        session=session_of(arrival, extras.get("prompt_cache_key"), extras.get("user")),
        task=arrival.task,
        user=label_of(extras.get("user")),
        priority=arrival.priority,
        stream=bool(shape.stream),
        extras=extras,
        trace_parent=arrival.trace_parent,
        recall=arrival.recall,
    )


def _sampling(shape: GenerationShape) -> Sampling:
    return Sampling(
        temperature=_or(shape.temperature, 1.0),
        top_p=_or(shape.top_p, 1.0),
        top_k=max(0, _or(shape.top_k, 0)),  # vLLM writes "off" as -1, llama-server as 0
        min_p=_or(shape.min_p, 0.0),
        presence_penalty=_or(shape.presence_penalty, 0.0),
        frequency_penalty=_or(shape.frequency_penalty, 0.0),
        repetition_penalty=_or(shape.repetition_penalty, 1.0),
        logit_bias=shape.logit_bias or {},
        # Generators want a seed that is not negative: two's complement keeps seeds apart.
        seed=None if shape.seed is None else shape.seed % 2**64,
    )


def _max_tokens(shape: ChatShape) -> int | None:
    """`max_tokens` is the older name of `max_completion_tokens`."""
    older, newer = shape.max_tokens, shape.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise RequestError(
            f"'max_tokens' is {older} and 'max_completion_tokens' is {newer}; send one of them.",
            param="max_tokens",
        )
    return older if newer is None else newer


def _output_format(shape: ResponseFormat | None) -> OutputFormat:
    if shape is None:
        return OutputFormat()
    if (shape.type == "json_schema") != (shape.json_schema is not None):
        raise RequestError(
            "'response_format.json_schema' and the type 'json_schema' go together; send both or none.",
            param="response_format.json_schema",
        )
    schema = shape.json_schema
    if schema is None:
        return OutputFormat(shape.type)
    return OutputFormat(shape.type, schema.schema_, schema.name, schema.strict)


def _or(value: N | None, default: N) -> N:
    return default if value is None else value

"""From the shapes of the wire to the one request every backend is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from stockpot.errors import RequestError, UnsupportedField
from stockpot.requests import (
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    Generation,
    Message,
    OutputFormat,
    Sampling,
)
from stockpot.wire.shapes_chat import ChatShape, MessageShape, ResponseFormat
from stockpot.wire.shapes_common import DOCUMENT_TAG, TTL_S, CacheControl, GenerationShape
from stockpot.wire.shapes_completion import CompletionShape

BOUNDARIES_MAX = 4
"""Boundaries of a request at most, as in the Anthropic API."""

N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of a request besides its body; see `requests.Generation`. `longest_s` is the server's own
    deadline."""

    request_id: str
    longest_s: float
    tenant: str = ""
    client_request_id: str = ""


def chat_request(shape: ChatShape, arrival: Arrival) -> ChatRequest:
    """A chat. Raises RequestError where fields contradict."""
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
        max_tokens=_max_tokens(shape),
        output_format=_output_format(shape.response_format),
        logprobs=(shape.top_logprobs or 0) if shape.logprobs else None,
    )
    return ChatRequest(
        generation,
        messages_of(shape.messages),
        shape.chat_template_kwargs or {},
        _boundaries(shape.messages),
    )


def completion_request(shape: CompletionShape, arrival: Arrival) -> CompletionRequest:
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
        max_tokens=shape.max_tokens,
        output_format=OutputFormat(),
        logprobs=shape.logprobs,
    )
    boundary = shape.cache_control and _boundary(shape.cache_control, 0, None)
    return CompletionRequest(
        generation, shape.prompt, echo=bool(shape.echo), boundaries=(boundary,) if boundary else ()
    )


def messages_of(shapes: list[MessageShape]) -> tuple[Message, ...]:
    """Turns with their text parts joined. Raises UnsupportedField for parts that are not text."""
    return tuple(
        Message(shape.role, _content(shape, index), shape.name) for index, shape in enumerate(shapes)
    )


def _content(shape: MessageShape, index: int) -> str:
    if isinstance(shape.content, str):
        return shape.content
    texts: list[str] = []
    for place, part in enumerate(shape.content):
        path = f"messages[{index}].content[{place}]"
        if part.type != "text":
            raise UnsupportedField(
                f"'{path}' has the type {part.type[:40]!r}; this server takes parts of type 'text' alone.",
                param=f"{path}.type",
            )
        if part.model_extra:
            name = f"{path}.{next(iter(part.model_extra))[:80]}"
            raise UnsupportedField(
                f"The field '{name}' is not supported by this server; remove it.", param=name
            )
        if part.text is None:
            raise RequestError(f"The field '{path}.text' is missing; add it.", param=f"{path}.text")
        texts.append(part.text)
    return "".join(texts)


def _boundaries(shapes: list[MessageShape]) -> tuple[CacheBoundary, ...]:
    """The boundaries of all messages, in order. Raises RequestError for more than `BOUNDARIES_MAX`."""
    found: list[CacheBoundary] = []
    for index, shape in enumerate(shapes):
        characters = 0
        for part in () if isinstance(shape.content, str) else shape.content:
            characters += len(part.text or "")
            if part.cache_control is not None:
                found.append(_boundary(part.cache_control, index, characters))
        if shape.cache_control is not None:
            found.append(_boundary(shape.cache_control, index, None))
    if len(found) > BOUNDARIES_MAX:
        raise RequestError(
            f"The messages have {len(found)} boundaries ('cache_control'); send at most {BOUNDARIES_MAX}.",
            param="messages",
        )
    return tuple(found)


def _boundary(control: CacheControl, message: int, characters: int | None) -> CacheBoundary:
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
    return OutputFormat(shape.type, None if shape.json_schema is None else shape.json_schema.schema_)


def _or(value: N | None, default: N) -> N:
    return default if value is None else value

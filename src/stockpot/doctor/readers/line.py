"""One line of JSON, of whatever kind: a body, or one wrapped in what is known about it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import msgspec
from msgspec import UNSET, Raw, UnsetType

from stockpot.doctor.exchange import Exchange, Shape, Usage, start_of
from stockpot.doctor.readers.body import Body, Keys, parameters_of, pieces_of, shape_of

_MILLISECONDS_FROM = 1e11
"""A number of seconds is not that large before the year 5138."""
_SHAPES: tuple[Shape, ...] = ("openai-chat", "openai-responses", "anthropic", "completion")

Text = str | None


class Line(Body):
    """All fields that are known, wherever they come from: one decoding decides what a line is."""

    body: Raw | UnsetType = UNSET
    request: Raw | UnsetType = UNSET
    kwargs: Raw | UnsetType = UNSET
    request_body: Raw | UnsetType = UNSET
    requestBody: Raw | UnsetType = UNSET  # noqa: N815  as it is spelt there
    response: Raw | UnsetType = UNSET
    response_body: Raw | UnsetType = UNSET
    responseBody: Raw | UnsetType = UNSET  # noqa: N815
    output: Raw | UnsetType = UNSET
    usage: Raw | UnsetType = UNSET
    at: Raw | UnsetType = UNSET
    timestamp: Raw | UnsetType = UNSET
    time: Raw | UnsetType = UNSET
    ts: Raw | UnsetType = UNSET
    created_at: Raw | UnsetType = UNSET
    startTime: Raw | UnsetType = UNSET  # noqa: N815
    start_time: Raw | UnsetType = UNSET
    id: Raw | UnsetType = UNSET
    request_id: Raw | UnsetType = UNSET
    custom_id: Raw | UnsetType = UNSET
    session: Raw | UnsetType = UNSET
    session_id: Raw | UnsetType = UNSET
    sessionId: Raw | UnsetType = UNSET  # noqa: N815
    conversation_id: Raw | UnsetType = UNSET
    tenant: Raw | UnsetType = UNSET
    team: Raw | UnsetType = UNSET
    organization: Raw | UnsetType = UNSET
    backend: Raw | UnsetType = UNSET
    server: Raw | UnsetType = UNSET
    provider: Raw | UnsetType = UNSET
    shape: Raw | UnsetType = UNSET
    url: Raw | UnsetType = UNSET
    prompt_tokens: Raw | UnsetType = UNSET
    cached_tokens: Raw | UnsetType = UNSET
    written_tokens: Raw | UnsetType = UNSET
    completion_tokens: Raw | UnsetType = UNSET
    ttft_s: Raw | UnsetType = UNSET
    cost_usd: Raw | UnsetType = UNSET
    # Lines of transcripts and logs.
    type: Raw | UnsetType = UNSET
    message: Raw | UnsetType = UNSET
    payload: Raw | UnsetType = UNSET
    logger: Raw | UnsetType = UNSET
    isSidechain: Raw | UnsetType = UNSET  # noqa: N815
    isCompactSummary: Raw | UnsetType = UNSET  # noqa: N815
    agentId: Raw | UnsetType = UNSET  # noqa: N815


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class UsageJson(msgspec.Struct):
    """Token counts as OpenAI, Anthropic, DeepSeek and Codex spell them."""

    prompt_tokens: int | None = None
    input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    cached_input_tokens: int | None = None
    prompt_cache_hit_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Answer(msgspec.Struct):
    usage: UsageJson | None = None
    id: Any = None
    body: Raw | UnsetType = UNSET


_BODY = msgspec.json.Decoder(Body)
_ANSWER = msgspec.json.Decoder(_Answer)
_USAGE = msgspec.json.Decoder(UsageJson)
_ANY = msgspec.json.Decoder()


def exchange_of(
    line: Line, file: str, number: int, size_bytes: int, *, keys: Keys, marked: bool
) -> Exchange | None:
    """The request a line is; None where there is none in it. `marked`: there are boundaries in it. Raises
    msgspec.MsgspecError."""
    body: Body = line
    answer: _Answer | None = None
    if not line.is_one or line.body is not UNSET:
        inner = _first(line.body, line.request, line.kwargs, line.request_body, line.requestBody)
        if inner is None:
            return None
        raw = bytes(inner)
        if raw[:1] == b'"':  # JSON within JSON
            raw = cast("str", _ANY.decode(raw)).encode()
        if raw[:1] != b"{":
            return None
        body = _BODY.decode(raw)
        if not body.is_one:
            wrapped = msgspec.json.decode(raw, type=Line)
            return (
                exchange_of(wrapped, file, number, size_bytes, keys=keys, marked=marked)
                if wrapped.body is not UNSET
                else None
            )
    if (
        given := _first(line.response, line.response_body, line.responseBody, line.output)
    ) is not None and bytes(given)[:1] == b"{":
        answer = _ANSWER.decode(given)
        if answer.usage is None and answer.body is not UNSET and bytes(answer.body)[:1] == b"{":
            answer = _ANSWER.decode(answer.body)
    shape = _shape(line, body)
    pieces = pieces_of(body, shape, keys if marked or shape == "anthropic" else None)
    return Exchange(
        file=file,
        line=number,
        shape=shape,
        pieces=pieces,
        start=start_of(pieces),
        model=body.model or line.model or "",
        provider=_text(line.provider),
        at_s=time_of(
            _first(
                line.at, line.timestamp, line.time, line.ts, line.created_at, line.startTime, line.start_time
            )
        ),
        request=_text(_first(line.request_id, line.custom_id, line.id)) or _label(answer),
        session=_text(_first(line.session, line.session_id, line.sessionId, line.conversation_id)),
        tenant=_text(_first(line.tenant, line.team, line.organization)),
        backend=_text(_first(line.backend, line.server)),
        usage=_usage(line, answer),
        ttft_s=_number(line.ttft_s),
        cost_usd=_number(line.cost_usd),
        parameters=parameters_of(body),
        size_bytes=size_bytes,
    )


def usage_of(read: UsageJson | None) -> Usage | None:
    """Of whatever spelling; None where the prompt was not counted."""
    if read is None:
        return None
    details = read.prompt_tokens_details or read.input_tokens_details
    cached = _given(read.cache_read_input_tokens, read.cached_input_tokens, read.prompt_cache_hit_tokens)
    if cached is None and details is not None:
        cached = details.cached_tokens
    written = read.cache_creation_input_tokens
    if written is None and details is not None:
        written = details.cache_write_tokens
    prompt = _given(read.prompt_tokens, read.input_tokens)
    if prompt is None:
        return None
    if read.cache_read_input_tokens is not None or read.cache_creation_input_tokens is not None:
        # Anthropic counts what was read and written apart.
        prompt += (read.cache_read_input_tokens or 0) + (read.cache_creation_input_tokens or 0)
    return Usage(prompt, cached, written, _given(read.completion_tokens, read.output_tokens))


def time_of(value: Raw | None) -> float | None:
    """Unix time of a number (seconds or milliseconds) or of an ISO 8601 text."""
    if value is None:
        return None
    found: Any = _ANY.decode(value)
    if isinstance(found, str):
        try:
            found = float(found)
        except ValueError:
            try:
                read = datetime.fromisoformat(found)
            except ValueError:
                return None
            return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return found / 1e3 if found > _MILLISECONDS_FROM else float(found)


def _shape(line: Line, body: Body) -> Shape:
    said = _text(line.shape)
    for shape in _SHAPES:
        if said == shape:
            return shape
    url = _text(line.url)
    if url.endswith("/messages"):
        return "anthropic"
    return shape_of(body)


def _usage(line: Line, answer: _Answer | None) -> Usage | None:
    if (prompt := _number(line.prompt_tokens)) is not None:
        cached, written, output = (
            _whole(each) for each in (line.cached_tokens, line.written_tokens, line.completion_tokens)
        )
        # Our own recordings leave out what is 0.
        own = line.body is not UNSET and line.at is not UNSET
        return Usage(int(prompt), 0 if own and cached is None else cached, written, output)
    if line.usage is not UNSET and bytes(line.usage)[:1] == b"{":
        return usage_of(_USAGE.decode(line.usage))
    return usage_of(answer.usage) if answer is not None else None


def _first(*values: Raw | UnsetType) -> Raw | None:
    for value in values:
        if value is not UNSET and bytes(value) != b"null":
            return value
    return None


def _text(value: Raw | UnsetType | None) -> str:
    if value is None or value is UNSET:
        return ""
    found: Any = _ANY.decode(value)
    return found if isinstance(found, str) else "" if isinstance(found, dict | list | None) else str(found)


def _number(value: Raw | UnsetType) -> float | None:
    if value is UNSET:
        return None
    found: Any = _ANY.decode(value)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _whole(value: Raw | UnsetType) -> int | None:
    found = _number(value)
    return None if found is None else int(found)


def _given(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _label(answer: _Answer | None) -> str:
    return answer.id if answer is not None and isinstance(answer.id, str) else ""

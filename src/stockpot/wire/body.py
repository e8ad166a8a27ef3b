"""From bytes to a shape: bounded reading, strict JSON, and refusals that name field, value and range."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from starlette.requests import Request

from stockpot.backends.refusals import Tolerated, without_tolerated
from stockpot.errors import BodyTooLarge, BodyTooSlow, RequestError
from stockpot.settings import ServerSettings
from stockpot.wire.tolerated import LEGACY, MESSAGE, STREAM_OPTIONS

_MESSAGE_FIELDS = frozenset({"role", "content", "name", "cache_control"})
_FIELDS_OF_ROLE: Mapping[Any, frozenset[str]] = {
    "assistant": _MESSAGE_FIELDS | {"tool_calls"},
    "tool": _MESSAGE_FIELDS | {"tool_call_id"},
}
_STREAM_OPTIONS_FIELDS = frozenset({"include_usage", "include_progress"})
_BODY = "stockpot.body"
_SHOWN_CHARACTERS = 60
_PLAUSIBLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

S = TypeVar("S", bound=BaseModel)


async def read_shape(
    request: Request, shape: type[S], tolerated: Mapping[str, Tolerated], server: ServerSettings
) -> S:
    """The request's body as a `shape`. Raises RequestError for everything that is wrong with it."""
    honoured = frozenset(field.alias or name for name, field in shape.model_fields.items())
    return shape_of(without_tolerated(await read_fields(request, server), honoured, tolerated), shape)


async def read_extensible(
    request: Request, shape: type[S], server: ServerSettings
) -> tuple[S, dict[str, Any]]:
    """The request's body as a `shape`, and the fields that are not part of it: a backend may know them.
    Raises RequestError for everything else that is wrong."""
    fields = await read_fields(request, server)
    known = shape.model_fields
    extras: dict[str, Any] = {}
    if not known.keys() >= fields.keys():
        for name in [name for name in fields if name not in known]:
            value = fields.pop(name)
            # What is no name of a field, or goes by another name now, is refused; see `tolerated`.
            if name in LEGACY or not _PLAUSIBLE_NAME.fullmatch(name):
                without_tolerated({name: value}, frozenset(), LEGACY)
            else:
                extras[name] = value
    return shape_of(fields, shape), extras


def body_of(request: Request) -> bytes:
    """The body that was read, as it was sent."""
    return request.scope[_BODY]


async def read_fields(request: Request, server: ServerSettings) -> dict[str, Any]:
    """The request's body as a JSON object. Raises RequestError where it is none."""
    content_type = request.headers.get("content-type", "")
    # Browsers send other types across origins without asking; requiring this one keeps strange pages out.
    if (
        content_type != "application/json"
        and content_type.partition(";")[0].strip().lower() != "application/json"
    ):
        raise RequestError(
            f"The body has the content type {_shown(content_type)}; send 'Content-Type: application/json'.",
            code="unsupported_content_type",
        )
    body = request.scope[_BODY] = await _read(request, server)
    try:
        return _decoded(body)
    except RequestError as error:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding == "identity":
            raise
        raise RequestError(
            f"The body has the Content-Encoding {_shown(encoding)}, which this server does not unpack; send"
            " it as it is.",
            code="unsupported_content_encoding",
        ) from error


def shape_of(fields: dict[str, Any], shape: type[S]) -> S:
    """`fields` as a `shape`. Raises RequestError for the first that does not fit."""
    _tidy_nested(fields)
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refusal(first, shape) from error


async def _read(request: Request, server: ServerSettings) -> bytes:
    """The body; stops at the bounds of size, whether the length was announced or not, and of time."""
    max_bytes = server.max_body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(server.body_timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise _too_large(max_bytes)
                body += chunk
    except TimeoutError as error:
        raise BodyTooSlow(
            f"Of the body only {len(body)} bytes arrived within {server.body_timeout_s:g} s "
            "(server.body_timeout_s); send it at once."
        ) from error
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The body is larger than {max_bytes} bytes, the most this server reads (server.max_body_bytes)."
    )


def _decoded(body: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8 alone, no NaN or Infinity, no lone surrogates, nesting within reason."""
    try:
        decoded = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The body is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}; send UTF-8.",
            code="invalid_utf8",
        ) from error
    except msgspec.MsgspecError as error:
        raise RequestError(
            f"The body is not valid JSON: {error}; correct it.", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise RequestError("The body is nested too deeply; flatten it.", code="invalid_json") from error
    if not isinstance(decoded, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    return cast(dict[str, Any], decoded)


def _tidy_nested(fields: dict[str, Any]) -> None:
    """Take tolerated fields out of messages and stream options; wrong types are left to the shape."""
    messages = fields.get("messages")
    if isinstance(messages, list):
        entries = cast(list[Any], messages)
        for index, entry in enumerate(entries):
            if isinstance(entry, dict) and not _MESSAGE_FIELDS.issuperset(cast(dict[str, Any], entry)):
                entries[index] = _tidy_message(cast(dict[str, Any], entry), f"messages[{index}]")
    options = fields.get("stream_options")
    if isinstance(options, dict):
        fields["stream_options"] = without_tolerated(
            cast(dict[str, Any], options), _STREAM_OPTIONS_FIELDS, STREAM_OPTIONS, "stream_options"
        )


def _tidy_message(message: dict[str, Any], path: str) -> dict[str, Any]:
    """A message without what makes no difference in it; a turn of the model that has no text of its own
    (it called tools, or refused) gets one."""
    role = message.get("role")
    if role == "assistant" and message.get("content") is None:
        refusal = message.get("refusal")
        if isinstance(refusal, str):
            message = {**message, "content": refusal, "refusal": None}
        elif message.get("tool_calls"):
            message = {**message, "content": ""}
    known = _FIELDS_OF_ROLE.get(role if isinstance(role, str) else None, _MESSAGE_FIELDS)
    return without_tolerated(message, known, MESSAGE, path)


def _refusal(error: ErrorDetails, shape: type[BaseModel]) -> RequestError:
    path = _path(error["loc"])
    if error["type"] == "missing":
        return RequestError(f"The field '{path}' is missing; add it.", param=path)
    if error["type"] == "extra_forbidden":
        return RequestError(
            f"The field '{path}' is not supported by this server; remove it.",
            param=path,
            code="unsupported_field",
        )
    field = shape.model_fields.get(str(error["loc"][0])) if len(error["loc"]) == 1 else None
    allowed = _range(field) if field is not None and error["type"] in _RANGE_ERRORS else None
    if error["type"] == "model_type":  # pydantic's words name a class of ours
        allowed = "an object"
    wanted = f"must be {allowed}" if allowed else _wanted(error["msg"])
    return RequestError(f"'{path}' {wanted}; got {_shown(error['input'])}.", param=path)


_RANGE_ERRORS = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})


def _wanted(message: str) -> str:
    """Pydantic's words as the end of a sentence."""
    for start, instead in (("Input should be", "must be"), ("Value error, ", ""), ("Input should ", "must ")):
        if message.startswith(start):
            return instead + message[len(start) :]
    return f"is not as it must be: {message}"


def _range(field: FieldInfo) -> str | None:
    """The whole range a number may have, from the field's own declaration."""
    bounds = {
        name: getattr(part, name)
        for part in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(part, name)
    }
    lower = (
        f"at least {bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']}" if "gt" in bounds else ""
    )
    upper = f"at most {bounds['le']}" if "le" in bounds else f"below {bounds['lt']}" if "lt" in bounds else ""
    return " and ".join(part for part in (lower, upper) if part) or None


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path


def _shown(value: Any) -> str:
    """A value as it may stand in a message: short, whatever was sent."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 256:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."

"""Every error as the Anthropic API spells it: `{"type": "error", "error": {"type", "message"}}` and a status.

Source: Anthropic API reference, "Errors". The words are those of `wire.errors`, and so is what may be told.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, UnsetType

from stockpot.errors import EngineFailed, StockpotError
from stockpot.wire.errors import ErrorDetail, body_of

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class AnthropicErrorCode(msgspec.Struct, frozen=True, omit_defaults=True):
    """`error_code`: our stable word, where the official client looks for one (`APIStatusError.error_code`).
    `param` is the path of the field at fault; ours."""

    error_code: str
    param: str | None = None


class AnthropicError(msgspec.Struct, frozen=True):
    """What happened; `type` follows from the status."""

    type: str
    message: str
    details: AnthropicErrorCode | UnsetType = UNSET


class AnthropicErrorBody(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """The whole body of a refusal, and the data of an `error` event."""

    error: AnthropicError
    request_id: str | UnsetType = UNSET


def anthropic_body(error: StockpotError, request_id: str | None = None) -> AnthropicErrorBody:
    """What the client is told of an error."""
    # An engine that has stopped is no overload, which its status alone would say.
    type_ = "api_error" if isinstance(error, EngineFailed) else anthropic_type(error.status)
    return _body(type_, body_of(error).error, request_id)


def anthropic_body_of_status(
    status: int, detail: ErrorDetail, request_id: str | None = None
) -> AnthropicErrorBody:
    """What the client is told of a refusal of the framework (no such route, no such method), or of a failure
    nobody foresaw, whose words for OpenAI's shape are `detail`."""
    return _body(anthropic_type(status), detail, request_id)


def anthropic_type(status: int) -> str:
    """The word for a status."""
    return _TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")


def error_event(error: StockpotError, request_id: str | None = None) -> bytes:
    """The SSE event that tells of an error inside a stream, and ends it."""
    return b"event: error\ndata: " + msgspec.json.encode(anthropic_body(error, request_id)) + b"\n\n"


def _body(type_: str, detail: ErrorDetail, request_id: str | None) -> AnthropicErrorBody:
    code = UNSET if detail.code is None else AnthropicErrorCode(detail.code, detail.param)
    return AnthropicErrorBody(AnthropicError(type_, detail.message, code), request_id or UNSET)

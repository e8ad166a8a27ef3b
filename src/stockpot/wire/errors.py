"""Every error as the OpenAI API spells it: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from stockpot.errors import (
    AllowanceExceeded,
    DeadlineExceeded,
    EngineFailed,
    NotCached,
    RequestError,
    ShuttingDown,
    StockpotError,
    Unauthenticated,
    UpstreamError,
)
from stockpot.events import Finished
from stockpot.requests import Dialect

_DEFAULT_RETRY_AFTER_S = 1.0
_RETRYABLE = frozenset({429, 503})
_TYPES: Mapping[int, str] = {
    402: "insufficient_quota",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_ANTHROPIC_PATHS = "/v1/messages"


class ErrorDetail(msgspec.Struct, frozen=True):
    """`param` is the path of the field at fault, `code` a stable word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The whole body of a refusal."""

    error: ErrorDetail


class GenerationFailed(StockpotError):
    """A choice ended with an error of its own; the server is well."""


def dialect_of(path: str) -> Dialect:
    """Whose words the clients of a route know."""
    return "anthropic" if path.startswith(_ANTHROPIC_PATHS) else "openai"


def body_of(error: StockpotError) -> ErrorBody:
    """What the client is told. The words of an error that is neither the request's nor a backend's may
    speak of files and machines: they stay in the log."""
    if isinstance(error, RequestError | UpstreamError):
        return ErrorBody(ErrorDetail(str(error), _type(error.status), error.param, error.code))
    if isinstance(error, GenerationFailed):
        return ErrorBody(ErrorDetail(str(error), _type(error.status), None, "generation_failed"))
    if isinstance(error, EngineFailed):
        return ErrorBody(ErrorDetail(str(error), _type(error.status), None, "engine_failed"))
    return internal_error(None)


def body_in(error: StockpotError, dialect: Dialect, request_id: str | None = None) -> Any:
    """`body_of` in the words of a dialect, encodable by msgspec."""
    if dialect == "openai":
        return body_of(error)
    from stockpot.wire.anthropic_errors import anthropic_body  # which builds on this module

    return anthropic_body(error, request_id)


def internal_error(request_id: str | None) -> ErrorBody:
    """What the client is told of a failure that is ours."""
    where = f" It is logged under the request id {request_id}." if request_id else ""
    return ErrorBody(
        ErrorDetail(f"The server failed on this request.{where}", "server_error", None, "internal_error")
    )


def error_event(error: StockpotError, dialect: Dialect) -> bytes:
    """The SSE event that tells of an error inside a stream, and ends it."""
    if dialect == "openai":
        return b"data: " + msgspec.json.encode(body_of(error)) + b"\n\n"
    from stockpot.wire import anthropic_errors  # which builds on this module

    return anthropic_errors.error_event(error)


def request_id_in(scope: Scope) -> str | None:
    """The id of the request, where the edge gave it one."""
    return scope.get("state", {}).get("request_id")


def respond(error: StockpotError, dialect: Dialect = "openai", *, request_id: str | None = None) -> Response:
    """The error as a response; what may pass says when to come back."""
    headers: dict[str, str] = {}
    wanted = error.retry_after_s if isinstance(error, RequestError | UpstreamError) else None
    if wanted is not None or error.status in _RETRYABLE:
        headers["retry-after"] = str(max(1, math.ceil(wanted or _DEFAULT_RETRY_AFTER_S)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"  # RFC 9110, 11.6.1: a 401 says how to authenticate
    never = isinstance(error, DeadlineExceeded | NotCached)
    if never or (isinstance(error, AllowanceExceeded) and wanted is None):
        # The official clients retry 408, 429 and 504: the same deadline would pass again, the limit not move,
        # and nobody makes the answer that is not kept.
        headers["x-should-retry"] = "false"
        headers.pop("retry-after", None)
    return json_response(body_in(error, dialect, request_id), status=error.status, headers=headers)


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content`, anything msgspec encodes, as a JSON response."""
    return Response(
        msgspec.json.encode(content),
        status_code=status,
        headers=dict(headers) if headers else None,
        media_type="application/json",
    )


def failure_of(finished: Finished) -> StockpotError | None:
    """The error a choice's end stands for, None for a natural end."""
    match finished.reason:
        case "stop" | "length" | "tool_calls" | "content_filter":
            return None
        case "cancelled":
            return ShuttingDown("The server stopped before the answer was complete; send the request again.")
        case "deadline":
            return DeadlineExceeded(
                "The deadline passed before the answer was complete; allow more time ('timeout')"
                " or ask for fewer tokens."
            )
        case "error":
            return GenerationFailed(finished.detail or "The answer could not be completed.")


async def on_stockpot_error(request: Request, error: Exception) -> Response:
    """Handler of StockpotError."""
    assert isinstance(error, StockpotError)
    return respond(error, dialect_of(request.url.path), request_id=request_id_in(request.scope))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler of what the framework refuses: routes that do not exist, methods a route does not have."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    shown = path if len(path) <= 100 else path[:100] + "..."
    if error.status_code == 404:
        message, code = f"There is nothing at {shown}; the API is under /v1.", "not_found"
    elif error.status_code == 405:
        message, code = f"{shown} does not take {request.method}.", "method_not_allowed"
    else:
        message, code = str(error.detail), "http_error"
    detail = ErrorDetail(message, _type(error.status_code), None, code)
    body = _refusal(detail, error.status_code, path, request_id_in(request.scope))
    return json_response(body, status=error.status_code, headers=error.headers)


def internal_failure(path: str, request_id: str) -> Response:
    """The response to a failure nobody foresaw."""
    body = _refusal(internal_error(request_id).error, 500, path, request_id)
    return json_response(body, status=500)


def _refusal(detail: ErrorDetail, status: int, path: str, request_id: str | None) -> Any:
    if dialect_of(path) == "openai":
        return ErrorBody(detail)
    from stockpot.wire.anthropic_errors import anthropic_body_of_status  # as above

    return anthropic_body_of_status(status, detail, request_id)


def _type(status: int) -> str:
    return _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")

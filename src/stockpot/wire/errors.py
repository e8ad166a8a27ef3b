"""Every error as the OpenAI API spells it: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from stockpot.errors import (
    DeadlineExceeded,
    EngineFailed,
    RequestError,
    ShuttingDown,
    StockpotError,
    Unauthenticated,
)
from stockpot.events import Finished

_DEFAULT_RETRY_AFTER_S = 1.0
_RETRYABLE = frozenset({429, 503})
_TYPES: Mapping[int, str] = {403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}


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


def body_of(error: StockpotError) -> ErrorBody:
    """What the client is told. The words of an error that is neither the request's nor the engine's may
    speak of files and machines: they stay in the log."""
    status = error.status
    if isinstance(error, RequestError):
        return ErrorBody(ErrorDetail(str(error), _type(status), error.param, error.code))
    if isinstance(error, GenerationFailed):
        return ErrorBody(ErrorDetail(str(error), _type(status), None, "generation_failed"))
    if isinstance(error, EngineFailed):
        return ErrorBody(ErrorDetail(str(error), _type(status), None, "engine_failed"))
    return internal_error(None)


def internal_error(request_id: str | None) -> ErrorBody:
    """What the client is told of a failure that is ours."""
    where = f" It is logged under the request id {request_id}." if request_id else ""
    return ErrorBody(
        ErrorDetail(f"The server failed on this request.{where}", "server_error", None, "internal_error")
    )


def respond(error: StockpotError) -> Response:
    """The error as a response; 429 and 503 say when to come back."""
    headers: dict[str, str] = {}
    if error.status in _RETRYABLE:
        wanted = error.retry_after_s if isinstance(error, RequestError) else None
        headers["retry-after"] = str(max(1, math.ceil(wanted or _DEFAULT_RETRY_AFTER_S)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"  # RFC 9110, 11.6.1: a 401 says how to authenticate
    if isinstance(error, DeadlineExceeded):
        # The official clients retry 408; the same deadline would pass again.
        headers["x-should-retry"] = "false"
    return json_response(body_of(error), status=error.status, headers=headers)


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
    del request
    assert isinstance(error, StockpotError)
    return respond(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler of what the framework refuses: routes that do not exist, methods a route does not have."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    path = path if len(path) <= 100 else path[:100] + "..."
    if error.status_code == 404:
        message, code = f"There is nothing at {path}; the API is under /v1.", "not_found"
    elif error.status_code == 405:
        message, code = f"{path} does not take {request.method}.", "method_not_allowed"
    else:
        message, code = str(error.detail), "http_error"
    body = ErrorBody(ErrorDetail(message, _type(error.status_code), None, code))
    return json_response(body, status=error.status_code, headers=error.headers)


def _type(status: int) -> str:
    return _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")

"""What a backend's failure means: statuses, bodies, lost connections, as the one error with its cause."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, cast

import msgspec

from stockpot.errors import FailureCause, UpstreamError

MESSAGE_CHARACTERS_MAX = 1000
"""Of a backend's own words, so many are passed on."""

_RETRY_AFTER_MAX_S = 86_400.0

_CONTEXT = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum context|context length|context window"
    r"|context size|prompt is too long|input is too long",
    re.IGNORECASE,
)

_CAUSE_OF_STATUS: Mapping[int, FailureCause] = {
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    408: "timeout",
    429: "rate_limited",
    503: "overloaded",
    504: "timeout",
    529: "overloaded",
}

_CAUSE_OF_TYPE: Mapping[str, FailureCause] = {
    "authentication_error": "unauthenticated",
    "invalid_api_key": "unauthenticated",
    "permission_error": "forbidden",
    "not_found_error": "not_found",
    "model_not_found": "not_found",
    "rate_limit_error": "rate_limited",
    "rate_limit_exceeded": "rate_limited",
    "insufficient_quota": "rate_limited",
    "overloaded_error": "overloaded",
    "unavailable_error": "overloaded",
    "timeout_error": "timeout",
    "api_error": "server_error",
    "server_error": "server_error",
    "request_too_large": "invalid_request",
    "invalid_request_error": "invalid_request",
    "badrequesterror": "invalid_request",
}
"""Words of OpenAI, Anthropic, vLLM and llama-server, in lower case."""

_PASSED_ON: frozenset[FailureCause] = frozenset({"invalid_request", "context_overflow", "not_found"})
"""Failures that are about the client's request: what the backend says of it helps its sender. In other cases
its words may hold our key or names of its machines, and are not repeated."""


class Failures:
    """Makes the errors of one backend."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def error(
        self,
        cause: FailureCause,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> UpstreamError:
        """An error with a sentence about this backend: `The backend 'x' ` and then `message`."""
        return UpstreamError(
            f"The backend {self._backend!r} {message}",
            cause=cause,
            backend=self._backend,
            upstream_status=status,
            retry_after_s=retry_after_s,
            param=param,
            code=code,
        )

    def of_answer(
        self, status: int, headers: Mapping[str, str], body: bytes, *, now_s: float
    ) -> UpstreamError:
        """An answer whose status is not 200. `now_s` is wall time, for a `Retry-After` that is a date."""
        told = _told(body)
        cause = _cause_of_status(status)
        if (cause == "invalid_request" or status == 500) and told.speaks_of_context:
            cause = "context_overflow"  # 500: as some versions of llama-server say it
        if 300 <= status < 400:
            return self.error(
                "format",
                f"answered {status}, a redirect, which is not followed; set its 'url' to the right place.",
                status=status,
            )
        return self._described(cause, told, status, retry_after_s(headers, now_s))

    def instead_of_stream(self, body: bytes) -> UpstreamError:
        """An answer with the status 200 that is no event stream; it may hold an error all the same."""
        told = _told(body)
        if told.message or told.kind:
            return self.in_stream({"message": told.message, "type": told.kind, "code": told.code})
        return self.error("format", "gave an answer that is no event stream, though it was asked for one.")

    def in_stream(self, error: Any) -> UpstreamError:
        """An error object that came as an event within an answer."""
        told = _told_by(error)
        cause = _CAUSE_OF_TYPE.get(told.kind.lower()) or _CAUSE_OF_TYPE.get(told.code.lower())
        if cause is None:
            cause = (
                _cause_of_status(int(told.code)) if re.fullmatch(r"[45]\d\d", told.code) else "server_error"
            )
        if cause in ("invalid_request", "server_error") and told.speaks_of_context:
            cause = "context_overflow"
        return self._described(cause, told, None, None)

    def of_exchange(self, error: BaseException, *, answering: bool) -> UpstreamError:
        """A connection that failed. `answering`: bytes of the answer's body had come."""
        import aiohttp

        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return self.error(
                "connect", f"cannot be reached ({_kind(error)}); look whether it runs, and at its 'url'."
            )
        if isinstance(error, asyncio.TimeoutError):
            return self.error("timeout", "sent nothing in time; try again, or raise its timeouts.")
        if isinstance(error, aiohttp.ClientResponseError | aiohttp.InvalidURL | ValueError):
            return self.error("format", f"gave an answer that is no HTTP ({_kind(error)}).")
        if answering:
            return self.error("truncated", f"ended its answer in the middle ({_kind(error)}).")
        return self.error("reset", f"lost the connection before it answered ({_kind(error)}); try again.")

    def _described(
        self, cause: FailureCause, told: _Told, status: int | None, after_s: float | None
    ) -> UpstreamError:
        said = f"answered {status}" if status is not None else "sent an error within its answer"
        if cause in _PASSED_ON:
            words = told.message[:MESSAGE_CHARACTERS_MAX] or "no reason was given"
            return self.error(
                cause,
                f"refused the request: {words}",
                status=status,
                param=told.param,
                code=told.code[:100] if told.code and not told.code.isdigit() else None,
            )
        if cause in ("unauthenticated", "forbidden"):
            hint = "it does not accept the gateway's key; its operator must correct 'api_key'."
        elif cause == "rate_limited":
            hint = "the gateway sends more there than it allows; try again later."
        elif cause == "overloaded":
            hint = "it is overloaded; try again later."
        else:
            hint = "it failed; its own log says why."
        return self.error(cause, f"{said}: {hint}", status=status, retry_after_s=after_s)


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """What `retry-after-ms` or `Retry-After` (seconds, or an HTTP date; RFC 9110, 10.2.3) ask for."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text.strip()):
            return min(float(text) * unit_s, _RETRY_AFTER_MAX_S)
        try:
            at_s = parsedate_to_datetime(text).timestamp()
        except (ValueError, OverflowError, OSError):
            continue
        return min(max(0.0, at_s - now_s), _RETRY_AFTER_MAX_S)
    return None


class _Told(msgspec.Struct, frozen=True):
    """What an error body says, as far as it could be read."""

    message: str = ""
    kind: str = ""
    code: str = ""
    param: str | None = None

    @property
    def speaks_of_context(self) -> bool:
        return any(_CONTEXT.search(text) for text in (self.code, self.kind, self.message))


def _told(body: bytes) -> _Told:
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return _Told()
    return _told_by(
        cast(dict[str, Any], content).get("error", content) if isinstance(content, dict) else content
    )


def _told_by(error: Any) -> _Told:
    """From `{"message": ..., "type": ..., "code": ..., "param": ...}`, or a bare sentence."""
    if isinstance(error, str):
        return _Told(message=error)
    if not isinstance(error, dict):
        return _Told()
    fields = cast(dict[str, Any], error)
    message = fields.get("message", fields.get("detail", ""))
    param = fields.get("param")
    return _Told(
        message=message if isinstance(message, str) else msgspec.json.encode(message).decode(),
        kind=_word(fields.get("type")),
        code=_word(fields.get("code")),
        param=param[:200] if isinstance(param, str) else None,
    )


def _word(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else ""


def _cause_of_status(status: int) -> FailureCause:
    return _CAUSE_OF_STATUS.get(status) or ("server_error" if status >= 500 else "invalid_request")


def _kind(error: BaseException) -> str:
    """The kind of a failure, without addresses or secrets."""
    reason = getattr(error, "os_error", None) or error
    return getattr(reason, "strerror", None) or type(reason).__name__

"""The one exception tree, with the HTTP status and the exit code each error has at the edge.

    StockpotError                    500  exit 70
    |-- ConfigurationError                exit 78   settings that cannot be read or do not fit together
    |-- ModelError                        exit 65   a model file that is no usable GGUF
    |   |-- ModelNotFound                 exit 66   no file, no such name in the hub
    |   `-- DownloadFailed                exit 69   the network or the checksum said no
    |-- BindingUnavailable                exit 69   no llama.cpp library that can run this model here
    |-- BuildFailed                       exit 70   compiling the native library did not work
    |-- AddressUnavailable                exit 71   the port is taken, or the host is not ours
    |-- ServerUnreachable                 exit 69   a command that needs a running server found none
    |-- EngineFailed                 503  exit 70   the engine thread stopped; restart the server
    |-- UpstreamError                502            a backend failed; 429, 503, 504 or 4xx by its cause
    cause `-- RequestError                 400            the client can do something about it
        |-- UnsupportedField         400            a field this server cannot honour
        |-- ContextLengthExceeded    400
        |-- Unauthenticated          401            no key, or one that is not known here
        |-- AllowanceExceeded        429            a rate, quota or budget; 402 for money
        |-- GuardRefused             400            a guard of the input or the output said no
        |-- Forbidden                403            not for this caller
        |-- UnknownModel             404
        |-- DeadlineExceeded         408
        |-- BodyTooLarge             413
        |-- BodyTooSlow              408
        |-- QueueFull                429            with Retry-After
        |-- NotCached                504            only a kept answer was wanted, and there is none
        `-- ShuttingDown             503            with Retry-After

Every message is one sentence or two: what happened, with which value, and what to do next.
`wire.errors` maps the statuses to the shapes of the providers; `cli.main` maps the exit codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

FailureCause = Literal[
    "invalid_request",
    "context_overflow",
    "not_found",
    "unauthenticated",
    "forbidden",
    "allowance",
    "rate_limited",
    "overloaded",
    "server_error",
    "connect",
    "reset",
    "timeout",
    "deadline",
    "format",
    "truncated",
    "guard",
    "validation",
    "cancelled",
]
"""Why a request or an attempt failed, one word for metrics, ledger and fallback rules. rate_limited: 429 of a
backend. overloaded: 503 or 529, a full queue, or shed here. server_error: other 5xx, an engine that failed.
connect: no connection. reset: a connection lost before the answer began. truncated: lost within the answer.
timeout: no byte in time. deadline: the client's own limit. format: bytes that are no answer (broken JSON or
SSE). unauthenticated, forbidden: the caller's, or ours at a backend. validation: a cascade's check of an
answer."""


class StockpotError(Exception):
    """Root of everything Stockpot raises on purpose."""

    status: int = 500
    exit_code: int = 70


class ConfigurationError(StockpotError):
    """Settings that cannot be read, or values that do not fit together."""

    exit_code = 78


class ModelError(StockpotError):
    """A model file that exists and cannot be used: not GGUF, truncated, unknown architecture."""

    exit_code = 65


class ModelNotFound(ModelError):
    """No model file at the given path or name."""

    exit_code = 66


class DownloadFailed(ModelError):
    """A download that did not complete or whose checksum differs."""

    exit_code = 69


class BindingUnavailable(StockpotError):
    """No llama.cpp library on this machine can run the model."""

    exit_code = 69


class BuildFailed(StockpotError):
    """Compiling the native library failed; the message names the log."""

    exit_code = 70


class AddressUnavailable(StockpotError):
    """The address to listen on is taken or not ours."""

    exit_code = 71


class ServerUnreachable(StockpotError):
    """A command needs a running server and found none at the given address."""

    exit_code = 69


class EngineFailed(StockpotError):
    """The engine thread has stopped after a failure of the driver."""

    status = 503
    exit_code = 70


_UPSTREAM_STATUS: Mapping[FailureCause, int] = {
    "invalid_request": 400,
    "context_overflow": 400,
    "not_found": 404,
    "rate_limited": 429,
    "overloaded": 503,
    "connect": 503,
    "timeout": 504,
}


class UpstreamError(StockpotError):
    """A backend that is not ours failed on the request or refused it.

    `cause` decides the status at the edge (502 where none fits), what is tried next, and how it is counted.
    `upstream_status` is the HTTP status of the backend, None where it gave none; `retry_after_s` what it
    asked for. `param` and `code` are the backend's own words about the client's request. The message may be
    shown to clients: it holds no secret of the gateway.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: FailureCause,
        backend: str,
        upstream_status: int | None = None,
        retry_after_s: float | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.cause: FailureCause = cause
        self.backend = backend
        self.upstream_status = upstream_status
        self.retry_after_s = retry_after_s
        self.param = param
        self.code = code or f"upstream_{cause}"
        self.status = _UPSTREAM_STATUS.get(cause, 502)


class RequestError(StockpotError):
    """A request that cannot be served as it is.

    `param` is the path of the field at fault (`messages[2].content`), `code` a stable word for programs,
    `retry_after_s` how long a client should wait before it tries again, where that may help.
    """

    status = 400
    code: str = "invalid_request"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s


class UnsupportedField(RequestError):
    """A field of the wire format that this server cannot honour (rule: never accepted and ignored)."""

    code = "unsupported_field"


class ContextLengthExceeded(RequestError):
    """The prompt does not fit the context; the message carries both numbers."""

    code = "context_length_exceeded"


class Unauthenticated(RequestError):
    """The request carries no key, or one that is not known here."""

    status = 401
    code = "invalid_api_key"


class AllowanceExceeded(RequestError):
    """A limit of the key or its team; the message names the limit, its value and when to try again."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float | None, money: bool = False) -> None:
        code = "budget_exceeded" if money else self.code
        super().__init__(message, code=code, retry_after_s=retry_after_s)
        if money:
            self.status = 402


class GuardRefused(RequestError):
    """A guard refused the input or the output; the message names the rule, never the text."""

    code = "guard_refused"


class Forbidden(RequestError):
    """The caller may not do this from where it calls."""

    status = 403
    code = "forbidden"


class UnknownModel(RequestError):
    """The model named in the request is not served here."""

    status = 404
    code = "model_not_found"


class DeadlineExceeded(RequestError):
    """The request's deadline passed before its answer was complete."""

    status = 408
    code = "deadline_exceeded"


class BodyTooLarge(RequestError):
    """The request body is larger than the server reads."""

    status = 413
    code = "body_too_large"


class BodyTooSlow(RequestError):
    """The request body did not arrive in time."""

    status = 408
    code = "body_too_slow"


class NotCached(RequestError):
    """`Cache-Control: only-if-cached`, and no answer is kept (RFC 9111, 5.2.1.7)."""

    status = 504
    code = "not_cached"


class QueueFull(RequestError):
    """The waiting queue is at its bound."""

    status = 429
    code = "queue_full"


class ShuttingDown(RequestError):
    """The server finishes what it has and takes nothing new."""

    status = 503
    code = "shutting_down"


def cause_of(error: BaseException) -> FailureCause:
    """The word that metrics, ledger and routing use for an error."""
    if isinstance(error, UpstreamError):
        return error.cause
    for kind, cause in _CAUSES:
        if isinstance(error, kind):
            return cause
    if isinstance(error, RequestError):  # the kinds that rooms define for themselves
        return _CAUSES_BY_STATUS.get(error.status, "invalid_request")
    return "server_error"


_CAUSES: tuple[tuple[type[BaseException], FailureCause], ...] = (
    (ContextLengthExceeded, "context_overflow"),
    (Unauthenticated, "unauthenticated"),
    (Forbidden, "forbidden"),
    (AllowanceExceeded, "allowance"),
    (GuardRefused, "guard"),
    (UnknownModel, "not_found"),
    (NotCached, "not_found"),
    (DeadlineExceeded, "deadline"),
    (QueueFull, "overloaded"),
    (ShuttingDown, "overloaded"),
    (EngineFailed, "server_error"),
)

_CAUSES_BY_STATUS: Mapping[int, FailureCause] = {
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    429: "overloaded",
    503: "overloaded",
}

"""The outermost layer of every request: its id, its count in the metrics, a last resort for the unforeseen.

Plain ASGI: it costs one call for each chunk of a stream.
"""

from __future__ import annotations

import logging
import os

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stockpot.clock import Clock
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.errors import internal_failure

_LOG = logging.getLogger(__name__)
_REQUEST_ID = b"x-request-id"
_ANTHROPIC_REQUEST_ID = b"request-id"  # what Anthropic's clients read
_REQUEST_ID_LENGTH_MAX = 128
_CLIENT_GONE = 499  # nginx's number for an answer nobody waited for; only ever seen in metrics and logs


def request_id_of(request: Request) -> str:
    """The id that the answer carries as X-Request-Id: the client's own, or a new one. Not always unique."""
    return request.state.request_id


class Edge:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, clock: Clock) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = _CLIENT_GONE
        started = False
        started_s = self._clock.monotonic()

        async def send_marked(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [
                    *message["headers"],
                    (_REQUEST_ID, request_id.encode()),
                    (_ANTHROPIC_REQUEST_ID, request_id.encode()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception:  # the one place that may catch everything: the alternative is a bare 500
            _LOG.exception(
                "request %s failed: %s %s",
                request_id,
                scope["method"],
                scope["path"],
                extra={"request_id": request_id},
            )
            if started:
                raise  # the server closes the connection: the client sees that the answer is not whole
            await internal_failure(scope["path"], request_id)(scope, receive, send_marked)
        finally:
            elapsed_s = self._clock.monotonic() - started_s
            self._metrics.observe_http(_route(scope), scope["method"], status, elapsed_s)
            _LOG.debug(
                "%s %s %s %d %.1f ms", request_id, scope["method"], scope["path"], status, elapsed_s * 1e3
            )


def new_id() -> str:
    """128 random bits in hexadecimal; a fifth of what `uuid` takes."""
    return os.urandom(16).hex()


def _request_id(scope: Scope) -> str:
    """The client's own id where it is short printable ASCII (it goes into logs), else a new one."""
    for name, value in scope["headers"]:
        if name == _REQUEST_ID:
            if 0 < len(value) <= _REQUEST_ID_LENGTH_MAX and all(33 <= byte <= 126 for byte in value):
                return value.decode("ascii")
            break
    return new_id()


def _route(scope: Scope) -> str:
    """The route's template: paths themselves would be labels without bound. Plain routes leave no template
    behind; where one without parameters matched, it is the path."""
    if "route" not in scope and "endpoint" in scope and not scope.get("path_params"):
        return scope["path"]
    return getattr(scope.get("route"), "path", "unmatched")

"""The HTTP server: uvicorn, with a drain between the first signal and the end.

listen      the address is ours before anything costly starts
serve       until SIGTERM or SIGINT
drain       new requests get 503 with Retry-After, running ones finish, `drain_s` at most
stop        what still runs is ended; a second signal comes here at once
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from stockpot.errors import AddressUnavailable
from stockpot.wire.connection import connections

_LOG = logging.getLogger(__name__)
_BACKLOG = 1024
_KEEP_ALIVE_S = 60  # clients keep pools of connections; uvicorn's 5 s would race with their next request
HEADERS_TIMEOUT_S = 60  # longer than any client needs, short enough that idle sockets do not pile up
_UNREAD_S = 120
"""For so long a client may leave unread what it is sent; then its connection is lost. A stream that nobody
reads holds a place at its backend."""
_LAST_BYTES_S = 5  # for answers that are complete and still on their way out


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; port 0 takes any free one. Raises AddressUnavailable.

    It listens before the model is loaded: of two servers that start together one learns at once that it is
    late, and clients that come early wait instead of being turned away.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise AddressUnavailable(
            f"The host {host!r} has no address here ({error}); give one of this machine with --host."
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if (option := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, _UNREAD_S * 1000)  # its connections inherit it
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise AddressUnavailable(
            f"Cannot listen on {host} port {port}: {error.strerror}."
            " Choose another port with --port (0: any free one) or stop what uses it."
        ) from error
    return listener


class Drained(Protocol):
    """What stands behind the application."""

    async def stop(self, *, drain: bool) -> None:
        """Refuse what is new; let what runs finish (`drain`) or end it."""
        ...


class Server(uvicorn.Server):
    """Serves `app` until told to stop, then drains `backend`.

    The backend must allow `stop(drain=False)` while `stop(drain=True)` waits.
    """

    def __init__(
        self,
        app: ASGIApp,
        backend: Drained,
        *,
        drain_s: float,
        headers_timeout_s: float = HEADERS_TIMEOUT_S,
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connections(headers_timeout_s=headers_timeout_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=list(trusted_proxies),
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self._backend = backend
        self._drain_s = drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        if self._stopping is not None:
            await asyncio.wait({self._stopping})
            if not self._stopping.cancelled():
                self._stopping.result()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Runs as a signal handler: only hands over to the loop. The signal is not recorded as uvicorn does
        # it, which would raise it again after a clean end.
        del sig, frame
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.request_stop)

    def request_stop(self) -> None:
        """The first call drains, the second stops now. On the event loop."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._drain())
        elif not self._stopping.done():
            _LOG.warning("second signal: stopping now")
            self._stopping.cancel()

    async def _drain(self) -> None:
        _LOG.info("stopping: running requests have %g s to finish", self._drain_s)
        try:
            async with asyncio.timeout(self._drain_s):
                await self._backend.stop(drain=True)
        except TimeoutError:
            _LOG.warning("not all requests finished within %g s: ending them", self._drain_s)
            await self._backend.stop(drain=False)
        except asyncio.CancelledError:
            await self._backend.stop(drain=False)
            self.force_exit = True
        finally:
            self.should_exit = True

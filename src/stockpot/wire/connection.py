"""A connection whose request must be announced in time: headers that trickle in hold no socket for ever."""

from __future__ import annotations

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def connections(*, headers_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, whose connections are closed when the headers of a request are not complete within
    `headers_timeout_s`, for the first from the opening. Between requests its keep-alive time counts."""

    class Connection(HttpToolsProtocol):
        _headers_timer: TimerHandle | None = None

        def connection_made(self, transport: Transport) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def on_message_begin(self) -> None:
            self._expect_headers()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._headers_came()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_came()
            super().connection_lost(exc)

        def _expect_headers(self) -> None:
            self._headers_came()
            self._headers_timer = self.loop.call_later(headers_timeout_s, self.transport.close)

        def _headers_came(self) -> None:
            if self._headers_timer is not None:
                self._headers_timer.cancel()
                self._headers_timer = None

    return Connection

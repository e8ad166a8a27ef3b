"""A connection whose request must be announced in time: headers that trickle in hold no socket for ever.

Nor do headers that do not end fill the memory: they are refused (431, RFC 6585).
"""

from __future__ import annotations

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_MAX = 256
HEAD_BYTES_MAX = 64 * 2**10
"""Of a request's first line and headers; keys and a browser's cookies need a few thousand."""

_REFUSAL = b"The request has more headers than this server reads; send fewer."
_REFUSED = b"\r\n".join(
    (
        b"HTTP/1.1 431 Request Header Fields Too Large",
        b"content-type: text/plain; charset=utf-8",
        b"content-length: %d" % len(_REFUSAL),
        b"connection: close",
        b"",
        _REFUSAL,
    )
)


class _TooManyHeaders(Exception):
    """Ends the parsing of a request's head."""


def connections(*, headers_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, whose connections are closed when the headers of a request are not complete within
    `headers_timeout_s`, for the first from the opening, or are too many. Between requests its keep-alive time
    counts."""

    class Connection(HttpToolsProtocol):
        # There while a head is awaited.
        _headers_timer: TimerHandle | None = None
        _head_bytes = 0
        _too_many = False

        def connection_made(self, transport: Transport) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            # The parser keeps a header until it is complete, so bytes are counted as they come. Where a head
            # begins within `data` (behind another request's body), it counts from the next piece on.
            if self._headers_timer is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._headers_timer is not None and self._head_bytes > HEAD_BYTES_MAX:
                self._refuse()

        def send_400_response(self, msg: str) -> None:
            if self._too_many:
                self._refuse()
            else:
                super().send_400_response(msg)

        def on_message_begin(self) -> None:
            self._expect_headers()
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._headers_timer is None:
                return  # behind a body; nothing here reads those
            if len(self.headers) >= HEADERS_MAX:
                self._too_many = True
                raise _TooManyHeaders
            super().on_header(name, value)

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
            self._head_bytes = 0
            if self._headers_timer is not None:
                self._headers_timer.cancel()
                self._headers_timer = None

        def _refuse(self) -> None:
            self._headers_came()
            if not self.transport.is_closing():
                self.transport.write(_REFUSED)
                self.transport.close()

    return Connection

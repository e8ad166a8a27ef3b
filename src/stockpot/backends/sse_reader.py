"""Server-sent events as they are read from a backend: bytes in pieces of any size, payloads out."""

from __future__ import annotations

import re

EVENT_BYTES_MAX = 16 * 2**20
"""A longer event is no piece of an answer."""

_FIELD = re.compile(rb"[A-Za-z][A-Za-z0-9_-]*(:|$)")


class BrokenStream(Exception):
    """The bytes are no event stream; the message says how."""


class SseReader:
    """Splits a stream into the payloads (`data`) of its events (WHATWG HTML, 9.2.6).

    Lines end with LF, CR or CRLF, also across pieces. Comments, names and ids are skipped: all APIs read here
    say in the payload what it is. `error: {...}`, as older llama-server sends it, is a payload too. Fields of
    other names are skipped, as the standard asks; a line that is no field at all raises BrokenStream, so that
    a page of HTML is not taken for a silent stream. What is kept between pieces is at most `event_bytes_max`.

    Payloads before the place where a stream breaks are given out first: `broken` is raised by the next call.
    """

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._max = event_bytes_max
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self._held_bytes = 0
        self._after_cr = False
        self.broken: BrokenStream | None = None

    def feed(self, piece: bytes) -> list[bytes]:
        """The payloads that are complete now, in order. Raises BrokenStream where there are none."""
        events: list[bytes] = []
        try:
            self._feed(piece, events)
        except BrokenStream as error:
            if not events:
                raise
            self.broken = error
        return events

    def _feed(self, piece: bytes, events: list[bytes]) -> None:
        if self.broken is not None:
            raise self.broken
        piece = self._with_lf(piece)
        if b"\n" not in piece:
            self._hold(piece, self._rest)
            return
        if self._rest:
            piece = b"".join((*self._rest, piece))
            self._held_bytes -= sum(map(len, self._rest))
            self._rest.clear()
        lines = piece.split(b"\n")
        last = lines.pop()
        for line in lines:
            if line:
                self._line(line)
            elif self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._held_bytes -= sum(map(len, self._data))
                self._data.clear()
        if last:
            self._hold(last, self._rest)

    def _with_lf(self, piece: bytes) -> bytes:
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        if b"\r" in piece:
            self._after_cr = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return piece

    def _line(self, line: bytes) -> None:
        if line.startswith((b"data:", b"error:")):
            value = line[line.index(b":") + 1 :]
            self._hold(value.removeprefix(b" "), self._data)
        elif not line.startswith((b"event:", b":")) and not _FIELD.match(line):
            shown = line[:80].decode(errors="replace")
            raise BrokenStream(f"a line of the event stream is no field: {shown!r}")

    def _hold(self, piece: bytes, place: list[bytes]) -> None:
        self._held_bytes += len(piece)
        if self._held_bytes > self._max:
            raise BrokenStream(f"an event is longer than {self._max} bytes")
        place.append(piece)

"""Server-sent events (WHATWG HTML, 9.2), as the OpenAI API uses them: `data: {json}` and a last `[DONE]`."""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"

HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx holds streams back unless told not to.
    (b"x-accel-buffering", b"no"),
)


class Framer:
    """Encodes events. JSON escapes line breaks, so one event is always one line."""

    __slots__ = ("_encoder",)

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()

    def event(self, content: Any) -> bytes:
        """One event; `content` is anything msgspec encodes."""
        return b"data: " + self._encoder.encode(content) + b"\n\n"

    def named(self, name: bytes, content: Any) -> bytes:
        """One event that has a name; `name` holds no line break."""
        return b"event: " + name + b"\ndata: " + self._encoder.encode(content) + b"\n\n"


def comment(text: str) -> bytes:
    """What clients pass over and people see; `text` is one line."""
    return f": {text}\n\n".encode()

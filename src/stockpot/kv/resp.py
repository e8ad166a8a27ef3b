"""The Redis protocol over one socket, with large values received where they are wanted.

RESP2 (redis.io, "Redis serialization protocol specification"), the client's side of the few commands the
Redis tier needs. A general client copies a value of megabytes three times on its way through a parser; here
the kernel writes it into the caller's buffer. Measured on loopback, 8 blocks of 3.1 MB in values of 1 MiB,
received and hashed, median of seven processes: 15 ms, against 21 ms through redis-py with hiredis. And the
bound on a whole call, which a socket timeout is not, stands in one place.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stockpot.clock import Clock

FailureCause = Literal["timeout", "down", "error"]
Argument = bytes | int | Sequence[memoryview]
"""Of a command; one that is a list of buffers is sent as their concatenation, without making it."""
Command = Sequence[Argument]

LEAST_BYTES_PER_S = 16 * 2**20
"""Slower than this a server is not worth waiting for: no call may take longer than its bytes at this rate."""

_BUFFER_BYTES = 16 * 1024
_SEND_BYTES = 256 * 1024
_LARGEST_REPLY_BYTES = 2**20
"""Of replies that are not received into the caller's buffer; they are directory entries and counts."""
_MOST_ITEMS = 65_536
_MOST_DEPTH = 3


class RedisFailure(Exception):
    """A call to Redis that did not work; the connection it used is of no further use.

    `advice` says what an operator can do about it, where that is known.
    """

    def __init__(self, cause: FailureCause, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.cause: FailureCause = cause
        self.advice = advice


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error the server answered with: its first word (`NOAUTH`, `OOM`, ...), and all of it."""

    code: str
    message: str


Reply = bytes | int | str | ErrorReply | None | list["Reply"]
"""str is a status (`OK`), bytes a value, None an absent value."""


class RespConnection:
    """One connection, used by one thread at a time. Every method but `close` raises RedisFailure.

    Two bounds hold for every call: each wait for the server lasts at most `timeout_s`, and all until the
    reply is complete at most what `allow` granted.
    """

    def __init__(self, connected: socket.socket, *, clock: Clock, timeout_s: float) -> None:
        connected.settimeout(timeout_s)
        self._socket = connected
        self._clock = clock
        self._timeout_s = timeout_s
        self._deadline_s = clock.monotonic() + timeout_s
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._at = 0
        self._end = 0
        self.pending = 0
        """Replies that are still to come; a connection with any is not for the next caller."""

    def allow(self, size_bytes: int = 0) -> None:
        """Start the time in which the next `size_bytes` must have passed."""
        self._deadline_s = self._clock.monotonic() + self._timeout_s + size_bytes / LEAST_BYTES_PER_S

    def exchange(self, commands: Sequence[Command], size_bytes: int = 0) -> list[Reply]:
        """All replies of a pipeline of commands that carry `size_bytes` in all."""
        if not commands:
            return []
        self.allow(size_bytes)
        self.send(commands)
        return [self.receive() for _ in commands]

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands; as many replies are then pending."""
        small = bytearray()
        for command in commands:
            self.pending += 1  # first: who is interrupted in the middle leaves a connection nobody takes
            small += b"*%d\r\n" % len(command)
            for argument in command:
                if isinstance(argument, bytes | int):
                    text = argument if isinstance(argument, bytes) else b"%d" % argument
                    small += b"$%d\r\n%b\r\n" % (len(text), text)
                    continue
                small += b"$%d\r\n" % sum(map(len, argument))
                for piece in argument:
                    self._send(memoryview(small))
                    self._send(piece)
                    small = bytearray()
                small += b"\r\n"
        self._send(memoryview(small))

    def receive(self) -> Reply:
        """The next reply."""
        reply = self._reply(_MOST_DEPTH)
        self.pending -= 1
        return reply

    def receive_into(self, target: memoryview) -> int | ErrorReply | None:
        """The next reply, a value, into `target`: its length, whatever that is, or None when it is absent.

        `target` is filled when the length is its own; a value of another length is skipped.
        """
        kind, rest = self._head()
        if kind == b"-":
            self.pending -= 1
            return _error_reply(rest)
        if kind != b"$":
            raise _not_redis(kind + rest)
        length = _number(rest)
        if length >= 0:
            if length == len(target):
                self._read_into(target)
            else:
                self._skip(length)
            self._skip(2)
        self.pending -= 1
        return None if length < 0 else length

    def is_alive(self) -> bool:
        """Whether an idle connection can be used: nothing was said and it was not closed at the other end."""
        if self.pending or self._at != self._end:
            return False
        poller = select.poll()
        try:
            poller.register(self._socket, select.POLLIN)
        except ValueError:
            return False  # closed here
        return not poller.poll(0)

    def close(self) -> None:
        """Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _reply(self, depth: int) -> Reply:
        kind, rest = self._head()
        if kind == b"$":
            return self._value(_number(rest))
        if kind == b":":
            return _number(rest)
        if kind == b"+":
            return rest.decode("utf-8", "replace")
        if kind == b"-":
            return _error_reply(rest)
        if kind == b"*" and depth > 0:
            count = _number(rest)
            if count <= _MOST_ITEMS:
                return None if count < 0 else [self._reply(depth - 1) for _ in range(count)]
        raise _not_redis(kind + rest)

    def _value(self, length: int) -> bytes | None:
        if length < 0:
            return None
        if length > _LARGEST_REPLY_BYTES:
            raise RedisFailure("error", f"Redis sent a value of {length} bytes where a few were expected")
        if self._end - self._at >= length + 2:
            value = bytes(self._view[self._at : self._at + length])
            self._at += length + 2
            return value
        target = bytearray(length)
        self._read_into(memoryview(target))
        self._skip(2)
        return bytes(target)

    def _head(self) -> tuple[bytes, bytes]:
        """The type and the rest of the next line."""
        while (end := self._buffer.find(b"\r\n", self._at, self._end)) < 0:
            if self._end - self._at == _BUFFER_BYTES:
                raise _not_redis(bytes(self._view[self._at : self._at + 40]))
            if self._at:
                self._view[: self._end - self._at] = bytes(self._view[self._at : self._end])
                self._at, self._end = 0, self._end - self._at
            self._end += self._recv(self._view[self._end :])
        line = bytes(self._view[self._at : end])
        self._at = end + 2
        return line[:1], line[1:]

    def _read_into(self, target: memoryview) -> None:
        done = min(len(target), self._end - self._at)
        target[:done] = self._view[self._at : self._at + done]
        self._at += done
        while done < len(target):
            done += self._recv(target[done:])

    def _skip(self, count: int) -> None:
        while count > self._end - self._at:
            count -= self._end - self._at
            self._at, self._end = 0, self._recv(self._view)
        self._at += count

    def _recv(self, target: memoryview) -> int:
        self._check_time("answer")
        try:
            got = self._socket.recv_into(target)
        except OSError as error:
            raise self._failure(error, "answer") from error
        if got == 0:
            raise RedisFailure("error", "Redis closed the connection")
        return got

    def _send(self, data: memoryview) -> None:
        while data:
            self._check_time("take a command")
            try:
                sent = self._socket.send(data[:_SEND_BYTES])
            except OSError as error:
                raise self._failure(error, "take a command") from error
            data = data[sent:]

    def _check_time(self, what: str) -> None:
        if self._clock.monotonic() > self._deadline_s:
            raise RedisFailure("timeout", f"Redis was too slow to {what}")

    def _failure(self, error: OSError, what: str) -> RedisFailure:
        if isinstance(error, TimeoutError):
            return RedisFailure("timeout", f"Redis did not {what} within {self._timeout_s * 1e3:.0f} ms")
        return RedisFailure("error", f"the connection to Redis failed: {error}")


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise _not_redis(text) from None


def _error_reply(text: bytes) -> ErrorReply:
    message = text.decode("utf-8", "replace")
    return ErrorReply(message.partition(" ")[0], message)


def _not_redis(line: bytes) -> RedisFailure:
    return RedisFailure(
        "error",
        f"what answers does not speak Redis: {line[:40]!r}",
        "Check the host and the port of kv.redis.url.",
    )

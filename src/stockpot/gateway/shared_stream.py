"""An async generator run by a task of its own, and read by any number of readers, each at its own pace.

The source is at most `_AHEAD` items ahead of the fastest reader, so that a client that reads slowly slows its
backend down as if it read alone. What came is kept for those who join later and those who are slower, up to
`_KEPT` items: from then on nobody can join, and the slowest sets the pace.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Generic, TypeVar

import anyio

from stockpot.errors import ShuttingDown

T = TypeVar("T")

_AHEAD = 64
_KEPT = 16_384
_CLOSES_IN_S = 5.0


class SharedStream(Generic[T]):
    """On the event loop only. Runs from its making until the source ends, or the last reader has left."""

    def __init__(self, source: AsyncGenerator[T], *, replays: bool = True) -> None:
        self._replays = replays
        self._items: deque[T] = deque()
        self._dropped = 0
        self._readers: list[Reader[T]] = []
        self._room = asyncio.Event()
        # Set together, by `_ended`: a task is done a little before its error is known here.
        self._over = False
        self._error: BaseException | None = None
        self._task = asyncio.create_task(self._pump(source))
        self._task.add_done_callback(self._ended)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self._over

    @property
    def can_be_joined(self) -> bool:
        """Whether a new reader would get all from the beginning."""
        return not self._dropped and not self._over

    def reader(self) -> Reader[T]:
        """From the beginning on (`can_be_joined`). `leave` or `left` must follow."""
        reader = Reader(self)
        self._readers.append(reader)
        return reader

    def left(self, reader: Reader[T]) -> None:
        """For `Reader` alone. With the last one the source is told to end."""
        if reader not in self._readers:
            return
        self._readers.remove(reader)
        if self._readers:
            self.advanced()
        else:
            self._task.cancel()

    async def ended(self) -> None:
        """For `Reader` alone. Where nobody reads any more: until the source is closed."""
        if self._readers or self._task.done():
            return
        # anyio cancels again at each await; what the source counts when it is closed would come too late.
        with anyio.CancelScope(shield=True):
            await asyncio.wait((self._task,), timeout=_CLOSES_IN_S)

    async def item(self, reader: Reader[T]) -> T:
        """For `Reader` alone."""
        while True:
            index = reader.position - self._dropped
            if index < len(self._items):
                reader.position += 1
                item = self._items[index]
                self.advanced()
                return item
            if self._over:
                if self._error is not None:
                    # Raised for each reader: the tracebacks of the others are no part of it.
                    raise self._error.with_traceback(None)
                raise StopAsyncIteration
            reader.wake = asyncio.get_running_loop().create_future()
            await reader.wake

    def advanced(self) -> None:
        """A reader went on, or left: drop what nobody will read, and let the source go on."""
        if not self._replays or self._dropped or len(self._items) >= _KEPT:
            slowest = min(reader.position for reader in self._readers)
            while self._dropped < slowest:
                self._items.popleft()
                self._dropped += 1
        if not self._is_full():
            self._room.set()

    def _is_full(self) -> bool:
        fastest = max((reader.position for reader in self._readers), default=0)
        return self._dropped + len(self._items) - fastest >= _AHEAD or len(self._items) >= _KEPT

    async def _pump(self, source: AsyncGenerator[T]) -> None:
        async with aclosing(source):
            async for item in source:
                self._items.append(item)
                self._wake()
                while self._is_full():
                    self._room.clear()
                    await self._room.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._over = True
        if task.cancelled():
            self._error = ShuttingDown("The server is shutting down; try another.", retry_after_s=5.0)
        else:
            self._error = task.exception()
        self._wake()

    def _wake(self) -> None:
        for reader in self._readers:
            if reader.wake is not None and not reader.wake.done():
                reader.wake.set_result(None)


class Reader(Generic[T]):
    """One who reads a shared stream. `wake` is what it waits on, while it waits."""

    __slots__ = ("_stream", "position", "wake")

    def __init__(self, stream: SharedStream[T]) -> None:
        self._stream = stream
        self.position = 0
        self.wake: asyncio.Future[None] | None = None

    def __aiter__(self) -> Reader[T]:
        return self

    async def __anext__(self) -> T:
        return await self._stream.item(self)

    def leave(self) -> None:
        """Must be called at the end, and where the reader goes before it; twice does no harm."""
        self._stream.left(self)

    async def left(self) -> None:
        """`leave`, and wait until the source is closed, if this was the last; for a bounded time."""
        self.leave()
        await self._stream.ended()

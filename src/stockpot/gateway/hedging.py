"""Hedging: a second attempt beside a first that is slow to begin; the first to give a token answers.

Dean and Barroso 2013, "The tail at scale". The loser is closed at once, and counted for what it used.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from stockpot.errors import StockpotError
from stockpot.gateway.attempts import AttemptStream, Item
from stockpot.gateway.shared_stream import Reader, SharedStream


class _Lane:
    """An attempt that runs in a task of its own, so that waiting for it can be given up without ending it."""

    def __init__(self, attempt: AttemptStream) -> None:
        self.attempt = attempt
        self.reader: Reader[Item] = SharedStream(attempt.events(), replays=False).reader()
        self.coming: asyncio.Task[Item] | None = None

    def come(self) -> asyncio.Task[Item]:
        """The next event of this lane, asked for once."""
        if self.coming is None:
            self.coming = asyncio.create_task(_next(self.reader))
        return self.coming

    def leave(self) -> None:
        """Begin to end the attempt; nothing of it is waited for."""
        if self.coming is not None:
            self.coming.cancel()
        self.reader.leave()

    async def left(self) -> None:
        self.leave()
        await self.reader.left()
        # A task that was cancelled before its first step has run nothing, and so closed nothing.
        self.attempt.discard()


async def _next(reader: Reader[Item]) -> Item:
    return await anext(reader)


class Hedged:
    """Runs like an attempt: `events`, `begun`, and the `name` of the backend that answers or failed last."""

    def __init__(
        self, first: AttemptStream, second: Callable[[], Awaitable[AttemptStream | None]], after_s: float
    ) -> None:
        self.name = first.name
        self.begun = False
        self._first = first
        self._second = second
        self._after_s = after_s

    async def events(self) -> AsyncGenerator[Item]:
        """What precedes the answer is that of the first attempt, while it lives. Raises the error of the
        attempt that failed last."""
        lanes = [_Lane(self._first)]
        try:
            winner: _Lane | None = None
            asked = False
            loop = asyncio.get_running_loop()
            hedge_at_s = loop.time() + self._after_s
            while winner is None:
                patience_s = None if asked else max(0.0, hedge_at_s - loop.time())
                done, _ = await asyncio.wait(
                    [lane.come() for lane in lanes],
                    timeout=patience_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    asked = True
                    if (second := await self._second()) is not None:
                        lanes.append(_Lane(second))
                    continue
                for lane in [lane for lane in lanes if lane.coming in done]:
                    item = await self._arrived(lane, lanes)
                    if item is None:
                        continue
                    if lane.attempt.begun:
                        winner = lane
                        self.begun, self.name = True, lane.attempt.name
                        losers = [other for other in lanes if other is not winner]
                        lanes[:] = [winner]
                        await _all_left(losers)
                        yield item
                        break
                    if lane is lanes[0]:
                        yield item
            async for item in winner.reader:
                yield item
        finally:
            await _all_left(lanes)

    async def _arrived(self, lane: _Lane, lanes: list[_Lane]) -> Item | None:
        """The event that came; None where the attempt failed and another goes on."""
        coming = lane.come()
        lane.coming = None
        try:
            return coming.result()
        except StockpotError:
            self.name = lane.attempt.name
            if len(lanes) == 1:
                raise
            lanes.remove(lane)
            await lane.left()
            return None


async def _all_left(lanes: Sequence[_Lane]) -> None:
    # All are told before any is waited for: the waiting may be cancelled.
    for lane in lanes:
        lane.leave()
    for lane in lanes:
        await lane.left()

"""The line of requests that wait until a backend has room: bounded, by priority, shedding the lowest first.

A waiter is woken and takes what is free by itself; nothing is handed to it, so a waiter that is cancelled in
the instant it is called loses nothing: on leaving it calls the next.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping

from stockpot.clock import Clock
from stockpot.errors import QueueFull, ShuttingDown, StockpotError
from stockpot.requests import Priority

PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
_TELLS_EVERY_S = 0.25
_RETRY_MIN_S, _RETRY_MAX_S = 1.0, 60.0


class Waiter:
    """One request in the line. `position` requests of its model stand before it."""

    def __init__(self, line: WaitingLine, model: str, priority: Priority) -> None:
        self.position = 0
        self.model = model
        self.priority: Priority = priority
        self._line = line
        self._called = asyncio.Event()
        self._refusal: StockpotError | None = None

    async def turn(self, timeout_s: float) -> None:
        """Until there may be room, the position has changed, or `timeout_s` is over: look again. Raises the
        error with which the request was put out of the line."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._called.wait()
        except TimeoutError:
            pass
        self._called.clear()
        if self._refusal is not None:
            raise self._refusal

    def call(self) -> None:
        self._called.set()

    def put_out(self, refusal: StockpotError) -> None:
        """For `WaitingLine` alone, which has taken it out."""
        self._refusal = refusal
        self._called.set()

    def leave(self) -> None:
        """Called exactly once, whatever happened; also where it was put out."""
        if self._refusal is None:
            self._line.left(self)


class WaitingLine:
    """All waiters, by model. On the event loop only."""

    def __init__(self, clock: Clock, limit: int) -> None:
        self.limit = limit
        self._clock = clock
        self._models: dict[str, dict[Priority, deque[Waiter]]] = {}
        self._size = 0
        self._ticker: asyncio.TimerHandle | None = None
        self._left_s = clock.monotonic()
        self._between_s = 0.1

    def __len__(self) -> int:
        return self._size

    def lengths(self) -> Mapping[Priority, int]:
        """How many wait, by priority."""
        return {
            priority: sum(len(lanes[priority]) for lanes in self._models.values()) for priority in PRIORITIES
        }

    def is_before(self, model: str, priority: Priority) -> bool:
        """Whether somebody waits for `model` whom a new request of `priority` must not overtake."""
        lanes = self._models.get(model)
        return lanes is not None and any(lanes[rank] for rank in PRIORITIES[: _rank(priority) + 1])

    def enter(self, model: str, priority: Priority) -> Waiter:
        """At the end of its priority. Raises QueueFull; `leave` must follow otherwise."""
        if priority == "low" and self._size >= (self.limit + 1) // 2:
            raise self._full(priority)
        if self._size >= self.limit and not self._shed_below(priority):
            raise self._full(priority)
        waiter = Waiter(self, model, priority)
        lanes = self._models.setdefault(model, {rank: deque() for rank in PRIORITIES})
        waiter.position = sum(len(lanes[rank]) for rank in PRIORITIES[: _rank(priority) + 1])
        lanes[priority].append(waiter)
        self._size += 1
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().call_later(_TELLS_EVERY_S, self._tell)
        return waiter

    def is_first(self, waiter: Waiter) -> bool:
        """Whether nobody of its model stands before it."""
        return self._first(waiter.model) is waiter

    def left(self, waiter: Waiter) -> None:
        """For `Waiter` alone."""
        now_s = self._clock.monotonic()
        self._between_s += (now_s - self._left_s - self._between_s) * 0.1
        self._left_s = now_s
        self._take_out(waiter)

    def call(self, models: Iterable[str]) -> None:
        """There may be room for these models: the first waiter of each looks."""
        for model in models:
            if (first := self._first(model)) is not None:
                first.call()

    def waited_for(self) -> tuple[str, ...]:
        """The models somebody waits for."""
        return tuple(self._models)

    def close(self) -> None:
        """Put all out."""
        for waiter in self._all():
            self._put_out(
                waiter, ShuttingDown("The server is shutting down; try another.", retry_after_s=5.0)
            )

    def retry_after_s(self) -> float:
        """When there may be room again: all who wait, at the pace at which they lately left."""
        return min(max(self._size * self._between_s, _RETRY_MIN_S), _RETRY_MAX_S)

    def _shed_below(self, priority: Priority) -> bool:
        """Make room for one of `priority`: the last come of the lowest priority under it goes."""
        for rank in reversed(PRIORITIES[_rank(priority) + 1 :]):
            waiting = [lanes[rank][-1] for lanes in self._models.values() if lanes[rank]]
            if waiting:
                self._put_out(waiting[-1], self._full(rank))
                return True
        return False

    def _put_out(self, waiter: Waiter, refusal: StockpotError) -> None:
        """At once, not when its task gets to run: until then many may come, and each must find the line as
        long as it is."""
        waiter.put_out(refusal)
        self._take_out(waiter)

    def _take_out(self, waiter: Waiter) -> None:
        lanes = self._models[waiter.model]
        lanes[waiter.priority].remove(waiter)
        self._size -= 1
        if not any(lanes.values()):
            del self._models[waiter.model]
        if not self._size and self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        # It may have been called, and there may be room for more than one.
        self.call((waiter.model,))

    def _first(self, model: str) -> Waiter | None:
        lanes = self._models.get(model)
        return None if lanes is None else next((lane[0] for lane in lanes.values() if lane), None)

    def _full(self, priority: Priority) -> QueueFull:
        return QueueFull(
            f"{self._size} requests wait for a backend, and no more of priority {priority} may (queue_limit"
            f" is {self.limit}); try again later.",
            retry_after_s=round(self.retry_after_s(), 1),
        )

    def _tell(self) -> None:
        """Positions, a few times a second for all together: each change for each waiter would be their
        product."""
        for lanes in self._models.values():
            waiters = (waiter for rank in PRIORITIES for waiter in lanes[rank])
            for position, waiter in enumerate(waiters):
                if waiter.position != position:
                    waiter.position = position
                    waiter.call()
        self._ticker = asyncio.get_running_loop().call_later(_TELLS_EVERY_S, self._tell)

    def _all(self) -> list[Waiter]:
        return [waiter for lanes in self._models.values() for lane in lanes.values() for waiter in lane]


def _rank(priority: Priority) -> int:
    return PRIORITIES.index(priority)

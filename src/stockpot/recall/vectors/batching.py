"""Gathers what is asked at one moment into one call of a thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from stockpot.errors import QueueFull, ShuttingDown
from stockpot.recall.vectors.embedder import Vectors

_TEXTS_A_BATCH = 8
"""Some 30 ms of work: who comes first does not wait long for the others of the batch."""
_WAITING_MAX = 1_024

_Wanted = tuple[tuple[str, ...], asyncio.Future[Vectors]]


class Batcher:
    """Texts to vectors by `run`, on a thread of its own. Nobody waits for others to come: while a batch is
    made the next gathers. Who gives up is left out of the next batch."""

    def __init__(
        self, run: Callable[[Sequence[str]], Vectors], *, texts_a_batch: int = _TEXTS_A_BATCH
    ) -> None:
        self._run = run
        self._texts_a_batch = texts_a_batch
        self._waiting: deque[_Wanted] = deque()
        self._texts_waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stockpot-embedder")

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        """One row for each text. Raises QueueFull, ShuttingDown, and what `run` raises."""
        if self._closed:
            raise ShuttingDown("The embedder is closed.")
        if self._texts_waiting + len(texts) > _WAITING_MAX:
            raise QueueFull(f"{self._texts_waiting} texts wait to be embedded; try again in a moment.")
        wanted: _Wanted = (tuple(texts), asyncio.get_running_loop().create_future())
        self._waiting.append(wanted)
        self._texts_waiting += len(texts)
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await wanted[1]

    async def close(self) -> None:
        """The batch that is being made is finished; who waits for the next gets ShuttingDown. Idempotent."""
        self._closed = True
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(ShuttingDown("The embedder is closed."))
        self._waiting.clear()
        self._texts_waiting = 0
        if self._task is not None:
            await asyncio.wait({self._task})
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next():
            texts = [text for asked, _ in batch for text in asked]
            try:
                rows = await loop.run_in_executor(self._thread, self._run, texts)
            except Exception as error:  # noqa: BLE001  passed on to each who waits
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            first = 0
            for asked, future in batch:
                if not future.done():
                    future.set_result(np.ascontiguousarray(rows[first : first + len(asked)]))
                first += len(asked)
        self._task = None

    def _next(self) -> list[_Wanted]:
        """Those who came first, whole; one that alone is more than a batch goes by itself."""
        batch: list[_Wanted] = []
        texts = 0
        while self._waiting and (not batch or texts + len(self._waiting[0][0]) <= self._texts_a_batch):
            wanted = self._waiting.popleft()
            self._texts_waiting -= len(wanted[0])
            if not wanted[1].done():
                batch.append(wanted)
                texts += len(wanted[0])
        return batch

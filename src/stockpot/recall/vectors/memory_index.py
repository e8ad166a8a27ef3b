"""The index in this process: each partition exact while it is small, a graph when it has grown."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from numpy.typing import NDArray

from stockpot.recall.vectors.embedder import Vectors
from stockpot.recall.vectors.index import Near, VectorIndex
from stockpot.recall.vectors.numpy_index import NumpyPartition
from stockpot.recall.vectors.usearch_index import UsearchPartition

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

_Form = NumpyPartition | UsearchPartition
_Change = Callable[[_Form], object]

_EXACT_UP_TO = 20_000
_AT_ONCE_UP_TO = 1_000
"""Vectors that are compared in less time than it takes to hand the work to a thread."""
_AT_A_TIME = 512
_CATCHES_UP_WITH = 32
"""Vectors put into a graph without a pause: on the builder's thread, and where searches wait for it."""
VECTORS_MAX = 1_000_000


class _Partition:
    """`form` is touched on the event loop while `threaded` is False, on the index's thread alone from then
    on. `moving` makes a graph of a copy; `later` is then what has changed since, to be done to the graph too.
    `counted` is how many vectors the index took into account; of the event loop."""

    __slots__ = ("counted", "form", "later", "moving", "threaded")

    def __init__(self) -> None:
        self.form: _Form = NumpyPartition()
        self.threaded = False
        self.moving: asyncio.Task[None] | None = None
        self.later: list[_Change] | None = None
        self.counted = 0

    def changed(self, change: _Change) -> None:
        if self.later is not None:
            self.later.append(change)
        change(self.form)


class MemoryIndex(VectorIndex):
    """On the event loop; what takes longer runs on one thread, and graphs are made on another, so that
    searches go on. When there are more than `vectors_max`, the partition that was used longest ago goes (of a
    partition that is too big by itself, what came first): what was in it is a miss until the next start."""

    def __init__(self, *, vectors_max: int = VECTORS_MAX, exact_up_to: int = _EXACT_UP_TO) -> None:
        self._vectors_max = vectors_max
        self._exact_up_to = exact_up_to
        self._partitions: OrderedDict[bytes, _Partition] = OrderedDict()
        self._moving: set[asyncio.Task[None]] = set()
        self._count = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stockpot-index")
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="stockpot-index-builder")

    def __len__(self) -> int:
        return self._count

    async def close(self) -> None:
        for task in self._moving:
            task.cancel()
        if self._moving:
            await asyncio.wait(tuple(self._moving))
        self._thread.shutdown(wait=False)
        self._builder.shutdown(wait=False)

    async def add(self, partition: bytes, key: bytes, vector: Vectors) -> None:
        if not self._vectors_max:
            return
        held = self._partitions.get(partition)
        if held is None:
            held = self._partitions[partition] = _Partition()
        self._partitions.move_to_end(partition)
        await self._change(partition, held, lambda form: form.add(key, vector))
        await self._make_room()

    async def search(self, partition: bytes, vector: Vectors, count: int) -> Sequence[Near]:
        held = self._partitions.get(partition)
        if held is None:
            return ()
        self._partitions.move_to_end(partition)
        if not held.threaded:
            return held.form.search(vector, count)
        return await self._on_thread(lambda: held.form.search(vector, count))

    async def remove(self, partition: bytes, key: bytes) -> None:
        held = self._partitions.get(partition)
        if held is not None:
            await self._change(partition, held, lambda form: form.remove(key))

    async def settled(self) -> None:
        while self._moving:
            await asyncio.wait(tuple(self._moving))

    async def _change(self, partition: bytes, held: _Partition, change: _Change) -> None:
        if held.threaded:
            await self._on_thread(lambda: held.changed(change))
        else:
            held.changed(change)
        if self._partitions.get(partition) is not held:
            return  # dropped meanwhile, with all it counted
        size = len(held.form)
        self._count += size - held.counted
        held.counted = size
        if not size:
            self._drop(partition)
            return
        held.threaded = held.threaded or size > _AT_ONCE_UP_TO or size > self._exact_up_to
        form = held.form
        is_due = form.is_worn if isinstance(form, UsearchPartition) else size > self._exact_up_to
        if is_due and held.moving is None:
            held.moving = asyncio.create_task(self._move(held))
            self._moving.add(held.moving)
            held.moving.add_done_callback(self._moving.discard)

    async def _move(self, held: _Partition) -> None:
        """To a new graph, from the exact form or from a worn one. What shrinks again stays a graph."""

        def copied() -> tuple[list[bytes], Sequence[NDArray[Any]]]:
            held.later = []
            return held.form.vectors()

        def caught_up(graph: UsearchPartition) -> list[_Change]:
            """Puts the graph in place, unless too much is to be done to it first: that is what is given."""
            changes = held.later or []
            if len(changes) > _CATCHES_UP_WITH:
                held.later = []
                return changes
            for change in changes:
                change(graph)
            held.form, held.later = graph, None
            return []

        def given_up() -> None:
            held.later = None

        try:
            graph = await self._build(*await self._on_thread(copied))
            while changes := await self._on_thread(lambda: caught_up(graph)):
                await self._on_builder(lambda todo=changes: [change(graph) for change in todo])
            held.moving = None  # after a failure it stays: it is not tried again
        except (RuntimeError, MemoryError) as error:
            await self._on_thread(given_up)
            _LOG.warning(
                "recall: no graph could be made of %d vectors, searches go on as they are (%s: %s)",
                *(len(held.form), type(error).__name__, error),
            )

    async def _build(self, keys: Sequence[bytes], vectors: Sequence[NDArray[Any]]) -> UsearchPartition:
        # On that thread too: the library is loaded with the first.
        graph = await self._on_builder(lambda: UsearchPartition(len(vectors[0])))
        for first in range(0, len(keys), _AT_A_TIME):
            piece = slice(first, first + _AT_A_TIME)
            await self._on_builder(lambda piece=piece: graph.add_new(keys[piece], vectors[piece]))
        return graph

    async def _make_room(self) -> None:
        while self._count > self._vectors_max:
            partition, held = next(iter(self._partitions.items()))
            if len(self._partitions) > 1:
                self._drop(partition)
            else:
                await self._change(partition, held, lambda form: form.remove_oldest())

    def _drop(self, partition: bytes) -> None:
        self._count -= self._partitions.pop(partition).counted

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _on_builder(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._builder, work)

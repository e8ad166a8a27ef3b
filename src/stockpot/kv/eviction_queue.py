"""A queue of leaves by rank, whose ranks may rise and whose leaves may cease to be leaves at no cost.

The queue is a heap in which a block has at most one slot, and a slot's rank may be out of date, but only too
low. What is wrong is put right when the slot comes to the front. So a hit writes two numbers, and taking the
first costs O(log n), amortised over hits and admissions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from stockpot.kv.block import BlockId

_DEAD_SLOTS = 64
"""Below this many, slots of blocks that left are not worth clearing away."""


@dataclass(slots=True, eq=False)
class Entry:
    """A block as a policy ranks it: by `rank`, then by `place`, which is unique and changes with the rank."""

    id: BlockId
    parent: BlockId | None
    size_bytes: int
    worth: float
    rank: float = 0.0
    place: int = 0
    uses: int = 0
    named: int = -1
    """The last walk over victims that named it, -1 after a use."""
    queued: bool = False
    gone: bool = False
    queue: LeafQueue = field(init=False)


class LeafQueue:
    """Entries that have no children, smallest (rank, place) first. `children` counts them, zero is absent."""

    def __init__(self, children: Mapping[BlockId, int]) -> None:
        self._children = children
        self._slots: list[tuple[float, int, Entry]] = []
        self._dead = 0

    def push(self, entry: Entry) -> None:
        """Add a leaf. One that was a leaf before may still have a slot, which then serves."""
        if not entry.queued:
            entry.queued = True
            heappush(self._slots, (entry.rank, entry.place, entry))

    def first(self) -> Entry | None:
        """The leaf that stands first."""
        slots = self._slots
        while slots:
            _, place, entry = slots[0]
            if entry.gone or entry.id in self._children:
                self.pop()
            elif place != entry.place:
                heapreplace(slots, (entry.rank, entry.place, entry))
            else:
                return entry
        return None

    def pop(self) -> None:
        """Remove the slot at the front."""
        entry = heappop(self._slots)[2]
        entry.queued = False
        self._dead -= entry.gone

    def forget(self, entry: Entry) -> None:
        """An entry of this queue left for good."""
        entry.gone = True
        self._dead += entry.queued
        if self._dead > max(_DEAD_SLOTS, len(self._slots) // 2):
            self._slots = [slot for slot in self._slots if not slot[2].gone]
            heapify(self._slots)
            self._dead = 0

    def check_integrity(self) -> None:
        """Raise AssertionError where a slot stands too late, or an entry has two."""
        entries = [entry for _, _, entry in self._slots]
        if len({id(entry) for entry in entries}) != len(entries):
            raise AssertionError("a block has two slots in a queue")
        if sum(entry.gone for entry in entries) != self._dead:
            raise AssertionError(f"{self._dead} slots of blocks that left are counted, which is wrong")
        for rank, place, entry in self._slots:
            if not entry.queued or (rank, place) > (entry.rank, entry.place):
                raise AssertionError(f"the block {entry.id.hex()} stands in a queue behind its place")

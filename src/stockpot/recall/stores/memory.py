"""Entries in memory, in front of a store: within bytes, the least recently used leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from stockpot.recall.entry import Entry, Selector


class MemoryFront:
    """By the first 16 bytes of the key. One thread. What is here may have left the store behind it."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Least recently used first."""
        return iter(tuple(self._entries.values()))

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def get(self, id: bytes, *, use: bool = True) -> Entry | None:
        entry = self._entries.get(id)
        if entry is not None and use:
            self._entries.move_to_end(id)
        return entry

    def put(self, entry: Entry) -> None:
        """Keep it, in place of one of the same id; one that is too large for all of it is not kept."""
        id = entry.key[:16]
        self.drop(id)
        if entry.size_bytes > self._capacity_bytes:
            return
        self._entries[id] = entry
        self._size_bytes += entry.size_bytes
        while self._size_bytes > self._capacity_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._size_bytes -= oldest.size_bytes

    def drop(self, id: bytes) -> None:
        entry = self._entries.pop(id, None)
        if entry is not None:
            self._size_bytes -= entry.size_bytes

    def drop_fitting(self, selector: Selector) -> None:
        if selector.id is not None:  # no need to look at all: feedback comes one by one
            entry = self._entries.get(id_bytes(selector.id) or b"")
            fitting = [] if entry is None or not selector.fits(entry) else [entry.key[:16]]
        else:
            fitting = [id for id, entry in self._entries.items() if selector.fits(entry)]
        for id in fitting:
            self.drop(id)

    def clear(self) -> None:
        self._entries.clear()
        self._size_bytes = 0


def id_bytes(id: str) -> bytes | None:
    """The 16 bytes an `Entry.id` stands for; None: it is none."""
    if len(id) != 32:
        return None
    try:
        return bytes.fromhex(id)
    except ValueError:
        return None

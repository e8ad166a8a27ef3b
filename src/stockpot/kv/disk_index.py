"""What the disk tier knows of its files: found by id, by beginning, by content, in order of eviction."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from threading import Lock
from typing import TypeVar

from stockpot.kv.block import BlockId, ContentHash, TokenKey
from stockpot.kv.tier import BlockHead

LONGEST_PROMISE_S = 3600.0
SLACK_S = 60.0
"""How far clocks of processes that share a folder may be apart."""

_Key = TypeVar("_Key", BlockId, ContentHash)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the folder. `stamp_s` is what its modification time means: the Unix time of the last use, or
    the end of a promise where that is later; `filed_s` the one last written to the file.

    `head` lacks the tokens; it is None for a file that is not ours to read: damaged, or sealed in another
    way. Such a file counts, ages and goes like any other.
    """

    id: BlockId
    size_bytes: int
    stamp_s: float
    filed_s: float
    tokens: int = 0
    head: BlockHead | None = None

    def due_s(self, now_s: float) -> float:
        """The stamp by which it is evicted, lowest first. One further ahead than any promise is the work of a
        clock that was wrong: it counts as now."""
        return now_s if self.stamp_s > now_s + LONGEST_PROMISE_S + SLACK_S else self.stamp_s


def slim(head: BlockHead) -> BlockHead:
    """The head as it is kept by the thousand: no tokens, one copy of each name."""
    return replace(
        head,
        tokens=TokenKey(b""),
        fingerprint=sys.intern(head.fingerprint),
        layout=sys.intern(head.layout),
        tenant=sys.intern(head.tenant),
    )


class DiskIndex:
    """Entries by id. All methods may be called from any thread; none of them waits for the disk.

    An alias or a content hash that several blocks have leads to the one that was put last.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: dict[BlockId, Entry] = {}
        self._beginnings: dict[BlockId, BlockId] = {}
        self._contents: dict[ContentHash, BlockId] = {}
        self._used_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """A snapshot."""
        with self._lock:
            return iter(tuple(self._entries.values()))

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def ids(self) -> set[BlockId]:
        with self._lock:
            return set(self._entries)

    def get(self, block_id: BlockId) -> Entry | None:
        return self._entries.get(block_id)

    def beginning_with(self, alias: BlockId) -> Entry | None:
        """A block that begins with the tokens this id stands for, and is longer."""
        with self._lock:
            found = self._beginnings.get(alias)
            return None if found is None else self._entries.get(found)

    def holding(self, content: ContentHash) -> Entry | None:
        """A block of anybody that ends with the tokens this hash stands for."""
        with self._lock:
            found = self._contents.get(content)
            return None if found is None else self._entries.get(found)

    def put(self, entry: Entry) -> None:
        """Add an entry, or replace the one of this id."""
        with self._lock:
            self._remove(entry.id)
            self._entries[entry.id] = entry
            self._used_bytes += entry.size_bytes
            if entry.head is not None:
                self._contents[entry.head.content] = entry.id
                for _, alias in entry.head.aliases:
                    self._beginnings[alias] = entry.id

    def update(
        self,
        block_id: BlockId,
        *,
        stamp_s: float,
        filed_s: float | None = None,
        size_bytes: int | None = None,
    ) -> None:
        """Change what is known of an entry, if it is still there."""
        with self._lock:
            old = self._entries.get(block_id)
            if old is None:
                return
            new = replace(
                old,
                stamp_s=stamp_s,
                filed_s=old.filed_s if filed_s is None else filed_s,
                size_bytes=old.size_bytes if size_bytes is None else size_bytes,
            )
            self._entries[block_id] = new
            self._used_bytes += new.size_bytes - old.size_bytes

    def remove(self, block_id: BlockId) -> Entry | None:
        with self._lock:
            return self._remove(block_id)

    def victims(self, now_s: float, *, free_bytes: int, free_blocks: int) -> list[Entry]:
        """What goes next, until both amounts are free: longest unused first, of one use the deepest first,
        blocks under a promise last."""
        chosen: list[Entry] = []
        for entry in sorted(self, key=lambda entry: (entry.due_s(now_s), -_start(entry))):
            if free_bytes <= 0 and free_blocks <= 0:
                break
            chosen.append(entry)
            free_bytes -= entry.size_bytes
            free_blocks -= 1
        return chosen

    def check_integrity(self) -> None:
        """Raise AssertionError if the parts disagree."""
        with self._lock:
            assert self._used_bytes == sum(entry.size_bytes for entry in self._entries.values())
            for leads in (self._beginnings.values(), self._contents.values()):
                assert set(leads) <= set(self._entries), "a lead to a block that is gone"

    def _remove(self, block_id: BlockId) -> Entry | None:
        entry = self._entries.pop(block_id, None)
        if entry is None:
            return None
        self._used_bytes -= entry.size_bytes
        if entry.head is not None:
            _forget(self._contents, (entry.head.content,), block_id)
            _forget(self._beginnings, (alias for _, alias in entry.head.aliases), block_id)
        return entry


def _forget(leads: dict[_Key, BlockId], keys: Iterable[_Key], block_id: BlockId) -> None:
    for key in keys:
        if leads.get(key) == block_id:
            del leads[key]


def _start(entry: Entry) -> int:
    return entry.head.start if entry.head is not None else 0

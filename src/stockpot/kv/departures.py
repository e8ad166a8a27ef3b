"""What became of blocks that are gone: a bounded memory, so that a miss can be explained."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from stockpot.kv.block import BlockId, TokenKey


@dataclass(frozen=True, slots=True)
class Departed:
    """One block that left a tier. `cause` is a word (`evicted: capacity`, `invalidated`, ...), `detail` says
    by whom or under which pressure; `at_s` is Unix time; `request` the request that had computed it."""

    tier: str
    cause: str
    at_s: float
    detail: str = ""
    request: str = ""
    tokens: TokenKey | None = None


class Departures:
    """The last `limit` blocks that left, by id, and by the id of their parent (a prompt that departs within
    a block cannot know its id). Used by several threads."""

    def __init__(self, limit: int = 16_384) -> None:
        self._limit = limit
        self._by_id: OrderedDict[BlockId, Departed] = OrderedDict()
        self._by_parent: OrderedDict[BlockId, Departed] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, block: BlockId, departed: Departed, *, parent: BlockId | None = None) -> None:
        """Remember; what was remembered of the block before is forgotten."""
        with self._lock:
            self._put(self._by_id, block, departed)
            if parent is not None and departed.tokens is not None:
                self._put(self._by_parent, parent, departed)

    def forget(self, block: BlockId) -> None:
        """The block is back."""
        with self._lock:
            self._by_id.pop(block, None)

    def find(self, block: BlockId) -> Departed | None:
        """What became of this block."""
        with self._lock:
            return self._by_id.get(block)

    def find_child(self, parent: BlockId) -> Departed | None:
        """What became of the block that left last from behind `parent`."""
        with self._lock:
            return self._by_parent.get(parent)

    def __len__(self) -> int:
        return len(self._by_id)

    def _put(self, kept: OrderedDict[BlockId, Departed], key: BlockId, departed: Departed) -> None:
        kept[key] = departed
        kept.move_to_end(key)
        if len(kept) > self._limit:
            kept.popitem(last=False)

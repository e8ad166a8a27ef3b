"""Blocks to which something happened a short while ago; a bounded number of them."""

from __future__ import annotations

import threading
from collections import OrderedDict

from stockpot.clock import Clock
from stockpot.kv.block import BlockId


class Recent:
    """Ids that were added within the last `span_s`, at most `limit`; the oldest go first. Any thread."""

    def __init__(self, clock: Clock, *, span_s: float, limit: int = 4096) -> None:
        self._clock = clock
        self._span_s = span_s
        self._limit = limit
        self._added_s: OrderedDict[BlockId, float] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, block: BlockId) -> None:
        """It happened now."""
        with self._lock:
            self._added_s[block] = self._clock.monotonic()
            self._added_s.move_to_end(block)
            if len(self._added_s) > self._limit:
                self._added_s.popitem(last=False)

    def discard(self, block: BlockId) -> None:
        """It is undone."""
        with self._lock:
            self._added_s.pop(block, None)

    def __contains__(self, block: object) -> bool:
        with self._lock:
            added_s = self._added_s.get(block)  # pyright: ignore[reportArgumentType]
        return added_s is not None and self._clock.monotonic() - added_s < self._span_s

"""Writing new blocks to a tier behind RAM, in its own time, on a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from stockpot.kv.block import BlockId, aliases
from stockpot.kv.tier import Block, Tier, Unkept

_log = logging.getLogger(__name__)

_BATCH_BYTES = 16 * 2**20
_NICENESS = 10
"""Writing gives way to computing: the engine's threads share the same processors."""


@dataclass(frozen=True, slots=True)
class WriteReport:
    """A batch was written; of its blocks `kept` were kept, `unkept` not, by cause."""

    tier: str
    kept: int
    size_bytes: int
    unkept: Mapping[Unkept, int]


class WriteBehind:
    """A bounded queue before a tier, and the thread that empties it. `offer` and `forget` do not wait."""

    def __init__(
        self,
        tier: Tier,
        *,
        limit_bytes: int,
        on_written: Callable[[WriteReport], None] = lambda _: None,
    ) -> None:
        self.tier = tier
        self._limit_bytes = limit_bytes
        self._on_written = on_written
        self._queue: deque[Block | BlockId] = deque()
        self._queued_bytes = 0
        self._working = False
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"stockpot-write-{tier.name}", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """What waits to be written."""
        return self._queued_bytes

    def offer(self, blocks: Sequence[Block]) -> int:
        """Queue blocks; how many. Those that do not fit the bound are not written, and counted."""
        taken = 0
        with self._wake:
            for block in blocks:
                if self._closing or self._queued_bytes + len(block.data) > self._limit_bytes:
                    break
                self._queue.append(block)
                self._queued_bytes += len(block.data)
                taken += 1
            self._wake.notify_all()
        if taken < len(blocks):
            self._on_written(WriteReport(self.tier.name, 0, 0, {"busy": len(blocks) - taken}))
        return taken

    def forget(self, blocks: Sequence[BlockId]) -> None:
        """Drop blocks after what was queued before."""
        with self._wake:
            # Ids are 32 bytes each, and as many as there are blocks in RAM at most.
            self._queue.extend(blocks)
            self._wake.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that is queued is written; False where that takes longer."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._queue and not self._working, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what is queued, for so long at most, and end the thread."""
        written = self.flush(timeout_s)
        with self._wake:
            self._closing = True
            if not written:
                _log.warning(
                    "%d blocks were not written to %s within %g s and are lost there",
                    len(self._queue), self.tier.name, timeout_s,
                )  # fmt: skip
                self._queue.clear()
                self._queued_bytes = 0
            self._wake.notify_all()
        self._thread.join(timeout_s + 1)

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # not Linux: at the usual priority then
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._wake:
                self._working = False
                self._wake.notify_all()
                self._wake.wait_for(lambda: self._queue or self._closing)
                if self._closing and not self._queue:
                    return
                blocks, unwanted = self._take()
                self._working = True
            try:
                if blocks:
                    self._write(blocks)
                if unwanted:
                    self.tier.drop(unwanted)
            except Exception:  # noqa: BLE001  a tier broke its contract: the blocks are lost there, not here
                _log.exception("writing %d blocks to %s failed", len(blocks), self.tier.name)

    def _take(self) -> tuple[list[Block], list[BlockId]]:
        """The next batch: blocks, or ids to drop, in the order in which they came."""
        blocks: list[Block] = []
        unwanted: list[BlockId] = []
        size = 0
        while self._queue and size < _BATCH_BYTES:
            first = self._queue[0]
            if isinstance(first, Block):
                if unwanted:
                    break
                blocks.append(first)
                size += len(first.data)
            else:
                if blocks:
                    break
                unwanted.append(first)
            self._queue.popleft()
        self._queued_bytes -= size
        return blocks, unwanted

    def _write(self, blocks: Sequence[Block]) -> None:
        named = [
            Block(replace(each.head, aliases=aliases(each.head.parent, each.head.tokens)), each.data)
            for each in blocks
        ]
        outcomes = self.tier.write(named)
        unkept: Counter[Unkept] = Counter(outcome for outcome in outcomes if outcome is not None)
        sizes = (len(block.data) for block, outcome in zip(blocks, outcomes, strict=True) if outcome is None)
        self._on_written(WriteReport(self.tier.name, outcomes.count(None), sum(sizes), unkept))

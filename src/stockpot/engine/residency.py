"""What stands in the context, and the way in and out of it.

In: cells of a running sequence with the same beginning are shared, blocks of the store are imported behind
them. Out: whole blocks and the tail that are not in the store yet are exported, then the cells are freed.
The context holds what runs; the store holds what may come back (idle cells cost every step, see
ARCHITECTURE.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from stockpot.engine.cell_pool import CellPool
from stockpot.engine.driver import Driver, OutOfCells, Span
from stockpot.engine.sequence import Phase, Sequence
from stockpot.events import CacheTier
from stockpot.kv.prefix_tree import Match
from stockpot.kv.store import KVStore

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a waiting sequence need not compute. `shared` tokens stand in the cells of `source`; `match` is
    what the store has. `pending` tokens (at least as many) will stand in the cells of `leader` once it has
    been prefilled that far."""

    source: Sequence | None
    shared: int
    match: Match
    leader: Sequence | None
    pending: int

    @property
    def tokens(self) -> int:
        return max(self.shared, self.match.tokens)


_NOTHING = Reuse(None, 0, Match((), 0), None, 0)


class Residency:
    """Moves sequences into and out of the context. Used by the engine's thread alone."""

    def __init__(self, driver: Driver, store: KVStore | None) -> None:
        self.pool = CellPool(driver.cells)
        self.store = store
        self._driver = driver
        self._free_slots = list(range(driver.max_sequences - 1, -1, -1))

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def find_reuse(self, sequence: Sequence, running: Iterable[Sequence]) -> Reuse:
        """The best a waiting sequence can reuse now, and what it could reuse soon. Changes nothing."""
        if self.store is None:
            return _NOTHING
        limit = sequence.length - 1
        tokens = sequence.tokens[:limit]
        source = leader = None
        shared = pending = 0
        for other in running:
            common = other.common_prefix(tokens)
            if common > pending:
                leader, pending = other, common
            if min(common, other.computed) > shared:
                source, shared = other, min(common, other.computed)
        return Reuse(source, shared, self.store.match(sequence.reusable_key()), leader, pending)

    def admit(self, sequence: Sequence, reuse: Reuse) -> dict[CacheTier, int]:
        """Give the sequence a slot and everything it can reuse; tokens reused by tier.

        The caller has checked that a slot is free and that the pool has cells for the import.
        """
        slot = self._free_slots.pop()
        sequence.slot = slot
        sequence.phase = Phase.RUNNING
        sequence.join = None
        sequence.computed = 0
        reused: dict[CacheTier, int] = {}
        if reuse.source is not None and reuse.source.slot is not None:
            self._driver.copy(reuse.source.slot, slot, Span(0, reuse.shared))
            self.pool.share(reuse.source.slot, slot, reuse.shared)
            sequence.computed = reused["context"] = reuse.shared
        if self.store is not None:
            parked, sequence.pin = sequence.pin, self.store.pin(reuse.match)
            self.store.unpin(parked)
            imported = self._import(slot, sequence.computed, reuse.match)
            if imported:
                sequence.computed += imported
                reused["ram"] = imported
        return reused

    def leave(self, sequence: Sequence) -> None:
        """Take the sequence out of the context, what it computed into the store, and give up what was
        pinned for it."""
        if sequence.slot is not None:
            self.save(sequence)
            self._driver.cut(sequence.slot)
            self.pool.release(sequence.slot)
            self._free_slots.append(sequence.slot)
            sequence.slot = None
            sequence.computed = 0
        if self.store is not None:
            self.store.unpin(sequence.pin)
        sequence.pin = None

    def park(self, sequence: Sequence) -> None:
        """Take a preempted sequence out of the context; its KV stays pinned in the store until it is
        admitted again or leaves for good."""
        sequence.phase = Phase.WAITING
        key = sequence.computed_key()
        self.leave(sequence)
        if self.store is not None:
            sequence.pin = self.store.pin(self.store.match(key))

    def save(self, sequence: Sequence) -> None:
        """Export what the sequence computed and the store lacks."""
        if self.store is None or sequence.slot is None:
            return
        key = sequence.computed_key()
        spans = self.store.missing(key)
        if spans:
            blocks = self._driver.export_spans(sequence.slot, spans)
            self.store.write(key, list(zip(spans, blocks, strict=True)))

    def check_integrity(self) -> None:
        """Raise AssertionError where pool, store and library disagree."""
        self.pool.check_integrity()
        if self.store is not None:
            self.store.check_integrity()
        used = self._driver.used_cells()
        if used is not None and used != self.pool.used:
            raise AssertionError(f"the library counts {used} used cells, the pool {self.pool.used}")

    def _import(self, slot: int, start: int, match: Match) -> int:
        """Put the store's blocks behind what the slot holds; how many tokens that gave."""
        if self.store is None or match.tokens <= start:
            return 0
        blocks = self.store.read(match, start)
        if not blocks:
            return 0
        span = Span(start, min(match.tokens, blocks[-1][0].end))
        if span.end - span.start > self.pool.free:
            return 0
        try:
            self._driver.import_spans(slot, blocks, span)
        except OutOfCells:
            self._driver.defragment()
            try:
                self._driver.import_spans(slot, blocks, span)
            except OutOfCells:
                _log.debug(
                    "no run of free cells for %d tokens: they are computed instead", span.end - span.start
                )
                return 0
        self.pool.extend(slot, span.end - span.start)
        return span.end - span.start

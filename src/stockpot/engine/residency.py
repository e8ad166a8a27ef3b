"""What stands in the context, and the way in and out of it.

In: cells of a running sequence with the same beginning are shared, blocks of the store are imported behind
them. Out: whole blocks and the tail that are not in the store yet are exported, then the cells are freed.
The context holds what runs; the store holds what may come back (idle cells cost every step, see
ARCHITECTURE.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from stockpot.clock import Clock
from stockpot.engine.cell_pool import CellPool
from stockpot.engine.driver import Driver, OutOfCells, Span
from stockpot.engine.sequence import Phase, Sequence
from stockpot.events import CacheTier
from stockpot.kv.block import BlockId, TokenKey
from stockpot.kv.cache import KVCache
from stockpot.kv.prefetch import Fetch, TierOutcome
from stockpot.kv.prefix_tree import Match, Node
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

    def __init__(self, driver: Driver, cache: KVCache | None, clock: Clock) -> None:
        self.pool = CellPool(driver.cells)
        self.cache = cache
        self._driver = driver
        self._clock = clock
        self._free_slots = list(range(driver.max_sequences - 1, -1, -1))

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def store(self) -> KVStore | None:
        return self.cache.store if self.cache is not None else None

    def start_fetch(self, sequence: Sequence) -> None:
        """Ask the tiers behind RAM for what a waiting sequence could reuse and RAM lacks."""
        if self.cache is None or sequence.task.scope is None:
            return
        key = sequence.reusable_key()
        match = self.cache.store.match(sequence.task.scope, key)
        sequence.fetch = self.cache.fetch(sequence.task.request_id, sequence.task.scope, key, match)
        if sequence.fetch is not None and sequence.pin is None:
            sequence.pin = self.cache.store.hold(match)  # what comes stands on it

    def still_fetching(self, sequence: Sequence) -> bool:
        """Whether blocks are still on their way for a waiting sequence, and worth the wait. What has come is
        in RAM, and pinned, when this turns false."""
        fetch = sequence.fetch
        if fetch is None:
            return False
        now_s = self._clock.monotonic()
        if not fetch.done and now_s < fetch.give_up_s:
            return True
        if not fetch.done:
            fetch.abandoned = True  # what it has so far is good; the rest is computed
        sequence.fetch = None
        self._adopt(sequence, fetch)
        return sequence.fetch is not None

    def find_reuse(self, sequence: Sequence, running: Iterable[Sequence]) -> Reuse:
        """The best a waiting sequence can reuse now, and what it could reuse soon. Changes nothing."""
        store, scope = self.store, sequence.task.scope
        if store is None or scope is None:
            return _NOTHING
        tokens = sequence.tokens[: sequence.reusable_tokens]
        source = leader = None
        shared = pending = 0
        for other in running:
            if other.task.scope is None or not other.task.shareable:
                continue
            common = scope.common(other.task.scope, other.common_prefix(tokens))
            if other.task.marked_tokens is not None:
                common = min(common, other.task.marked_tokens)
            if common > pending:
                leader, pending = other, common
            if min(common, other.computed) > shared:
                source, shared = other, min(common, other.computed)
        return Reuse(source, shared, store.match(scope, sequence.reusable_key()), leader, pending)

    def admit(self, sequence: Sequence, reuse: Reuse) -> dict[CacheTier, int]:
        """Give the sequence a slot and everything it can reuse; tokens reused by tier, in the order of their
        positions.

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
            self.store.label(reuse.match, sequence.task.labels)
            for tokens, node in self._import(slot, sequence.computed, reuse.match):
                tier = sequence.fetched.get(node.id, "ram")
                sequence.computed += tokens
                reused[tier] = reused.get(tier, 0) + tokens
        sequence.fetched = {}
        return reused

    def leave(self, sequence: Sequence) -> None:
        """Take the sequence out of the context, what it computed into the store, and give up what was
        pinned for it."""
        if sequence.slot is not None:
            # What a preempted sequence computed is for itself, however far it goes.
            self.save(sequence, sequence.computed_key() if sequence.parked else sequence.kept_key())
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
        sequence.parked = True
        self.leave(sequence)
        if self.store is not None and sequence.task.scope is not None:
            sequence.pin = self.store.hold(self.store.match(sequence.task.scope, key))

    def save(self, sequence: Sequence, key: TokenKey) -> None:
        """Export what the sequence computed of these tokens and the store lacks."""
        scope = sequence.task.scope
        if self.store is None or scope is None or sequence.slot is None:
            return
        spans = self.store.missing(scope, key)
        if spans:
            blocks = self._driver.export_spans(sequence.slot, spans)
            self.store.write(scope, key, list(zip(spans, blocks, strict=True)), sequence.task.labels)
        if sequence.task.labels.promises:
            # What another request wrote of the same prompt meanwhile has that one's labels alone.
            self.store.label(self.store.match(scope, key), sequence.task.labels)

    def check_integrity(self) -> None:
        """Raise AssertionError where pool, store and library disagree."""
        self.pool.check_integrity()
        if self.store is not None:
            self.store.check_integrity()
        used = self._driver.used_cells()
        if used is not None and used != self.pool.used:
            raise AssertionError(f"the library counts {used} used cells, the pool {self.pool.used}")

    def _adopt(self, sequence: Sequence, fetch: Fetch) -> None:
        """Put what a fetch brought into RAM, and hold it for the sequence until it is admitted."""
        store, scope = self.store, sequence.task.scope
        if store is None or scope is None:
            return
        key = sequence.reusable_key()
        others = fetch.request != sequence.task.request_id and not sequence.outcomes
        sequence.outcomes += _outcomes(fetch)
        sequence.waited_s = self._clock.monotonic() - sequence.task.arrived_s
        arrived = list(fetch.blocks)
        taken = store.adopt(scope, key, arrived, sequence.task.request_id)
        tiers: dict[BlockId, CacheTier] = {block.head.id: tier for tier, block in arrived}
        sequence.fetched |= {block: tiers[block] for block in taken}
        parked, sequence.pin = sequence.pin, store.hold(store.match(scope, key))
        store.unpin(parked)
        if others:
            # It was asked for a prompt with the same beginning; what follows there is asked for once more.
            self.start_fetch(sequence)

    def _import(self, slot: int, start: int, match: Match) -> list[tuple[int, Node]]:
        """Put the store's blocks behind what the slot holds; how many tokens each gave."""
        if self.store is None or match.tokens <= start:
            return []
        gained: list[tuple[int, Node]] = []
        for run in _adjoining(self.store.read(match, start)):
            span = Span(start, min(match.tokens, run.end))
            if span.end - span.start > self.pool.free:
                break
            if not self._bring(slot, [(block, data) for block, data, _ in run.blocks], span):
                break
            self.pool.extend(slot, span.end - span.start)
            gained += [
                (min(block.end, span.end) - max(block.start, span.start), node)
                for block, _, node in run.blocks
            ]
            start = span.end
        return gained

    def _bring(self, slot: int, blocks: list[tuple[Span, bytes]], span: Span) -> bool:
        """Import; where no free run of cells is found, move cells together once."""
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
                return False
        return True


def _outcomes(fetch: Fetch) -> list[TierOutcome]:
    """What each tier was asked, as it is now: the prefetch thread may still be at the last one."""
    outcomes = [replace(each) for each in fetch.outcomes]
    if fetch.abandoned and not outcomes:
        outcomes.append(TierOutcome("all", "abandoned", detail="other prompts were asked for first"))
    elif fetch.abandoned and outcomes[-1].decision in ("nothing", "load"):
        outcomes[-1].decision = "abandoned"
    return outcomes


@dataclass(slots=True)
class _Run:
    """Blocks that adjoin, of which positions before `end` are wanted."""

    blocks: list[tuple[Span, bytes, Node]]
    end: int


def _adjoining(blocks: list[tuple[Span, bytes, Node]]) -> list[_Run]:
    """Blocks in runs: where a prompt's shared part ends within a block, the private part begins before that
    block's end."""
    runs: list[_Run] = []
    for each in blocks:
        span = each[0]
        if runs and runs[-1].blocks[-1][0].end == span.start:
            runs[-1].blocks.append(each)
            runs[-1].end = span.end
        else:
            if runs:
                runs[-1].end = span.start
            runs.append(_Run([each], span.end))
    return runs

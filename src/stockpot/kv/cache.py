"""The KV cache as the engine uses it: the store, the tiers behind it, their measurements and explanations.

    RAM (store, engine's thread)  <- adopt -  prefetch threads  <- read -  disk, Redis
                                  -  offer ->  a write-behind thread each   - write ->

Everything the engine calls returns at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stockpot.clock import Clock
from stockpot.kv.block import BlockId, ContentHash, Namespace, Scope, TokenKey
from stockpot.kv.departures import Departed, Departures
from stockpot.kv.eviction import make_policy
from stockpot.kv.explanation import Evidence, Explanations, Owner, Sightings
from stockpot.kv.invalidation import Invalidation, Invalidations
from stockpot.kv.meters import PrefillMeter, TierMeter
from stockpot.kv.prefetch import Fetch, Prefetcher, ReadReport, TierSlot
from stockpot.kv.prefix_tree import Match
from stockpot.kv.ram import RamTier
from stockpot.kv.residents import Eviction, StoreObservers
from stockpot.kv.store import KVStore, StoreLimits
from stockpot.kv.tier import Block, BlockHead, Tier
from stockpot.kv.write_behind import WriteBehind, WriteReport

_FIRST_SPEED = {"disk": (0.0005, 1e9), "redis": (0.002, 5e8)}
"""Latency in seconds and bytes a second, until they were measured."""


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """The cache's share of the settings (`settings.CacheSettings`). Quotas are bytes of RAM by tenant."""

    block_tokens: int = 256
    ram_bytes: int = 2**30
    policy: str = "lru"
    policy_ttl_s: float = 3600.0
    write_behind_bytes: int = 256 * 2**20
    quotas: dict[str, int] = field(default_factory=dict[str, int])
    explanations: int = 2048
    served_names: frozenset[str] = frozenset()


@dataclass(slots=True)
class CacheObservers:
    """Who is told of what happens, each quick and never raising: `evicted`, `reused`, `stored`, `removed`,
    `cleared` on the engine's thread; `read` and `written` on others, one call at a time."""

    evicted: Callable[[Eviction], None] = lambda _: None
    reused: Callable[[Sequence[float]], None] = lambda _: None
    stored: Callable[[Sequence[BlockHead]], None] = lambda _: None
    removed: Callable[[Sequence[BlockHead]], None] = lambda _: None
    cleared: Callable[[], None] = lambda: None
    read: Callable[[ReadReport], None] = lambda _: None
    written: Callable[[WriteReport], None] = lambda _: None


class KVCache:
    """One model's cache. `tiers` are those behind RAM, nearest first; it closes them."""

    def __init__(
        self,
        namespace: Namespace,
        limits: CacheLimits,
        *,
        clock: Clock,
        tiers: Sequence[Tier] = (),
        departures: Departures | None = None,
        invalidations: Invalidations | None = None,
        observers: CacheObservers | None = None,
    ) -> None:
        observers = observers or CacheObservers()
        self.limits = limits
        self.namespace = namespace
        self.prefill = PrefillMeter()
        # Empty ones are false: `or` would put others in their place.
        self.departures = Departures() if departures is None else departures
        self.invalidations = Invalidations() if invalidations is None else invalidations
        self.explanations = Explanations(limits.explanations)
        self.sightings = Sightings()
        self.slots = tuple(
            TierSlot(tier, TierMeter(*_FIRST_SPEED.get(tier.name, (0.001, 1e9)))) for tier in tiers
        )
        self.evidence = Evidence(
            self.departures, self.sightings, fingerprint=namespace.fingerprint, owner_of=self._owner_of
        )
        self._lock = threading.Lock()
        self._observers = observers
        self._writers = [
            WriteBehind(tier, limit_bytes=limits.write_behind_bytes, on_written=self._on_written)
            for tier in tiers
        ]
        self.store = KVStore(
            namespace,
            StoreLimits(limits.block_tokens, dict(limits.quotas), limits.served_names),
            ram=RamTier(limits.ram_bytes),
            policy=make_policy(limits.policy, clock, ttl_s=limits.policy_ttl_s),
            clock=clock,
            departures=self.departures,
            invalidations=self.invalidations,
            prefill=self.prefill,
            behind=self if tiers else None,
            observers=StoreObservers(
                evicted=observers.evicted,
                reused=observers.reused,
                stored=self._on_stored,
                removed=observers.removed,
                cleared=observers.cleared,
            ),
        )
        self._prefetcher: Prefetcher | None = None
        if tiers:
            self._prefetcher = Prefetcher(
                self.slots,
                block_tokens=limits.block_tokens,
                prefill=self.prefill,
                invalidations=self.invalidations,
                departures=self.departures,
                clock=clock,
                on_fetched=self._on_fetched,
                on_read=self._on_read,
            )

    def on_ready(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on another thread, whenever a fetch is done."""
        if self._prefetcher is not None:
            self._prefetcher.on_ready(wake)

    def fetch(self, request: str, scope: Scope, key: TokenKey, match: Match) -> Fetch | None:
        """Ask the tiers behind RAM for what follows `match`; None where there are none, RAM has all, or
        asking is not worth it."""
        if self._prefetcher is None:
            return None
        first = self.store.first_missing(scope, key)
        if first is None:
            return None
        return self._prefetcher.fetch(request, scope, key, tokens=match.tokens, first=first)

    def offer(self, blocks: Sequence[Block]) -> None:
        """New blocks, or such whose promise was renewed: to every tier behind RAM."""
        for writer in self._writers:
            writer.offer(blocks)

    def forget(self, blocks: Sequence[BlockId]) -> None:
        """Drop blocks from every tier behind RAM."""
        for writer in self._writers:
            writer.forget(blocks)

    def drop_behind(self, records: Sequence[Invalidation]) -> None:
        """Drop what the records match from tiers that can enumerate. On a thread that may wait."""
        names = self.limits.served_names
        for slot in self.slots:
            slot.tier.drop_where(
                lambda head: any(record.matches(head, served_names=names) for record in records),
                "invalidated",
            )

    @property
    def queued_bytes(self) -> int:
        """What waits to be written behind RAM, in all queues (a block waits once for each tier)."""
        return sum(writer.queued_bytes for writer in self._writers)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything offered is written; False where that takes longer."""
        written = [writer.flush(timeout_s) for writer in self._writers]
        return all(written)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, for so long at most, and close the tiers. Idempotent."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        for writer in self._writers:
            writer.close(timeout_s)
        self._writers = []
        for slot in self.slots:
            slot.tier.close()

    def tier_departed(self, tier: str, blocks: Sequence[BlockId], cause: str, at_s: float) -> None:
        """A tier behind RAM let blocks go by its own decision. On its thread."""
        for block in blocks:
            if self.departures.find(block) is None:
                self.departures.add(block, Departed(tier, cause, at_s, f"the {tier} tier was full"))

    def _on_stored(self, heads: Sequence[BlockHead]) -> None:
        for head in heads:
            self.sightings.add(head.content, head.tenant)
        self._observers.stored(heads)

    def _on_fetched(self, tier: str, blocks: Sequence[Block]) -> None:
        """What a tier further behind had, the nearer ones may keep."""
        for writer in self._writers:
            if writer.tier.name == tier:
                return
            writer.offer(blocks)

    def _on_read(self, report: ReadReport) -> None:
        with self._lock:
            self._observers.read(report)

    def _on_written(self, report: WriteReport) -> None:
        with self._lock:
            self._observers.written(report)

    def _owner_of(self, content: ContentHash) -> Owner | None:
        for slot in self.slots:
            found = slot.tier.other_owner(content)
            if found is not None:
                return Owner(*found)
        return None

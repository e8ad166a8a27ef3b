"""The KV store: blocks behind the context, one decision about what is kept in RAM.

What is in RAM is in `kv.residents`; here is what prompts find of it. What is new is offered to the tiers
behind (`Behind`), which write it in their own time; what they hold comes back through `adopt`. Used by the
engine's thread alone; nothing here waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stockpot.clock import Clock
from stockpot.engine.driver import Span
from stockpot.events import CacheTier
from stockpot.kv.block import (
    NO_TOKENS,
    TOKEN_BYTES,
    BlockId,
    Namespace,
    Scope,
    Segment,
    TokenKey,
    block_id,
    content_hash,
    scope_of,
)
from stockpot.kv.departures import Departures
from stockpot.kv.eviction import EvictionPolicy
from stockpot.kv.invalidation import Invalidation, Invalidations
from stockpot.kv.meters import PrefillMeter
from stockpot.kv.prefetch import invalidated_since
from stockpot.kv.prefix_tree import Match, Node
from stockpot.kv.promises import Labels, PromiseBook, holds
from stockpot.kv.ram import RamTier
from stockpot.kv.residents import Residents, StoreObservers
from stockpot.kv.tier import Block, BlockHead

FEW_RECORDS = 16


@dataclass(frozen=True, slots=True)
class Pin:
    """Holds what was matched in the store until it is given back."""

    match: Match


class Behind(Protocol):
    """The tiers behind RAM, as the store sees them. Never waits."""

    def offer(self, blocks: Sequence[Block]) -> None:
        """Write these in your own time, or refresh the promise of those that are there."""
        ...

    def forget(self, blocks: Sequence[BlockId]) -> None:
        """Drop these in your own time."""
        ...


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """`quotas` are bytes of RAM by tenant; tenants that are not named have none. `served_names` are the names
    of the model by which somebody may invalidate its blocks."""

    block_tokens: int
    quotas: dict[str, int] = field(default_factory=dict[str, int])
    served_names: frozenset[str] = frozenset()


class KVStore:
    """Keeps the KV of prefixes that no running request holds."""

    def __init__(
        self,
        namespace: Namespace,
        limits: StoreLimits,
        *,
        ram: RamTier,
        policy: EvictionPolicy,
        clock: Clock,
        departures: Departures | None = None,
        invalidations: Invalidations | None = None,
        prefill: PrefillMeter | None = None,
        behind: Behind | None = None,
        observers: StoreObservers | None = None,
    ) -> None:
        self.block_tokens = limits.block_tokens
        self.ram = ram
        # Empty ones are false: `or` would put others in their place.
        self.departures = Departures() if departures is None else departures
        self._namespace = namespace
        self._served_names = limits.served_names
        self._clock = clock
        self._invalidations = Invalidations() if invalidations is None else invalidations
        self._behind = behind
        self._observers = observers or StoreObservers()
        self._residents = Residents(
            limits.block_tokens,
            ram=ram,
            policy=policy,
            quotas=limits.quotas,
            clock=clock,
            departures=self.departures,
            prefill=prefill or PrefillMeter(),
            observers=self._observers,
        )
        self._tree = self._residents.tree

    @property
    def evicted(self) -> Counter[str]:
        """Blocks that left RAM, by cause."""
        return self._residents.evicted

    @property
    def tenant_bytes(self) -> Counter[str]:
        """Bytes in RAM by tenant; "" is what belongs to nobody."""
        return self._residents.tenant_bytes

    @property
    def promises(self) -> PromiseBook:
        """What is promised, and how much."""
        return self._residents.promises

    def scope(self, tenant: str, shared: TokenKey = NO_TOKENS) -> Scope:
        """The scope of a tenant's prompt that begins with the tokens of `shared`, declared shared."""
        return scope_of(self._namespace, tenant, shared=shared, block_tokens=self.block_tokens)

    def match(self, scope: Scope, key: TokenKey) -> Match:
        """The longest prefix of `key` that is in RAM, to the exact token."""
        return self._tree.match(scope.segments(key))

    def first_missing(self, scope: Scope, key: TokenKey) -> BlockId | None:
        """The first block of a prompt that is not in RAM, by the id it has when it holds all it can."""
        for segment in scope.segments(key):
            node, at = self._tree.walk(segment)
            if at < len(segment.key):
                return block_id(node.id, TokenKey(segment.key[at : at + self._block_bytes]))
        return None

    def departure(self, scope: Scope, key: TokenKey, match: Match) -> Node | None:
        """The block where a prompt departs from what is in RAM, None where nothing goes on there."""
        return self._tree.departure(scope.segments(key), match)

    def hold(self, match: Match) -> Pin | None:
        """Keep what was matched until `unpin`; it is not used yet, or not anew."""
        if not match.nodes:
            return None
        self._tree.pin(match)
        return Pin(match)

    def pin(self, match: Match) -> Pin | None:
        """Keep what was matched until `unpin`, and mark it as used now."""
        if not match.nodes:
            return None
        now_s = self._clock.wall()
        self._observers.reused([max(0.0, now_s - node.used_s) for node in match.nodes])
        for node in match.nodes:
            node.used_before_s, node.used_s = node.used_s, now_s
            node.hits += 1
        self._residents.policy.hit([node.id for node in reversed(match.nodes)])
        return self.hold(match)

    def unpin(self, pin: Pin | None) -> None:
        """Give a pin back."""
        if pin is not None:
            self._tree.unpin(pin.match)

    def read(self, match: Match, start: int) -> list[tuple[Span, bytes, Node]]:
        """The blocks of a match that hold positions from `start` on, ascending. Shorter than the match
        where a block has left since."""
        found: list[tuple[Span, bytes, Node]] = []
        for node in match.nodes:
            if node.end <= start:
                continue
            data = self.ram.get(node.id)
            if data is None:
                break
            found.append((Span(node.start, node.end), data, node))
        return found

    def missing(self, scope: Scope, key: TokenKey) -> list[Span]:
        """The blocks that must be exported so that all of `key` is kept, as token spans, ascending."""
        spans: list[Span] = []
        for segment in scope.segments(key):
            node, at = self._tree.walk(segment)
            rest = TokenKey(segment.key[at : at + self._block_bytes])
            if rest and self._tree.covers(node, rest):
                continue
            first, end = segment.start + at // TOKEN_BYTES, segment.start + len(segment.key) // TOKEN_BYTES
            spans.extend(
                Span(start, min(start + self.block_tokens, end))
                for start in range(first, end, self.block_tokens)
            )
        return spans

    def write(self, scope: Scope, key: TokenKey, blocks: Sequence[tuple[Span, bytes]], labels: Labels) -> int:
        """Keep exported blocks (those `missing` named, or the first of them). The blocks kept: fewer than
        given where nothing older may go, or where what they continue went to make room."""
        kept: list[Block] = []
        for span, data in blocks:
            segment = _segment_at(scope.segments(key), span)
            parent, at = self._tree.walk(segment)
            if parent.end < span.start and kept:
                break  # what it continues had to go for blocks of this very prompt: RAM is that small
            if parent.end != span.start:
                raise ValueError(
                    f"the block at {span.start} does not continue what is kept up to {parent.end}"
                )
            tokens = TokenKey(segment.key[at : at + (span.end - span.start) * TOKEN_BYTES])
            block = Block(self._head(segment, parent, tokens, labels), data)
            if self._invalidations.stale(block.head, key, foreign=False) is not None:
                self._residents.count([], "refused_invalidated", blocks=1, size_bytes=len(data))
                break
            if not self._residents.insert(parent, block, labels.request):
                break
            kept.append(block)
        if kept and self._behind is not None:
            self._behind.offer(kept)
        return len(kept)

    def adopt(
        self, scope: Scope, key: TokenKey, blocks: Iterable[tuple[CacheTier, Block]], request: str
    ) -> list[BlockId]:
        """Take blocks that tiers behind RAM gave for this prompt, or for a longer one that begins as it does,
        verified, ascending; the ids taken."""
        taken: list[BlockId] = []
        segments = scope.segments(key)
        for tier, block in blocks:
            head = block.head
            begun = [each for each in segments if each.start <= head.start]
            segment = begun[-1] if begun else None
            if segment is None or len(segment.before + segment.key) <= head.start * TOKEN_BYTES:
                break
            # Invalidated since it was read: RAM was rid of it then, and must not get it back.
            if invalidated_since(self._invalidations, head, key, tier) is not None:
                break
            parent, _ = self._tree.walk(segment)
            if parent.end > head.start or head.id in self._tree:
                continue  # computed or fetched by somebody else meanwhile
            if parent.id != head.parent or self._tree.covers(parent, head.tokens):
                break
            if not self._residents.insert(parent, block, request):
                break
            taken.append(head.id)
        return taken

    def label(self, match: Match, labels: Labels) -> None:
        """Mark what stands before the boundaries of a request: it is kept at least as long as they say, from
        now, and carries their tags. Tiers behind are told, so that they keep and find it as well."""
        if not labels.promises:
            return
        now_s = self._clock.wall()
        for node in match.nodes:
            until_s = labels.kept_until_s(node.start, now_s)
            if not holds(node.kept_until_s, now_s):
                node.kept_until_s = 0.0
            kept = until_s > node.kept_until_s and self.promises.make(node, until_s, now_s)
            head = labels.relabelled(node.head, until_s if kept else 0.0)
            retagged = head.tags != node.head.tags
            if not kept and not retagged:
                continue
            node.head = head
            data = self.ram.get(node.id)
            if data is None:
                continue
            block = Block(head, data)
            self.ram.replace(block)
            if self._behind is not None:
                if retagged:  # there it has its old tags: it must be written anew
                    self._behind.forget([node.id])
                self._behind.offer([block])

    def clear(self, cause: str = "cleared", detail: str = "") -> int:
        """Drop every block that is not pinned; how many."""
        dropped = self._residents.drop([node for node in self._tree.nodes() if not node.pins], cause, detail)
        if not self._tree:
            self._observers.cleared()
        return dropped

    def invalidate(self, records: Sequence[Invalidation]) -> int:
        """Drop every block a record matches, pinned or not; how many. What requests have in the context stays
        there until they end, and is not kept then."""
        prefixes = any(record.kind == "prefix" for record in records)
        unwanted: list[Node] = []
        causes: dict[BlockId, Invalidation] = {}
        for node in self._tree.nodes():
            record = self._unwanted(node, node.prompt() if prefixes else None, records)
            if record is not None:
                unwanted.append(node)
                causes[node.id] = record
        ids = [node.id for node in unwanted]
        dropped = 0
        for record in dict.fromkeys(causes.values()):
            of_record = [node for node in unwanted if causes[node.id] is record]
            dropped += self._residents.drop(of_record, "invalidated", _told(record), subtree=True)
            if record.kind != "prefix":
                continue
            # What leads to an invalidated prefix and to nothing else has no use any more.
            for parent in [node.parent for node in of_record if node.parent is not None]:
                lone = [node for node in parent.path() if not node.pins]
                ids += [node.id for node in lone if not node.children]
                dropped += self._residents.drop(lone, "invalidated", _told(record))
        if self._behind is not None and ids:
            self._behind.forget(ids)
        if any(record.kind == "all" for record in records):
            self._observers.cleared()
        return dropped

    def _unwanted(
        self, node: Node, prompt: TokenKey | None, records: Sequence[Invalidation]
    ) -> Invalidation | None:
        """The record that a block must go for. Many records at once (after an absence) are looked up by what
        the block is, not gone through."""
        if len(records) > FEW_RECORDS:
            return self._invalidations.stale(node.head, prompt)
        names = self._served_names
        return next((each for each in records if each.matches(node.head, prompt, served_names=names)), None)

    def expire(self) -> int:
        """Drop what the policy says is too old; how many."""
        return self._residents.expire()

    def resize(self, capacity_bytes: int) -> None:
        """Change what RAM may take; evicts down to it. Under pressure promises do not hold: what they kept is
        in the tiers behind, where there are any."""
        self._residents.resize(capacity_bytes)

    @property
    def blocks(self) -> int:
        return len(self._tree)

    @property
    def pinned_blocks(self) -> int:
        return self._tree.pinned()

    def nodes(self) -> list[Node]:
        """Every block in RAM."""
        return list(self._tree.nodes())

    def check_integrity(self) -> None:
        """Raise AssertionError where tree, tier and counts disagree or break their own invariants."""
        self._residents.check_integrity()

    @property
    def _block_bytes(self) -> int:
        return self.block_tokens * TOKEN_BYTES

    def _head(self, segment: Segment, parent: Node, tokens: TokenKey, labels: Labels) -> BlockHead:
        now_s = self._clock.wall()
        prompt = TokenKey(parent.prompt() + tokens)
        shared = segment.before == b"" and labels.shared_tokens > parent.end
        return BlockHead(
            id=block_id(parent.id, tokens),
            parent=parent.id,
            start=parent.end,
            tokens=tokens,
            content=content_hash(prompt),
            fingerprint=self._namespace.fingerprint,
            layout=self._namespace.layout,
            tenant="" if shared else labels.tenant,
            tags=labels.tags(parent.end),
            epoch=labels.epoch,
            created_s=now_s,
            kept_until_s=labels.kept_until_s(parent.end, now_s),
        )


def _segment_at(segments: Sequence[Segment], span: Span) -> Segment:
    """The segment that holds a span. Raises ValueError where none holds all of it."""
    for segment in segments:
        if segment.start <= span.start and span.end <= segment.start + len(segment.key) // TOKEN_BYTES:
            return segment
    raise ValueError(f"[{span.start}, {span.end}) lies in no segment of the prompt")


def _told(record: Invalidation) -> str:
    """A record in words: what, by whom, why."""
    what = (
        f"a prefix of {record.tokens} tokens" if record.kind == "prefix" else f"{record.kind} {record.value}"
    )
    by = f" by {record.by}" if record.by else ""
    return f"{what.strip()}{by}" + (f": {record.reason}" if record.reason else "")

"""The KV store: blocks behind the context, one decision about what is kept in RAM.

The store joins the index (prefix tree), the bytes (RAM tier) and the order of eviction (policy): a node is in
the tree exactly while its bytes are in RAM. What is new is offered to the tiers behind (`Behind`), which
write it in their own time; what they hold comes back through `adopt`. Used by the engine's thread alone;
nothing here waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from stockpot.kv.departures import Departed, Departures
from stockpot.kv.eviction import Candidate, EvictionPolicy
from stockpot.kv.invalidation import Invalidation, Invalidations
from stockpot.kv.meters import PrefillMeter
from stockpot.kv.prefetch import invalidated_since
from stockpot.kv.prefix_tree import Match, Node, PrefixTree
from stockpot.kv.promises import Labels, PromiseBook
from stockpot.kv.ram import RamTier
from stockpot.kv.tier import Block, BlockHead


@dataclass(frozen=True, slots=True)
class Pin:
    """Holds what was matched in the store until it is given back."""

    match: Match


@dataclass(frozen=True, slots=True)
class Eviction:
    """Blocks that left RAM, or never came to it. Causes: `capacity`, `quota`, `pressure`, `expired`,
    `invalidated`, `cleared`; `refused_pinned`, `refused_quota`: a new block found nothing that may go.
    `ages_s` and `idle_s`: seconds since each block came, and since it was used."""

    blocks: int
    size_bytes: int
    cause: str
    ages_s: tuple[float, ...] = ()
    idle_s: tuple[float, ...] = ()


class Behind(Protocol):
    """The tiers behind RAM, as the store sees them. Never waits."""

    def offer(self, blocks: Sequence[Block]) -> None:
        """Write these in your own time, or refresh the promise of those that are there."""
        ...

    def forget(self, blocks: Sequence[BlockId]) -> None:
        """Drop these in your own time."""
        ...


@dataclass(slots=True)
class StoreObservers:
    """Who is told of what, on the engine's thread: quick, and never raising."""

    evicted: Callable[[Eviction], None] = lambda _: None
    reused: Callable[[Sequence[float]], None] = lambda _: None
    """Seconds since each block was used before."""
    stored: Callable[[Sequence[BlockHead]], None] = lambda _: None
    removed: Callable[[Sequence[BlockHead]], None] = lambda _: None
    cleared: Callable[[], None] = lambda: None
    """Everything was dropped on purpose, and nothing is left."""


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
        self.evicted: Counter[str] = Counter()
        # Empty ones are false: `or` would put others in their place.
        self.departures = Departures() if departures is None else departures
        self.tenant_bytes: Counter[str] = Counter()
        self.promises = PromiseBook(lambda: ram.capacity_bytes // 2)
        self._namespace = namespace
        self._quotas = limits.quotas
        self._served_names = limits.served_names
        self._policy = policy
        self._clock = clock
        self._invalidations = Invalidations() if invalidations is None else invalidations
        self._prefill = prefill or PrefillMeter()
        self._behind = behind
        self._observers = observers or StoreObservers()
        self._tree = PrefixTree(limits.block_tokens)

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

    def pin(self, match: Match) -> Pin | None:
        """Keep what was matched until `unpin`, and mark it as used now."""
        if not match.nodes:
            return None
        now_s = self._clock.wall()
        self._observers.reused([max(0.0, now_s - node.used_s) for node in match.nodes])
        for node in match.nodes:
            node.used_s = now_s
            node.hits += 1
        self._policy.hit([node.id for node in reversed(match.nodes)])
        self._tree.pin(match)
        return Pin(match)

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
        given where nothing older may go."""
        kept: list[Block] = []
        for span, data in blocks:
            segment = _segment_at(scope.segments(key), span)
            parent, at = self._tree.walk(segment)
            if parent.end != span.start:
                raise ValueError(
                    f"the block at {span.start} does not continue what is kept up to {parent.end}"
                )
            tokens = TokenKey(segment.key[at : at + (span.end - span.start) * TOKEN_BYTES])
            block = Block(self._head(segment, parent, tokens, labels), data)
            if self._invalidations.stale(block.head, key, foreign=False) is not None:
                self._count([], "refused_invalidated", blocks=1, size_bytes=len(data))
                break
            if not self._insert(parent, block, labels.request):
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
            if not self._insert(parent, block, request):
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
        dropped = self._drop_all([node for node in self._tree.nodes() if not node.pins], cause, detail)
        if not self._tree:
            self._observers.cleared()
        return dropped

    def invalidate(self, record: Invalidation) -> int:
        """Drop every block the record matches, pinned or not; how many. What requests have in the context
        stays there until they end, and is not kept then."""
        names = self._served_names
        unwanted = [
            node
            for node in self._tree.nodes()
            if record.matches(node.head, node.prompt(), served_names=names)
        ]
        ids = [node.id for node in unwanted]
        detail = f"{record.kind} {record.value}".strip() + (f" by {record.by}" if record.by else "")
        parents = [node.parent for node in unwanted if node.parent is not None]
        dropped = self._drop_all(unwanted, "invalidated", detail, subtree=True)
        # What leads to an invalidated prefix and to nothing else has no use any more.
        for parent in parents if record.kind == "prefix" else []:
            lone = [node for node in parent.path() if not node.pins]
            ids += [node.id for node in lone if not node.children]
            dropped += self._drop_all(lone, "invalidated", detail)
        if self._behind is not None and ids:
            self._behind.forget(ids)
        if record.kind == "all":
            self._observers.cleared()
        return dropped

    def expire(self) -> int:
        """Drop what the policy says is too old; how many."""
        nodes = (self._tree.get(block) for block in list(self._policy.expired(self._clock.monotonic())))
        return self._drop_all([n for n in nodes if n is not None and self._may_go(n)], "expired", "")

    def resize(self, capacity_bytes: int) -> None:
        """Change what RAM may take; evicts down to it. Under pressure promises do not hold: what they kept is
        in the tiers behind, where there are any."""
        self.ram.capacity_bytes = capacity_bytes
        for hard in (False, True):
            self._evict_until(
                lambda: self.ram.used_bytes <= capacity_bytes, "pressure", "memory ran short", hard=hard
            )

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
        self._tree.check_integrity()
        self.ram.check_integrity()
        by_tenant: Counter[str] = Counter()
        for node in self._tree.nodes():
            if node.id not in self.ram:
                raise AssertionError(f"the block at {node.start} is listed and not in RAM")
            by_tenant[node.head.tenant] += node.size_bytes
        if len(self.ram) != len(self._tree):
            raise AssertionError(f"RAM holds {len(self.ram)} blocks, {len(self._tree)} are listed")
        if by_tenant != +self.tenant_bytes:
            raise AssertionError(f"tenants hold {by_tenant}, counted are {self.tenant_bytes}")

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

    def _insert(self, parent: Node, block: Block, request: str) -> bool:
        """Put a block into tree, tier and policy; False where nothing that stands in its way may go."""
        head, size_bytes = block.head, len(block.data)
        node = Node(head, None, size_bytes=size_bytes, request=request, used_s=self._clock.wall())
        path = Match(tuple(parent.path()), parent.end)
        self._tree.pin(path)  # making room must not take what the block stands on
        has_room = size_bytes <= self.ram.capacity_bytes and self._make_room(size_bytes, head.tenant)
        self._tree.unpin(path)
        if not has_room:
            return False
        replaced = self._tree.insert(parent, node)
        self._drop_bytes(replaced)
        self.ram.write([block])
        self.tenant_bytes[head.tenant] += size_bytes
        self._policy.admit(
            Candidate(head.id, size_bytes, self._prefill.prefill_s(node.end - node.start), head.parent)
        )
        self._policy.hit([each.id for each in node.path()])
        if head.kept_until_s:
            self.promises.make(node, head.kept_until_s, self._clock.wall())
        self.departures.forget(head.id)
        self._observers.stored([head])
        return True

    def _make_room(self, size_bytes: int, tenant: str) -> bool:
        """Evict until so much more of a tenant fits; False, and counted, where nothing that is left may
        go."""
        quota = self._quotas.get(tenant)
        wanted = f"{size_bytes:,} bytes were needed"
        if quota is not None and not self._evict_until(
            lambda: self.tenant_bytes[tenant] + size_bytes <= quota, "quota", wanted, tenant=tenant
        ):
            self._count([], "refused_quota", blocks=1, size_bytes=size_bytes)
            return False
        fits = self._evict_until(
            lambda: self.ram.used_bytes + size_bytes <= self.ram.capacity_bytes, "capacity", wanted
        )
        if not fits:
            self._count([], "refused_pinned", blocks=1, size_bytes=size_bytes)
        return fits

    def _evict_until(
        self,
        fits: Callable[[], bool],
        cause: str,
        detail: str,
        *,
        tenant: str | None = None,
        hard: bool = False,
    ) -> bool:
        """Evict, of one tenant or of all, until `fits`; `hard`: promises do not hold."""
        gone: list[Node] = []
        while not fits():
            node = self._victim(tenant, hard=hard)
            if node is None:
                break
            self._remove(node)
            gone.append(node)
        self._count(gone, cause, detail=detail)
        return fits()

    def _victim(self, tenant: str | None, *, hard: bool) -> Node | None:
        for block in self._policy.victims():
            node = self._tree.get(block)
            if node is None or (tenant is not None and node.head.tenant != tenant):
                continue
            if self._may_go(node, hard=hard):
                return node
        return None

    def _may_go(self, node: Node, *, hard: bool = False) -> bool:
        if node.children or node.pins:
            return False
        return hard or node.kept_until_s <= self._clock.wall()

    def _drop_all(self, nodes: Sequence[Node], cause: str, detail: str, *, subtree: bool = False) -> int:
        """Drop nodes, deepest first; with `subtree` all that stands on them too, else only what nothing
        stands on."""
        gone: list[Node] = []
        for start in nodes:
            for node in list(start.subtree()) if subtree else [start]:
                if node.id in self._tree and self._tree.get(node.id) is node:
                    gone.append(node)
        gone = list({node.id: node for node in sorted(gone, key=lambda node: -node.start)}.values())
        dropped: list[Node] = []
        for node in gone:
            if not node.children:
                self._remove(node)
                dropped.append(node)
        self._count(dropped, cause, detail=detail)
        return len(dropped)

    def _remove(self, node: Node) -> None:
        self._tree.remove(node)
        self._drop_bytes([node])

    def _drop_bytes(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.ram.drop([node.id])
            self._policy.drop(node.id)
            self.promises.forget(node)
            self.tenant_bytes[node.head.tenant] -= node.size_bytes
        if nodes:
            self._observers.removed([node.head for node in nodes])

    def _count(
        self, nodes: Sequence[Node], cause: str, *, blocks: int = 0, size_bytes: int = 0, detail: str = ""
    ) -> None:
        blocks += len(nodes)
        if not blocks:
            return
        now_s = self._clock.wall()
        for node in nodes:
            gone = Departed("ram", cause, now_s, detail, node.request, node.key)
            self.departures.add(node.id, gone, parent=node.head.parent)
        self.evicted[cause] += blocks
        self._observers.evicted(
            Eviction(
                blocks,
                size_bytes + sum(node.size_bytes for node in nodes),
                cause,
                tuple(max(0.0, now_s - node.head.created_s) for node in nodes),
                tuple(max(0.0, now_s - node.used_s) for node in nodes),
            )
        )


def _segment_at(segments: Sequence[Segment], span: Span) -> Segment:
    """The segment that holds a span. Raises ValueError where none holds all of it."""
    for segment in segments:
        if segment.start <= span.start and span.end <= segment.start + len(segment.key) // TOKEN_BYTES:
            return segment
    raise ValueError(f"[{span.start}, {span.end}) lies in no segment of the prompt")

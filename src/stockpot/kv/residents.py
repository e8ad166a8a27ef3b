"""What is in RAM: index, bytes and order of eviction, kept true to each other.

A node is in the tree exactly while its bytes are in the tier and the policy ranks it. Who may not go: pinned
blocks, blocks under a promise, blocks that others stand on. Used by the engine's thread alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stockpot.clock import Clock
from stockpot.kv.block import BlockId
from stockpot.kv.departures import Departed, Departures
from stockpot.kv.eviction import Candidate, EvictionPolicy
from stockpot.kv.meters import PrefillMeter
from stockpot.kv.prefix_tree import Match, Node, PrefixTree
from stockpot.kv.promises import PromiseBook, holds
from stockpot.kv.ram import RamTier
from stockpot.kv.tier import Block, BlockHead


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


class Residents:
    """The blocks in RAM. `quotas` are bytes by tenant; tenants that are not named have none."""

    def __init__(
        self,
        block_tokens: int,
        *,
        ram: RamTier,
        policy: EvictionPolicy,
        quotas: Mapping[str, int],
        clock: Clock,
        departures: Departures,
        prefill: PrefillMeter,
        observers: StoreObservers,
    ) -> None:
        self.ram = ram
        self.tree = PrefixTree(block_tokens)
        self.policy = policy
        self.promises = PromiseBook(lambda: ram.capacity_bytes // 2)
        self.evicted: Counter[str] = Counter()
        self.tenant_bytes: Counter[str] = Counter()
        self._quotas = quotas
        self._clock = clock
        self._departures = departures
        self._prefill = prefill
        self._observers = observers

    def insert(self, parent: Node, block: Block, request: str) -> bool:
        """Put a block into tree, tier and policy; False where nothing that stands in its way may go."""
        head, size_bytes = block.head, len(block.data)
        node = Node(head, None, size_bytes=size_bytes, request=request, used_s=self._clock.wall())
        path = Match(tuple(parent.path()), parent.end)
        self.tree.pin(path)  # making room must not take what the block stands on
        has_room = size_bytes <= self.ram.capacity_bytes and self._make_room(size_bytes, head.tenant)
        self.tree.unpin(path)
        if not has_room:
            return False
        replaced = self.tree.insert(parent, node)
        self._drop_bytes(replaced)
        self.ram.write([block])
        self.tenant_bytes[head.tenant] += size_bytes
        self.policy.admit(
            Candidate(head.id, size_bytes, self._prefill.prefill_s(node.end - node.start), head.parent)
        )
        if head.kept_until_s:
            self.promises.make(node, head.kept_until_s, self._clock.wall())
        self._departures.forget(head.id)
        self._observers.stored([head])
        return True

    def expire(self) -> int:
        """Drop what the policy says is too old; how many."""
        nodes = (self.tree.get(block) for block in list(self.policy.expired(self._clock.monotonic())))
        # Children are named before their parents: that these have children now says nothing.
        return self.drop([n for n in nodes if n is not None and not self._is_held(n)], "expired", "")

    def resize(self, capacity_bytes: int) -> None:
        """Change what RAM may take; evicts down to it, promised blocks last."""
        self.ram.capacity_bytes = capacity_bytes
        for hard in (False, True):
            self._evict_until(
                lambda: self.ram.used_bytes <= capacity_bytes, "pressure", "memory ran short", hard=hard
            )

    def check_integrity(self) -> None:
        """Raise AssertionError where tree, tier, policy and counts disagree or break their own invariants."""
        self.tree.check_integrity()
        self.ram.check_integrity()
        self.policy.check_integrity()
        by_tenant: Counter[str] = Counter()
        for node in self.tree.nodes():
            if node.id not in self.ram:
                raise AssertionError(f"the block at {node.start} is listed and not in RAM")
            by_tenant[node.head.tenant] += node.size_bytes
        if len(self.ram) != len(self.tree):
            raise AssertionError(f"RAM holds {len(self.ram)} blocks, {len(self.tree)} are listed")
        if by_tenant != +self.tenant_bytes:
            raise AssertionError(f"tenants hold {by_tenant}, counted are {self.tenant_bytes}")

    def _make_room(self, size_bytes: int, tenant: str) -> bool:
        """Evict until so much more of a tenant fits; False, and counted, where nothing that is left may
        go."""
        quota = self._quotas.get(tenant)
        wanted = f"{size_bytes:,} bytes were needed"
        if quota is not None and not self._evict_until(
            lambda: self.tenant_bytes[tenant] + size_bytes <= quota, "quota", wanted, tenant=tenant
        ):
            self.count([], "refused_quota", blocks=1, size_bytes=size_bytes)
            return False
        fits = self._evict_until(
            lambda: self.ram.used_bytes + size_bytes <= self.ram.capacity_bytes, "capacity", wanted
        )
        if not fits:
            self.count([], "refused_pinned", blocks=1, size_bytes=size_bytes)
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
        self.count(gone, cause, detail=detail)
        return fits()

    def _victim(self, tenant: str | None, *, hard: bool) -> Node | None:
        def may_go(block: BlockId) -> bool:
            node = self.tree.get(block)
            if node is None or (tenant is not None and node.head.tenant != tenant):
                return False
            return not self._is_held(node, hard=hard)

        block = next(self.policy.victims(may_go), None)
        return self.tree.get(block) if block is not None else None

    def _is_held(self, node: Node, *, hard: bool = False) -> bool:
        """Whether a pin or a promise keeps a block; `hard`: promises do not."""
        return bool(node.pins) or (not hard and holds(node.kept_until_s, self._clock.wall()))

    def drop(self, nodes: Sequence[Node], cause: str, detail: str, *, subtree: bool = False) -> int:
        """Drop nodes, deepest first; with `subtree` all that stands on them too, else only what nothing
        stands on."""
        gone: list[Node] = []
        for start in nodes:
            for node in list(start.subtree()) if subtree else [start]:
                if node.id in self.tree and self.tree.get(node.id) is node:
                    gone.append(node)
        gone = list({node.id: node for node in sorted(gone, key=lambda node: -node.start)}.values())
        dropped: list[Node] = []
        for node in gone:
            if not node.children:
                self._remove(node)
                dropped.append(node)
        self.count(dropped, cause, detail=detail)
        return len(dropped)

    def _remove(self, node: Node) -> None:
        self.tree.remove(node)
        self._drop_bytes([node])

    def _drop_bytes(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.ram.drop([node.id])
            self.policy.drop(node.id)
            self.promises.forget(node)
            self.tenant_bytes[node.head.tenant] -= node.size_bytes
        if nodes:
            self._observers.removed([node.head for node in nodes])

    def count(
        self, nodes: Sequence[Node], cause: str, *, blocks: int = 0, size_bytes: int = 0, detail: str = ""
    ) -> None:
        blocks += len(nodes)
        if not blocks:
            return
        now_s = self._clock.wall()
        for node in nodes:
            gone = Departed("ram", cause, now_s, detail, node.request, node.key)
            self._departures.add(node.id, gone, parent=node.head.parent)
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

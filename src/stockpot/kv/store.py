"""The KV store: blocks behind the context, one decision about what is kept.

The store joins the index (prefix tree) with the tiers that hold the bytes. Today there is one tier, RAM; a
node is in the tree exactly while its bytes are in the tier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stockpot.engine.driver import Span
from stockpot.kv.block import TOKEN_BYTES, BlockId, TokenKey
from stockpot.kv.prefix_tree import Match, Node, PrefixTree
from stockpot.kv.ram import RamTier


@dataclass(frozen=True, slots=True)
class Pin:
    """Holds the path to a block in the store until it is given back."""

    node: Node


class KVStore:
    """Keeps the KV of prefixes that no running request holds. Used by the engine's thread alone.

    `on_eviction(blocks, size_bytes, cause)` is told of blocks that leave.
    """

    def __init__(
        self,
        root: BlockId,
        *,
        block_tokens: int,
        ram: RamTier,
        on_eviction: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.block_tokens = block_tokens
        self.ram = ram
        self.evicted: Counter[str] = Counter()
        self._tree = PrefixTree(root, block_tokens)
        self._on_eviction = on_eviction

    def match(self, key: TokenKey) -> Match:
        """The longest prefix of `key` that is kept, to the exact token."""
        return self._tree.match(key)

    def pin(self, match: Match) -> Pin | None:
        """Keep what was matched until `unpin`, and mark it as used now."""
        if not match.nodes:
            return None
        self._tree.pin(match.nodes[-1])
        return Pin(match.nodes[-1])

    def unpin(self, pin: Pin | None) -> None:
        """Give a pin back."""
        if pin is not None:
            self._tree.unpin(pin.node)

    def read(self, match: Match, start: int) -> list[tuple[Span, bytes]]:
        """The blocks of a match that hold positions from `start` on, ascending. Shorter than the match
        where a tier no longer has a block."""
        found: list[tuple[Span, bytes]] = []
        for node in match.nodes:
            if node.end <= start:
                continue
            data = self.ram.get(node.id)
            if data is None:
                break
            found.append((Span(node.start, node.end), data))
        return found

    def missing(self, key: TokenKey) -> list[Span]:
        """The blocks that must be exported so that all of `key` is kept, as token spans, ascending."""
        node, at = self._tree.walk(key)
        if at < len(key) and self._tree.covers(node, TokenKey(key[at : at + self._block_bytes])):
            return []
        starts = range(at, len(key), self._block_bytes)
        return [
            Span(start // TOKEN_BYTES, min(start + self._block_bytes, len(key)) // TOKEN_BYTES)
            for start in starts
        ]

    def write(self, key: TokenKey, blocks: Sequence[tuple[Span, bytes]]) -> int:
        """Keep exported blocks (those `missing` named, or the first of them). The blocks kept: fewer than
        given where everything older is pinned."""
        if not blocks:
            return 0
        parent, at = self._tree.walk(key)
        kept = 0
        for span, data in blocks:
            block_key = TokenKey(key[span.start * TOKEN_BYTES : span.end * TOKEN_BYTES])
            if span.start * TOKEN_BYTES != at:
                raise ValueError(
                    f"the block at {span.start} does not continue what is kept up to {at // TOKEN_BYTES}"
                )
            # The block's parents are in use now: making room must not take them.
            held = Pin(parent) if parent.parent is not None else None
            if held is not None:
                self._tree.pin(parent)
            has_room = self._make_room(len(data))
            self.unpin(held)
            if not has_room:
                self._count(len(blocks) - kept, sum(len(rest) for _, rest in blocks[kept:]), "refused_pinned")
                break
            parent, replaced = self._tree.insert(parent, block_key)
            for leaf in replaced:
                self.ram.drop(leaf.id)
            self.ram.put(parent.id, data)
            at += len(block_key)
            kept += 1
        return kept

    def clear(self) -> int:
        """Drop every block that is not pinned; how many."""
        dropped = size = 0
        while (node := self._tree.oldest_leaf()) is not None:
            size += self._drop(node)
            dropped += 1
        self._count(dropped, size, "cleared")
        return dropped

    @property
    def blocks(self) -> int:
        return len(self._tree)

    @property
    def pinned_blocks(self) -> int:
        return self._tree.pinned()

    def check_integrity(self) -> None:
        """Raise AssertionError where tree and tier disagree or break their own invariants."""
        self._tree.check_integrity()
        self.ram.check_integrity()
        for node in self._tree.nodes():
            if node.id not in self.ram:
                raise AssertionError(f"the block at {node.start} is listed and not in RAM")
        if len(self.ram) != len(self._tree):
            raise AssertionError(f"RAM holds {len(self.ram)} blocks, {len(self._tree)} are listed")

    @property
    def _block_bytes(self) -> int:
        return self.block_tokens * TOKEN_BYTES

    def _make_room(self, size_bytes: int) -> bool:
        """Evict until `size_bytes` fit; False where only pinned blocks are left."""
        if size_bytes > self.ram.capacity_bytes:
            return False
        evicted = freed = 0
        while self.ram.used_bytes + size_bytes > self.ram.capacity_bytes:
            node = self._tree.oldest_leaf()
            if node is None:
                break
            freed += self._drop(node)
            evicted += 1
        self._count(evicted, freed, "capacity")
        return self.ram.used_bytes + size_bytes <= self.ram.capacity_bytes

    def _drop(self, node: Node) -> int:
        self._tree.remove(node)
        return self.ram.drop(node.id)

    def _count(self, blocks: int, size_bytes: int, cause: str) -> None:
        if not blocks:
            return
        self.evicted[cause] += blocks
        if self._on_eviction is not None:
            self._on_eviction(blocks, size_bytes, cause)

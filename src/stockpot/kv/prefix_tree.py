"""A radix tree over token blocks: which prefixes are in RAM, found to the exact token.

A node is a block of up to `block_tokens` tokens. Full blocks have children; a shorter one (the tail of a
segment) is always a leaf, and goes when a longer block with the same beginning arrives. Children are kept
sorted by their tokens, so the child that shares most with a prompt is a neighbour of the place where the
prompt would stand: a lookup costs O(log children) a block, also for the block in which the prompt departs.

There is a tree for each root: a tenant's, the shared one, and one for each (shared prefix, tenant) behind
it. A prompt's path goes through one or two of them (`kv.block.Scope`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from stockpot.kv.block import (
    NO_TOKENS,
    TOKEN_BYTES,
    BlockId,
    ContentHash,
    Segment,
    TokenKey,
    block_id,
    common_tokens,
)
from stockpot.kv.tier import BlockHead

_NO_CONTENT = ContentHash(b"")


@dataclass(slots=True, eq=False)
class Node:
    """One block. `pins` counts the sequences in flight and the operators' pins that stand on it: a pinned
    node is never evicted. `request` is the request that computed or fetched it; `used_s` and
    `used_before_s` are the last two uses; times are Unix seconds.
    `before` are the tokens ahead of a root: a shared prefix, before private blocks."""

    head: BlockHead
    parent: Node | None
    before: TokenKey = NO_TOKENS
    size_bytes: int = 0
    request: str = ""
    used_s: float = 0.0
    used_before_s: float = 0.0
    kept_until_s: float = 0.0
    hits: int = 0
    pins: int = 0
    children: dict[TokenKey, Node] = field(default_factory=dict[TokenKey, "Node"])
    order: list[TokenKey] = field(default_factory=list[TokenKey])

    @property
    def id(self) -> BlockId:
        return self.head.id

    @property
    def key(self) -> TokenKey:
        return self.head.tokens

    @property
    def start(self) -> int:
        """The position of the block's first token."""
        return self.head.start

    @property
    def end(self) -> int:
        return self.head.start + len(self.head.tokens) // TOKEN_BYTES

    @property
    def is_root(self) -> bool:
        return self.parent is None

    def path(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def prompt(self) -> TokenKey:
        """All tokens from the start of the sequence to the end of this block."""
        keys: list[bytes] = []
        node = self
        while node.parent is not None:
            keys.append(node.key)
            node = node.parent
        return TokenKey(node.before + b"".join(reversed(keys)))

    def subtree(self) -> Iterator[Node]:
        """All nodes below this one and the node itself, children before their parents."""
        stack: list[tuple[Node, bool]] = [(self, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                yield node
            else:
                stack.append((node, True))
                stack.extend((child, False) for child in node.children.values())


@dataclass(frozen=True, slots=True)
class Match:
    """The longest kept prefix of a prompt: `nodes` from the first block on; the last of them may be needed
    only up to position `tokens`."""

    nodes: tuple[Node, ...]
    tokens: int


class PrefixTree:
    """The index of everything in RAM. One thread uses it. It holds no KV bytes and decides nothing."""

    def __init__(self, block_tokens: int) -> None:
        self._block_bytes = block_tokens * TOKEN_BYTES
        self._roots: dict[BlockId, Node] = {}
        self._nodes: dict[BlockId, Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, block: object) -> bool:
        return block in self._nodes

    def get(self, block: BlockId) -> Node | None:
        return self._nodes.get(block)

    def match(self, segments: Sequence[Segment]) -> Match:
        """The longest kept prefix of a prompt, to the exact token. Changes nothing."""
        nodes: list[Node] = []
        tokens = 0
        for segment in segments:
            node, at = self._roots.get(segment.root), 0
            while node is not None and at < len(segment.key):
                wanted = TokenKey(segment.key[at : at + self._block_bytes])
                child = node.children.get(wanted)
                if child is None:
                    nearest, shared = self._nearest_child(node, wanted)
                    if nearest is not None and shared:
                        nodes.append(nearest)
                        at += shared * TOKEN_BYTES
                    break
                nodes.append(child)
                node, at = child, at + len(wanted)
            tokens = segment.start + at // TOKEN_BYTES
            if at < len(segment.key):
                break
        return Match(tuple(nodes), tokens)

    def walk(self, segment: Segment) -> tuple[Node, int]:
        """The last node of the chain of whole blocks that a segment follows (its root where there is none),
        and the bytes of its key up to the node's end."""
        node, at = self._root(segment), 0
        while at < len(segment.key):
            child = node.children.get(TokenKey(segment.key[at : at + self._block_bytes]))
            if child is None:
                break
            node, at = child, at + len(child.key)
        return node, at

    def covers(self, parent: Node, key: TokenKey) -> bool:
        """Whether a child of `parent` begins with all of `key`."""
        place = bisect_left(parent.order, key)
        return place < len(parent.order) and parent.order[place].startswith(key)

    def insert(self, parent: Node, node: Node) -> list[Node]:
        """Add a block behind `parent`; the shorter leaves it replaces (now removed)."""
        if len(parent.key) != self._block_bytes and not parent.is_root:
            raise ValueError("a block that is not full has no children")
        replaced = [
            parent.children[TokenKey(shorter)]
            for shorter in self._shorter(parent, node.key)
            if not parent.children[TokenKey(shorter)].pins
        ]
        for leaf in replaced:
            self.remove(leaf)
        if parent.is_root:
            self._roots[parent.id] = parent
        node.parent = parent
        parent.children[node.key] = node
        insort(parent.order, node.key)
        self._nodes[node.id] = node
        return replaced

    def remove(self, node: Node) -> None:
        """Take out a leaf. Whoever still holds it has a node that no prompt finds any more."""
        parent = node.parent
        if node.children or parent is None:
            raise ValueError(f"the node at {node.start} has children and cannot be removed")
        del parent.children[node.key]
        del parent.order[bisect_left(parent.order, node.key)]
        del self._nodes[node.id]
        if parent.is_root and not parent.children:
            self._roots.pop(parent.id, None)

    def pin(self, match: Match) -> None:
        """Keep what was matched from eviction until `unpin`."""
        for node in match.nodes:
            node.pins += 1

    def unpin(self, match: Match) -> None:
        for node in match.nodes:
            node.pins -= 1

    def pinned(self) -> int:
        """How many blocks are pinned."""
        return sum(1 for node in self._nodes.values() if node.pins)

    def nodes(self) -> Iterator[Node]:
        """Every node, in the order in which they came."""
        return iter(self._nodes.values())

    def departure(self, segments: Sequence[Segment], match: Match) -> Node | None:
        """Where a prompt departs from what is kept: the node that goes on differently, the one used last of
        several; None where nothing goes on."""
        parent = match.nodes[-1] if match.nodes else None
        if parent is not None and parent.end > match.tokens:
            return parent
        begun = next((segment for segment in segments if segment.start == match.tokens), None)
        if begun is not None:
            parent = self._roots.get(begun.root)
        if parent is None or not parent.children:
            return None
        return max(parent.children.values(), key=lambda child: child.used_s)

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant stated above does not hold."""
        reached = 0
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.is_root and not node.children:
                raise AssertionError("an empty root is kept")
            if node.order != sorted(node.children) or len(node.order) != len(node.children):
                raise AssertionError(f"children at {node.end} are out of order")
            if node.children and not node.is_root and len(node.key) != self._block_bytes:
                raise AssertionError(f"the short block at {node.start} has children")
            for key, child in node.children.items():
                reached += 1
                if child.parent is not node or child.key != key or child.start != node.end:
                    raise AssertionError(f"the block at {child.start} does not continue its parent")
                if child.id != block_id(node.id, key) or self._nodes.get(child.id) is not child:
                    raise AssertionError(f"the block at {child.start} has a wrong id")
                if child.pins < 0 or (not node.is_root and child.pins > node.pins):
                    raise AssertionError(f"the block at {child.start} has {child.pins} pins")
                stack.append(child)
        if reached != len(self._nodes):
            raise AssertionError(f"{len(self._nodes)} blocks are listed, {reached} can be reached")

    def _root(self, segment: Segment) -> Node:
        """The root of a segment; one that holds nothing is not kept."""
        known = self._roots.get(segment.root)
        if known is not None:
            return known
        head = BlockHead(
            segment.root, segment.root, segment.start, TokenKey(b""), _NO_CONTENT, fingerprint="", layout=""
        )
        return Node(head, None, segment.before)

    @staticmethod
    def _nearest_child(node: Node, wanted: TokenKey) -> tuple[Node | None, int]:
        """The child that shares most leading tokens with `wanted`: a neighbour of its place in the order."""
        place = bisect_left(node.order, wanted)
        best: Node | None = None
        best_shared = 0
        for key in node.order[max(0, place - 1) : place + 1]:
            shared = common_tokens(key, wanted)
            if shared > best_shared:
                best, best_shared = node.children[key], shared
        return best, best_shared

    @staticmethod
    def _shorter(parent: Node, key: TokenKey) -> list[TokenKey]:
        """Children whose tokens are the beginning of `key`: they stand directly before its place."""
        place = bisect_left(parent.order, key)
        found: list[TokenKey] = []
        while place and key.startswith(parent.order[place - 1]):
            place -= 1
            found.append(parent.order[place])
        return found

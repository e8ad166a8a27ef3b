"""A radix tree over token blocks: which prefixes are kept, found to the exact token.

A node is a block of up to `block_tokens` tokens. Full blocks have children; a shorter one (the tail of a
sequence) is always a leaf, and goes when a longer block with the same beginning arrives. Children are kept
sorted by their tokens, so the child that shares most with a prompt is a neighbour of the place where the
prompt would stand: a lookup costs O(log children) a block, also for the block in which the prompt departs.

Eviction is least recently used over leaves. One ordered dictionary of all nodes is enough for that: using a
path moves its nodes to the young end, deepest first, so a parent always stands behind all its children, and
the oldest node is always a leaf.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from stockpot.kv.block import TOKEN_BYTES, BlockId, TokenKey, block_id, common_tokens


@dataclass(slots=True, eq=False)
class Node:
    """One block. `start` is the position of its first token; `pins` counts the sequences in flight that
    stand on it: a pinned node is never evicted."""

    id: BlockId
    parent: Node | None
    key: TokenKey
    start: int
    pins: int = 0
    children: dict[TokenKey, Node] = field(default_factory=dict[TokenKey, "Node"])
    order: list[TokenKey] = field(default_factory=list[TokenKey])

    @property
    def end(self) -> int:
        return self.start + len(self.key) // TOKEN_BYTES

    def path(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


@dataclass(frozen=True, slots=True)
class Match:
    """The longest kept prefix of a prompt: `nodes` from the first block on; the last of them may be needed
    only up to position `tokens`."""

    nodes: tuple[Node, ...]
    tokens: int


class PrefixTree:
    """The index of everything kept behind one root. One thread uses it. It holds no KV bytes."""

    def __init__(self, root: BlockId, block_tokens: int) -> None:
        self._root = Node(root, None, TokenKey(b""), 0)
        self._block_bytes = block_tokens * TOKEN_BYTES
        self._nodes: OrderedDict[BlockId, Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, key: TokenKey) -> Match:
        """The longest kept prefix of `key`, to the exact token. Changes nothing."""
        nodes: list[Node] = []
        node, at = self._root, 0
        while at < len(key):
            wanted = TokenKey(key[at : at + self._block_bytes])
            child = node.children.get(wanted)
            if child is None:
                nearest, shared = self._nearest_child(node, wanted)
                if nearest is not None and shared:
                    nodes.append(nearest)
                    at += shared * TOKEN_BYTES
                break
            nodes.append(child)
            node, at = child, at + len(wanted)
        return Match(tuple(nodes), at // TOKEN_BYTES)

    def walk(self, key: TokenKey) -> tuple[Node, int]:
        """The last node of the chain of whole blocks that `key` follows (the root where there is none), and
        the bytes of `key` up to its end."""
        node, at = self._root, 0
        while at < len(key):
            child = node.children.get(TokenKey(key[at : at + self._block_bytes]))
            if child is None:
                break
            node, at = child, at + len(child.key)
        return node, at

    def covers(self, parent: Node, key: TokenKey) -> bool:
        """Whether a child of `parent` begins with all of `key`."""
        place = bisect_left(parent.order, key)
        return place < len(parent.order) and parent.order[place].startswith(key)

    def insert(self, parent: Node, key: TokenKey) -> tuple[Node, list[Node]]:
        """Add a block behind `parent`; the new node, and the shorter leaves it replaces (now removed)."""
        if len(parent.key) != self._block_bytes and parent is not self._root:
            raise ValueError("a block that is not full has no children")
        replaced = [
            parent.children[TokenKey(shorter)]
            for shorter in self._shorter(parent, key)
            if not parent.children[TokenKey(shorter)].pins
        ]
        for leaf in replaced:
            self.remove(leaf)
        node = Node(block_id(parent.id, key), parent, key, parent.end)
        parent.children[key] = node
        insort(parent.order, key)
        self._nodes[node.id] = node
        self.touch(node)
        return node, replaced

    def remove(self, node: Node) -> None:
        """Take out a leaf that no sequence stands on."""
        if node.children or node.pins or node.parent is None:
            raise ValueError(f"node at {node.start} is in use and cannot be removed")
        del node.parent.children[node.key]
        del node.parent.order[bisect_left(node.parent.order, node.key)]
        del self._nodes[node.id]

    def touch(self, node: Node) -> None:
        """Mark the path to `node` as used now."""
        for each in node.path():  # deepest first: a parent ends up younger than its children
            self._nodes.move_to_end(each.id)

    def pin(self, node: Node) -> None:
        """Keep the path to `node` from eviction until `unpin`."""
        for each in node.path():
            each.pins += 1
        self.touch(node)

    def unpin(self, node: Node) -> None:
        for each in node.path():
            each.pins -= 1

    def oldest_leaf(self) -> Node | None:
        """The leaf unused for longest that no sequence stands on; None where all are pinned.

        The first unpinned node in order is a leaf: its children would stand before it, and a pinned child
        pins its parents.
        """
        return next((node for node in self._nodes.values() if not node.pins), None)

    def pinned(self) -> int:
        """How many blocks are pinned."""
        return sum(1 for node in self._nodes.values() if node.pins)

    def nodes(self) -> Iterator[Node]:
        """Every node, oldest first."""
        return iter(self._nodes.values())

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant stated above does not hold."""
        place = {block: index for index, block in enumerate(self._nodes)}
        reached = 0
        stack = [self._root]
        while stack:
            node = stack.pop()
            if node.order != sorted(node.children) or len(node.order) != len(node.children):
                raise AssertionError(f"children at {node.end} are out of order")
            if node.children and node is not self._root and len(node.key) != self._block_bytes:
                raise AssertionError(f"the short block at {node.start} has children")
            for key, child in node.children.items():
                reached += 1
                if child.parent is not node or child.key != key or child.start != node.end:
                    raise AssertionError(f"the block at {child.start} does not continue its parent")
                if child.id != block_id(node.id, key) or self._nodes.get(child.id) is not child:
                    raise AssertionError(f"the block at {child.start} has a wrong id")
                if node is not self._root and place[child.id] > place[node.id]:
                    raise AssertionError(f"the block at {child.start} is younger than its parent")
                if child.pins < 0 or (node is not self._root and child.pins > node.pins):
                    raise AssertionError(f"the block at {child.start} has {child.pins} pins")
                stack.append(child)
        if reached != len(self._nodes):
            raise AssertionError(f"{len(self._nodes)} blocks are listed, {reached} can be reached")

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

"""What requests ask for their prompts: how long to keep what, under which labels, and who may see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from stockpot.kv.block import BlockId
from stockpot.kv.disk_index import LONGEST_PROMISE_S, SLACK_S
from stockpot.kv.prefix_tree import Node
from stockpot.kv.tier import BlockHead

MAX_TAGS_OF_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Promise:
    """A boundary: the first `tokens` tokens of a prompt are kept at least `ttl_s` seconds after their last
    use, and carry `tags`."""

    tokens: int
    ttl_s: int
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Labels:
    """What the blocks of a prompt are marked with. `epoch` is that of the last invalidation known when the
    request began; the first `shared_tokens` tokens belong to nobody."""

    tenant: str = ""
    request: str = ""
    epoch: int = 0
    shared_tokens: int = 0
    promises: tuple[Promise, ...] = ()

    def tags(self, start: int) -> frozenset[str]:
        """The tags of a block that begins at `start`."""
        tags = frozenset[str]().union(*(each.tags for each in self.promises if each.tokens > start))
        return frozenset(sorted(tags)[:MAX_TAGS_OF_BLOCK])

    def kept_until_s(self, start: int, now_s: float) -> float:
        """Until when (Unix time) a block that begins at `start` is kept; 0 for no promise."""
        ttls = [each.ttl_s for each in self.promises if each.tokens > start]
        return now_s + max(ttls) if ttls else 0.0

    def relabelled(self, head: BlockHead, until_s: float) -> BlockHead:
        """The head of a block that is used again: the longer promise, and the tags of both."""
        tags = frozenset(sorted(head.tags | self.tags(head.start))[:MAX_TAGS_OF_BLOCK])
        return replace(head, kept_until_s=max(head.kept_until_s, until_s), tags=tags)

    def by_ttl(self, first: int, end: int) -> Mapping[int, int]:
        """Of the tokens [first, end), how many stand before a boundary, by the seconds of the longest promise
        that covers them."""
        tokens: dict[int, int] = {}
        at = first
        for promise in sorted(self.promises, key=lambda each: each.tokens):
            covered = min(promise.tokens, end) - at
            if covered > 0:
                longest = max(each.ttl_s for each in self.promises if each.tokens >= promise.tokens)
                tokens[longest] = tokens.get(longest, 0) + covered
                at += covered
        return tokens


def holds(kept_until_s: float, now_s: float) -> bool:
    """Whether a promise until then holds now. One further ahead than any promise was made by a clock that was
    wrong."""
    return 0 < kept_until_s - now_s <= LONGEST_PROMISE_S + SLACK_S


class PromiseBook:
    """Which blocks are promised, within a bound: promises must not fill the cache for good.

    `limit_bytes` says how much may be promised now.
    """

    def __init__(self, limit_bytes: Callable[[], int]) -> None:
        self._limit_bytes = limit_bytes
        self._nodes: dict[BlockId, Node] = {}
        self._bytes = 0
        self.refused = 0
        """Promises that were not made because the bound was reached."""

    @property
    def used_bytes(self) -> int:
        """Bytes promised, as of the last promise."""
        return self._bytes

    def make(self, node: Node, until_s: float, now_s: float) -> bool:
        """Promise to keep a block; False where that would be too much."""
        if node.id not in self._nodes:
            if self._bytes + node.size_bytes > self._limit_bytes():
                self._prune(now_s)
            if self._bytes + node.size_bytes > self._limit_bytes():
                self.refused += 1
                return False
            self._nodes[node.id] = node
            self._bytes += node.size_bytes
        node.kept_until_s = max(node.kept_until_s, until_s)
        return True

    def forget(self, node: Node) -> None:
        """The block is gone."""
        if self._nodes.pop(node.id, None) is not None:
            self._bytes -= node.size_bytes

    def _prune(self, now_s: float) -> None:
        for node in [node for node in self._nodes.values() if not holds(node.kept_until_s, now_s)]:
            self.forget(node)

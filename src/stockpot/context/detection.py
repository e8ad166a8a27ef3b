"""Finds cache boundaries in observed traffic: places up to which many prompts are the same, and then part.

A counted prefix tree over the pieces of prompts (tools, messages), in bounded memory. What precedes a place
is worth a boundary if many requests have it and what follows differs: the last such place of a branch, for a
boundary before it would save less, and one behind it serves fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from stockpot.context.tokens import TokenCounter
from stockpot.requests import TOOLS, CacheBoundary, ChatRequest

_BOUNDARIES_MAX = 4
_DEPTH_MAX = 256


@dataclass(frozen=True, slots=True)
class ObservedPiece:
    """One piece of a prompt by what is in it, and its tokens."""

    key: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A boundary behind the first `pieces` pieces, which are `tokens` tokens. `requests` had them, and went
    on in `branches` ways; `saved_tokens` would have been read from a cache rather than computed."""

    pieces: int
    tokens: int
    requests: int
    branches: int
    saved_tokens: int


@dataclass(slots=True)
class _Node:
    tokens: int
    depth: int
    count: int = 0
    seen: int = 0
    ended: int = 0
    children: dict[bytes, _Node] = field(default_factory=dict[bytes, "_Node"])


class BoundaryDetector:
    """Fed with prompts (`add`), asked for places. Not for several threads. At most `nodes_max` pieces are
    remembered: those that were seen longest ago are forgotten."""

    def __init__(self, *, nodes_max: int = 20_000) -> None:
        self._nodes_max = nodes_max
        self._root = _Node(0, 0)
        self._nodes = 0
        self._added = 0

    def __len__(self) -> int:
        """Pieces that are remembered."""
        return self._nodes

    def add(self, pieces: Sequence[ObservedPiece]) -> None:
        """One prompt. Of a very long one the first 256 pieces count."""
        self._added += 1
        node = self._root
        node.count += 1
        for piece in pieces[:_DEPTH_MAX]:
            child = node.children.get(piece.key)
            if child is None:
                child = node.children[piece.key] = _Node(node.tokens + piece.tokens, node.depth + 1)
                self._nodes += 1
            child.count += 1
            child.seen = self._added
            node = child
        node.ended += 1
        if self._nodes > self._nodes_max:
            self._forget()

    def suggest(self, *, min_tokens: int = 1024, min_requests: int = 3) -> list[Suggestion]:
        """The places that would have saved most, first."""
        found: list[Suggestion] = []
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            if self._is_place(node, min_tokens, min_requests):
                saved = (node.count - 1) * node.tokens
                found.append(
                    Suggestion(node.depth, node.tokens, node.count, len(node.children) + node.ended, saved)
                )
        return sorted(found, key=lambda one: (-one.saved_tokens, one.pieces))

    def places_in(
        self, pieces: Sequence[ObservedPiece], *, min_tokens: int = 1024, min_requests: int = 3
    ) -> list[int]:
        """Behind how many of this prompt's pieces a boundary is worth it: the last four such places."""
        places: list[int] = []
        node = self._root
        for piece in pieces[:_DEPTH_MAX]:
            child = node.children.get(piece.key)
            if child is None:
                break
            node = child
            if self._is_place(node, min_tokens, min_requests):
                places.append(node.depth)
        return places[-_BOUNDARIES_MAX:]

    def boundaries(
        self, request: ChatRequest, counter: TokenCounter, *, min_tokens: int = 1024, min_requests: int = 3
    ) -> tuple[CacheBoundary, ...]:
        """The same for a request, as its boundaries."""
        pieces = observed(request, counter)
        tools = len(request.tools)
        return tuple(
            CacheBoundary(TOOLS, place - 1, 300)
            if place <= tools
            else CacheBoundary(place - tools - 1, None, 300)
            for place in self.places_in(pieces, min_tokens=min_tokens, min_requests=min_requests)
        )

    def _is_place(self, node: _Node, min_tokens: int, min_requests: int) -> bool:
        if node.count < min_requests or node.tokens < min_tokens:
            return False
        # Where all go on in the same way, the place is further on.
        most = max((child.count for child in node.children.values()), default=0)
        return most < node.count and len(node.children) + node.ended > 1

    def _forget(self) -> None:
        """All that was not seen in the later half of what is remembered."""
        seen = sorted(node.seen for node in self._all())
        limit = seen[len(seen) // 2]
        stack = [self._root]
        self._nodes = 0
        while stack:
            node = stack.pop()
            node.children = {key: child for key, child in node.children.items() if child.seen > limit}
            self._nodes += len(node.children)
            stack += node.children.values()

    def _all(self) -> list[_Node]:
        found: list[_Node] = []
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            found.append(node)
            stack += node.children.values()
        return found


def observed(request: ChatRequest, counter: TokenCounter) -> list[ObservedPiece]:
    """A request in pieces: its tools, then its messages."""
    texts = [msgspec.json.encode(each) for each in (*request.tools, *request.messages)]
    return [
        ObservedPiece(blake2b(text, digest_size=16).digest(), counter.count(text.decode())) for text in texts
    ]

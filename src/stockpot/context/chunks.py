"""Which retrieved chunks are read: the most value for the tokens there are, always in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stockpot.context.prompt import Document, document_text
from stockpot.context.tokens import TokenCounter

_EXACT_CELLS_MAX = 2_000_000
"""Chunks times tokens: up to here the best choice is computed, above it one that is at least half as good."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of text that was found, and how much it is worth (a score; more is better, below 0 is
    nothing)."""

    id: str
    text: str
    value: float


@dataclass(frozen=True, slots=True)
class Selection:
    """`included` in order of their ids: the same set is the same text, whatever its scores were. `tokens` of
    them all, as documents."""

    included: tuple[Chunk, ...]
    left_out: tuple[Chunk, ...]
    tokens: int

    def documents(self) -> tuple[Document, ...]:
        """As a `Context` takes them."""
        return tuple(Document(chunk.id, chunk.text) for chunk in self.included)


def select_chunks(chunks: Sequence[Chunk], max_tokens: int, counter: TokenCounter) -> Selection:
    """The 0-1 knapsack: at most `max_tokens` tokens, the greatest sum of values. Two chunks of one id are
    one: the more valuable."""
    best: dict[str, Chunk] = {}
    for chunk in chunks:
        # Of two that are worth the same always the same one, in whatever order they came.
        if chunk.id not in best or (chunk.value, chunk.text) > (best[chunk.id].value, best[chunk.id].text):
            best[chunk.id] = chunk
    unique = [best[id] for id in sorted(best)]
    sizes = {chunk.id: counter.count(_as_read(chunk)) for chunk in unique}
    worth = [chunk for chunk in unique if chunk.value > 0 and sizes[chunk.id] <= max_tokens]
    if len(worth) * max(1, max_tokens) <= _EXACT_CELLS_MAX:
        chosen = _exact(worth, sizes, max_tokens)
    else:
        chosen = _greedy(worth, sizes, max_tokens)
    included = tuple(chunk for chunk in unique if chunk.id in chosen)
    return Selection(
        included,
        tuple(chunk for chunk in unique if chunk.id not in chosen),
        sum(sizes[chunk.id] for chunk in included),
    )


def _as_read(chunk: Chunk) -> str:
    return document_text(Document(chunk.id, chunk.text))


def _exact(chunks: Sequence[Chunk], sizes: dict[str, int], room: int) -> set[str]:
    """By dynamic programming over tokens."""
    values = [0.0] * (room + 1)
    taken: list[list[bool]] = []
    for chunk in chunks:
        size, row = sizes[chunk.id], [False] * (room + 1)
        for left in range(room, size - 1, -1):
            if (value := values[left - size] + chunk.value) > values[left]:
                values[left], row[left] = value, True
        taken.append(row)
    chosen: set[str] = set()
    left = room
    for chunk, row in zip(reversed(chunks), reversed(taken), strict=True):
        if row[left]:
            chosen.add(chunk.id)
            left -= sizes[chunk.id]
    return chosen


def _greedy(chunks: Sequence[Chunk], sizes: dict[str, int], room: int) -> set[str]:
    """By value for a token; or the one most valuable chunk, if that is worth more: together at least half of
    the best (Dantzig 1957)."""
    left, chosen, value = room, set[str](), 0.0
    for chunk in sorted(chunks, key=lambda one: (-one.value / max(1, sizes[one.id]), one.id)):
        if sizes[chunk.id] <= left:
            chosen.add(chunk.id)
            left -= sizes[chunk.id]
            value += chunk.value
    single = max(chunks, key=lambda one: (one.value, one.id), default=None)
    return {single.id} if single is not None and single.value > value else chosen

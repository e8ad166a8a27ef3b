"""The checks of the Driver contract, once for every driver: what a sequence holds, and which calls fit it.

A library below may abort the process on misuse, so nothing reaches it that has not passed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.driver import Batch, Span


@dataclass(frozen=True, slots=True)
class Growth:
    """How many tokens a valid batch appends to which sequences (no sequence twice)."""

    sequences: NDArray[np.int64]
    tokens: NDArray[np.int64]


class SequenceGuard:
    """Knows the length of every sequence: sequence s holds the positions [0, lengths[s]), without gaps.

    The `check_*` methods raise ValueError and change nothing; the driver applies `grow`, `copied` and `cut`
    once the call below has succeeded.
    """

    def __init__(self, *, max_sequences: int, max_batch_tokens: int, vocabulary_size: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._vocabulary_size = vocabulary_size
        self._lengths = np.zeros(max_sequences, dtype=np.int64)

    def length(self, sequence: int) -> int:
        """Tokens in `sequence`. Raises ValueError for an id out of range."""
        if not 0 <= sequence < len(self._lengths):
            raise ValueError(f"sequence {sequence} is not within 0..{len(self._lengths) - 1}")
        return int(self._lengths[sequence])

    def check_batch(self, batch: Batch) -> Growth:
        """Whether the batch continues its sequences, in order and without a gap."""
        n = len(batch.tokens)
        shapes = {a.shape for a in (batch.tokens, batch.positions, batch.sequences, batch.wants_logits)}
        if shapes != {(n,)}:
            raise ValueError(f"the arrays of a batch differ in shape: {sorted(shapes)}")
        if not 0 < n <= self._max_batch_tokens:
            raise ValueError(f"a batch of {n} tokens is not within 1..{self._max_batch_tokens}")
        if int(batch.tokens.min()) < 0 or int(batch.tokens.max()) >= self._vocabulary_size:
            raise ValueError(
                f"token ids {int(batch.tokens.min())}..{int(batch.tokens.max())} leave the vocabulary "
                f"of {self._vocabulary_size}"
            )
        if int(batch.sequences.min()) < 0 or int(batch.sequences.max()) >= len(self._lengths):
            raise ValueError(f"a sequence of the batch is not within 0..{len(self._lengths) - 1}")
        order = np.argsort(batch.sequences, kind="stable")
        owners = batch.sequences[order]
        first = np.flatnonzero(np.concatenate(([True], owners[1:] != owners[:-1])))
        counts = np.diff(np.append(first, n))
        sequences = owners[first].astype(np.int64)
        expected = np.repeat(self._lengths[sequences] - first, counts) + np.arange(n)
        wrong = np.flatnonzero(batch.positions[order] != expected)
        if wrong.size:
            at = int(wrong[0])
            raise ValueError(
                f"sequence {int(owners[at])} must continue at position {int(expected[at])}, "
                f"not {int(batch.positions[order][at])}"
            )
        return Growth(sequences, counts)

    def check_copy(self, source: int, target: int, span: Span) -> None:
        """Whether `source` holds the span and `target` ends where it starts."""
        if source == target:
            raise ValueError(f"sequence {source} cannot be copied onto itself")
        self._check_held(source, span)
        if self.length(target) != span.start:
            raise ValueError(
                f"sequence {target} holds {self.length(target)} tokens; a copy to {span.start} leaves a gap"
                " or an overlap"
            )

    def check_cut(self, sequence: int, start: int) -> None:
        self.length(sequence)
        if start < 0:
            raise ValueError(f"a sequence cannot be cut from position {start}")

    def check_export(self, sequence: int, spans: Sequence[Span]) -> None:
        for span in spans:
            self._check_held(sequence, span)
            if span.start == span.end:
                raise ValueError(f"an empty span, {span.start}, cannot be exported")

    def check_import(self, sequence: int, blocks: Sequence[Span], span: Span) -> None:
        """Whether `blocks` adjoin, cover the span, and the sequence ends where the span starts."""
        if self.length(sequence) != span.start:
            raise ValueError(
                f"sequence {sequence} holds {self.length(sequence)} tokens; an import to {span.start} leaves"
                " a gap or an overlap"
            )
        if not 0 <= span.start <= span.end:
            raise ValueError(f"[{span.start}, {span.end}) is no span")
        if span.start == span.end:
            return
        for before, after in pairwise(blocks):
            if before.end != after.start:
                raise ValueError(f"a block ends at {before.end}, the next starts at {after.start}")
        if any(block.start >= block.end or block.start < 0 for block in blocks):
            raise ValueError("a block to import is empty")
        if not blocks or blocks[0].start > span.start or blocks[-1].end < span.end:
            raise ValueError(f"the blocks do not cover [{span.start}, {span.end})")

    def grow(self, growth: Growth) -> None:
        self._lengths[growth.sequences] += growth.tokens

    def hold(self, sequence: int, end: int) -> None:
        """`sequence` now holds [0, end)."""
        self._lengths[sequence] = end

    def cut(self, sequence: int, start: int) -> None:
        self._lengths[sequence] = min(int(self._lengths[sequence]), start)

    def clear(self) -> None:
        self._lengths[:] = 0

    def _check_held(self, sequence: int, span: Span) -> None:
        if not 0 <= span.start <= span.end:
            raise ValueError(f"[{span.start}, {span.end}) is no span")
        if span.end > self.length(sequence):
            raise ValueError(
                f"sequence {sequence} holds {self.length(sequence)} tokens,"
                f" not all of [{span.start}, {span.end})"
            )

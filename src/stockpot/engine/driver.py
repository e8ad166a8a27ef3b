"""The seam to a model that runs in this process: one context of KV cells, decoded in batches.

Positions are token indices within a sequence, from 0. A span is a half-open range [start, end) of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stockpot.errors import StockpotError


class OutOfCells(StockpotError):
    """A decode or load needs more cells than are free (or free in one run); the context is unchanged."""


class DriverFailure(StockpotError):
    """The library reported a failure; the context may hold anything and must not be used further."""


class Span(NamedTuple):
    """Token positions [start, end)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine and the cache need to know of a model.

    `fingerprint` identifies the weights (a hash of the file's content, never its name). `layout` names all
    that decides the meaning of KV bytes: binding and its version, cell types, flash attention, rope settings.
    `kv_cell_type` is the type of what is kept, f16 or q8_0; `kv_bytes_per_token` what one token takes in the
    context, all layers.
    """

    name: str
    architecture: str
    fingerprint: str
    layout: str
    layers: int
    kv_heads: int
    head_size: int
    embedding_size: int
    vocabulary_size: int
    training_context_tokens: int
    kv_cell_type: str
    kv_bytes_per_token: int
    weights_bytes: int
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens to decode in one step, all arrays of the same length n, n at most `max_batch_tokens`.

    The tokens of one sequence must continue it without a gap and in order; tokens of several sequences may
    be mixed. `wants_logits[i]` asks for the logits after token i.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    wants_logits: NDArray[np.bool_]


class Vocabulary(ABC):
    """Text to token ids and back. Immutable; safe to call from any thread."""

    size: int
    begin_token: int | None
    end_token: int | None

    @abstractmethod
    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        """Token ids of `text`. With `special`, the spelling of a control token becomes that token.
        With `add_begin`, the model's begin token is put first where the model wants one."""

    @abstractmethod
    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, perhaps part of a character; b"" for control tokens unless `special`."""

    @abstractmethod
    def ends_generation(self, token: int) -> bool:
        """Whether the model ends its answer with this token (end of sequence, end of turn, ...)."""


class Driver(ABC):
    """Owns one model context. One thread uses it (the engine's); every call but `close` may take long and
    releases the GIL while it computes.

    Sequence ids are 0 .. max_sequences - 1. Cells shared by `copy` count once. After `DriverFailure` the
    driver is dead. No call raises for a sequence that is empty.
    """

    facts: ModelFacts
    vocabulary: Vocabulary
    cells: int
    max_batch_tokens: int
    max_sequences: int

    @abstractmethod
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Compute the batch and append it to its sequences.

        Returns the logits asked for, shape (wants_logits.sum(), vocabulary_size), in batch order; the array
        is valid until the next call. Raises OutOfCells with the context unchanged, DriverFailure, ValueError
        for a batch that breaks the contract.
        """

    @abstractmethod
    def copy(self, source: int, target: int, span: Span) -> None:
        """Let `target` share the cells of `source` in `span`. Costs no memory. `target` must not hold
        positions of the span."""

    @abstractmethod
    def cut(self, sequence: int, start: int = 0) -> None:
        """Drop `sequence` from position `start` on. Cells no sequence holds any more are free."""

    @abstractmethod
    def export_spans(self, sequence: int, spans: Sequence[Span]) -> list[bytes]:
        """The KV of each span as bytes; `sequence` must hold all of them and is unchanged.
        Bytes of the same span and layout are interchangeable between contexts of the same model."""

    @abstractmethod
    def import_spans(self, sequence: int, blocks: Sequence[tuple[Span, bytes]], span: Span) -> None:
        """Put exported KV back: the part of `blocks` (adjoining, ascending) that lies in `span`.

        `sequence` must hold exactly the positions before `span.start`; afterwards it holds those before
        `span.end`. Bit-exact. Raises OutOfCells (nothing changed), ValueError for bytes that do not fit.
        """

    @abstractmethod
    def used_cells(self) -> int | None:
        """Cells that hold something, as the library counts them; None where it cannot say."""

    @abstractmethod
    def defragment(self) -> None:
        """Move used cells together, so that a free run is found again. Costs up to a step."""

    @abstractmethod
    def clear(self) -> None:
        """Drop every sequence."""

    @abstractmethod
    def close(self) -> None:
        """Free the context and the model. Idempotent."""

"""The driver over llama.cpp: one context, through one of the two bindings.

The libraries abort the process when they are misused and say little when they fail, so every call is
checked first (`SequenceGuard`) and the cells a call will take are foreseen (`CellMap`). Export and import
go span by span through a scratch sequence: `copy` to it costs microseconds, and reading a span that way is as
fast as reading the whole sequence and cutting the bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.bindings.binding import Binding, Handle
from stockpot.engine.cell_map import CellMap, Cells, Group
from stockpot.engine.driver import Batch, Driver, DriverFailure, ModelFacts, OutOfCells, Span
from stockpot.engine.driver_guard import SequenceGuard
from stockpot.engine.llamacpp_vocabulary import LlamaVocabulary

PAGE_CELLS = 32
"""Without flash attention ik_llama.cpp rounds the cells it attends to up to this many."""
MIN_GAP_CELLS, MAX_GAP_SHARE = 128, 0.1
"""Free cells below the highest used one are closed there when they are more than these: cells, and share of
those used."""
_TO_THE_END = -1
_FULL = 1


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and a context the driver takes over; it frees both. The context has one sequence more than
    `max_sequences`, for scratch."""

    binding: Binding
    model: Handle
    context: Handle
    facts: ModelFacts
    max_sequences: int
    max_batch_tokens: int
    state: StateSize


@dataclass(frozen=True, slots=True)
class StateSize:
    """Bytes of an exported span of n tokens: `fixed + n * per_token`."""

    fixed: int
    per_token: int

    def of(self, tokens: int) -> int:
        return self.fixed + tokens * self.per_token


class LlamaCppDriver(Driver):
    """See `Driver`. Made by `open_driver`."""

    def __init__(self, loaded: LoadedModel) -> None:
        binding = loaded.binding
        self._binding = binding
        self._model: Handle | None = loaded.model
        self._context = loaded.context
        self._state = loaded.state
        self._scratch = loaded.max_sequences
        self._dead = ""
        self.facts = loaded.facts
        self.vocabulary = self._words = LlamaVocabulary(binding, loaded.model)
        self.cells = binding.cells(loaded.context)
        self.max_batch_tokens = min(loaded.max_batch_tokens, self.cells)
        self.max_sequences = loaded.max_sequences
        self._batch = binding.new_batch(self.max_batch_tokens)
        self._map = CellMap(cells=self.cells, sequences=self.max_sequences)
        self._guard = SequenceGuard(
            max_sequences=self.max_sequences,
            max_batch_tokens=self.max_batch_tokens,
            vocabulary_size=self.vocabulary.size,
        )

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self._check_alive()
        growth = self._guard.check_batch(batch)
        count = len(batch.tokens)
        places = self._room_for_batch(count)
        buffers = self._batch
        buffers.tokens[:count] = batch.tokens
        buffers.positions[:count] = batch.positions
        buffers.sequences[:count] = batch.sequences
        buffers.wants_logits[:count] = batch.wants_logits
        buffers.struct.n_tokens = count
        code = self._binding.decode(self._context, buffers)
        if code == _FULL and not self._binding.traits.runs:
            raise OutOfCells(f"The context has no room for a batch of {count} tokens.")
        if code != 0:
            raise self._failure(f"decoding {count} tokens returned {code}")
        for sequence in growth.sequences.tolist():
            self._map.append(sequence, places[np.flatnonzero(batch.sequences == sequence)])
        self._guard.grow(growth)
        rows = int(np.count_nonzero(batch.wants_logits))
        if rows == 0:
            self._binding.synchronize(self._context)
            return np.empty((0, self.vocabulary.size), dtype=np.float32)
        return self._binding.logits(self._context, rows, self.vocabulary.size)

    def copy(self, source: int, target: int, span: Span) -> None:
        self._check_alive()
        self._guard.check_copy(source, target, span)
        if span.start == span.end:
            return
        self._binding.copy(self._context, source, target, span.start, span.end)
        self._map.share(source, target, span)
        self._guard.hold(target, span.end)

    def cut(self, sequence: int, start: int = 0) -> None:
        self._check_alive()
        self._guard.check_cut(sequence, start)
        if start >= self._guard.length(sequence):
            return
        self._binding.remove(self._context, sequence, start, _TO_THE_END)
        self._map.cut(sequence, start)
        self._guard.cut(sequence, start)

    def export_spans(self, sequence: int, spans: Sequence[Span]) -> list[bytes]:
        self._check_alive()
        self._guard.check_export(sequence, spans)
        return [self._export(sequence, span) for span in spans]

    def import_spans(self, sequence: int, blocks: Sequence[tuple[Span, bytes]], span: Span) -> None:
        self._check_alive()
        self._guard.check_import(sequence, [block for block, _ in blocks], span)
        wanted = [(b, data) for b, data in blocks if b.end > span.start and b.start < span.end]
        orders = [self._order_of_cells(block, data) for block, data in wanted]
        free = self.cells - self._map.used()
        if span.end - span.start > free:
            raise OutOfCells(f"{span.end - span.start} cells are needed, {free} of {self.cells} are free.")
        try:
            for (block, data), order in zip(wanted, orders, strict=True):
                part = Span(max(block.start, span.start), min(block.end, span.end))
                self._import(sequence, block, data, order, part)
        except (OutOfCells, ValueError):
            self._binding.remove(self._context, sequence, span.start, _TO_THE_END)
            self._map.cut(sequence, span.start)
            raise
        self._guard.hold(sequence, max(span.end, span.start))

    def used_cells(self) -> int | None:
        self._check_alive()
        return self._binding.used_cells(self._context)

    def defragment(self) -> None:
        """Everything above the lowest free cell leaves the context and comes back without gaps.

        The library's own way is not used: it moves cells in pieces, a bounded number at a time, and took
        seconds where cells of several sequences lay mixed.
        """
        self._check_alive()
        if not self._binding.traits.runs:
            return
        groups = list(self._map.groups_above(self._map.first_hole()))
        moving = [(g, self._export(g.holders[0], g.span)) for g in groups]
        for group in groups:
            for holder in group.holders:
                self._binding.remove(self._context, holder, group.span.start, group.span.end)
            self._map.lift(group)
        for group, data in moving:
            self._land(group, data)

    def clear(self) -> None:
        self._check_alive()
        self._binding.clear(self._context)
        self._map.clear()
        self._guard.clear()

    def close(self) -> None:
        if self._model is not None:
            self._words.close()
            self._binding.free_context(self._context)
            self._binding.free_model(self._model)
            self._model = None
            self._dead = "it was closed"

    def _check_alive(self) -> None:
        if self._dead:
            raise DriverFailure(f"The driver of {self.facts.name} must not be used any more: {self._dead}.")

    def _failure(self, what: str) -> DriverFailure:
        """The driver is dead from here on."""
        self._dead = what
        return DriverFailure(f"{self._binding.name} failed: {what}. Restart the server.")

    def _room_for_batch(self, count: int) -> Cells:
        """The cells the library will take for the next batch."""
        traits = self._binding.traits
        if not traits.runs:
            places = self._map.lowest(count)
        else:
            places = self._map.lowest_run(count)
            if places is not None and not traits.sound_range and self._must_close_gaps(places):
                self.defragment()
                places = self._map.lowest_run(count)
            self._search_from_the_start()
        if places is None:
            free = self.cells - self._map.used()
            raise OutOfCells(
                f"{count} cells are needed{' in one run' * traits.runs}, {free} of {self.cells} are free."
            )
        return places

    def _must_close_gaps(self, places: Cells) -> bool:
        """Before a batch is put there: whether used cells would be overlooked, or so many free ones looked at
        (without flash attention each costs as much as a used one) that moving cells pays within a step."""
        return self._map.missed_by_pages(PAGE_CELLS, places) or self._map.gaps_below(places) > max(
            MIN_GAP_CELLS, MAX_GAP_SHARE * self._map.used()
        )

    def _search_from_the_start(self) -> None:
        """The library searches free cells from where it last stopped; any copy, even of nothing, sends it
        back to the first. So the lowest run is taken, which keeps what attention looks at short."""
        self._binding.copy(self._context, self._scratch, 0, 0, 0)

    def _export(self, sequence: int, span: Span) -> bytes:
        """Read straight into the bytes object that is returned: it has no other holder yet."""
        size = self._state.of(span.end - span.start)
        data, address = _uninitialised_bytes(size)
        self._binding.copy(self._context, sequence, self._scratch, span.start, span.end)
        written = self._binding.state_get(self._context, self._scratch, address, size)
        self._binding.remove(self._context, self._scratch, 0, _TO_THE_END)
        if written != size:
            raise self._failure(f"exporting [{span.start}, {span.end}) gave {written} bytes, not {size}")
        return data

    def _import(self, sequence: int, block: Span, data: bytes, order: Cells, part: Span) -> None:
        """Bring one block into the context and let `sequence` have `part` of it."""
        places = self._set_scratch(block, data, order)
        self._binding.copy(self._context, self._scratch, sequence, part.start, part.end)
        self._binding.remove(self._context, self._scratch, 0, _TO_THE_END)
        self._map.append(sequence, places[part.start - block.start : part.end - block.start])

    def _land(self, group: Group, data: bytes) -> None:
        """Bring a lifted group back for all its holders."""
        places = self._set_scratch(group.span, data, self._order_of_cells(group.span, data))
        for holder in group.holders:
            self._binding.copy(self._context, self._scratch, holder, group.span.start, group.span.end)
        self._binding.remove(self._context, self._scratch, 0, _TO_THE_END)
        self._map.land(group, places)

    def _set_scratch(self, block: Span, data: bytes, order: Cells) -> Cells:
        """Load a block into the scratch sequence; its cells in the order of positions."""
        count = block.end - block.start
        places = self._map.lowest(count)
        if self._binding.traits.runs:
            places = self._map.lowest_run(count)
            self._search_from_the_start()
        if places is None:
            raise OutOfCells(f"No run of {count} free cells for the block [{block.start}, {block.end}).")
        if self._binding.state_set(self._context, self._scratch, data) != len(data):
            self._binding.remove(self._context, self._scratch, 0, _TO_THE_END)
            raise ValueError(
                f"the bytes of block [{block.start}, {block.end}) do not fit this context's layout"
            )
        return places[order]

    def _order_of_cells(self, block: Span, data: bytes) -> Cells:
        """For each position of the block, which of its cells holds it: cells are exported in the order in
        which they lay, which need not be that of their positions. Raises ValueError for bytes of
        another span or size."""
        count = block.end - block.start
        form = self._binding.state_format
        if len(data) != self._state.of(count):
            raise ValueError(
                f"block [{block.start}, {block.end}) has {len(data)} bytes, not {self._state.of(count)}"
            )
        held = int.from_bytes(data[form.count_at : form.count_at + 4], "little")
        if held != count:
            raise ValueError(f"block [{block.start}, {block.end}) holds {held} cells")
        words = np.frombuffer(data, dtype="<i4", count=count * form.words, offset=form.cells_at)
        positions = words[:: form.words]
        order = np.argsort(positions)
        if not np.array_equal(positions[order], np.arange(block.start, block.end)):
            raise ValueError(f"block [{block.start}, {block.end}) holds other positions")
        return order


def _uninitialised_bytes(size: int) -> tuple[bytes, int]:
    """A bytes object to be written once, before anyone else holds it, and the address of its content."""
    make = ctypes.pythonapi.PyBytes_FromStringAndSize
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
    address_of = ctypes.pythonapi.PyBytes_AsString
    address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.py_object]
    data = make(None, size)
    return data, address_of(data)

"""A tiny deterministic model with honest KV cells, for tests of everything above the driver.

A cell's value depends on its token, its position and the values of every cell before it in the sequence;
logits depend on all values a sequence holds. So a cell that was copied, cut or restored wrongly changes
what comes out, as it would in a real model. Cells are handed out in one run per batch, as
ik_llama.cpp does, so fragmentation shows too.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.cell_map import CellMap
from stockpot.engine.driver import Batch, Driver, DriverFailure, ModelFacts, OutOfCells, Span, Vocabulary
from stockpot.engine.driver_guard import SequenceGuard

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LAYOUT = "fake/1"
_HEADER = struct.Struct("<8sII")  # layout, first position, cells
_CELL = np.dtype([("position", "<i4"), ("value", "<u8")])
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class FakeVocabulary(Vocabulary):
    """256 bytes, then `<|endoftext|>` (256), `<|im_start|>` (257) and `<|im_end|>` (258)."""

    size = 256 + len(_CONTROL)
    begin_token = None
    end_token = 258

    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        del add_begin  # this model wants no begin token
        if not special:
            return list(text.encode())
        tokens: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, _CONTROL)) + ")", text):
            tokens += [256 + _CONTROL.index(part)] if part in _CONTROL else part.encode()
        return tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if not 0 <= token < self.size:
            raise ValueError(f"token {token} is not within 0..{self.size - 1}")
        if token < 256:
            return bytes([token])
        return _CONTROL[token - 256].encode() if special else b""

    def ends_generation(self, token: int) -> bool:
        return token in (256, 258)


class FakeDriver(Driver):
    """Enforces the contract strictly: whatever the seam calls misuse raises ValueError.

    `one_run=False` hands out any free cells instead of one run (as upstream llama.cpp does).
    `token_cost_s` is slept for every decoded token. Printable ASCII and `<|im_end|>` are likelier than other
    tokens, so that greedy answers are readable and end after about a hundred tokens.
    The counters `decoded_tokens`, `exported_tokens` and `imported_tokens` are totals.
    """

    def __init__(
        self,
        *,
        cells: int = 4096,
        max_sequences: int = 32,
        max_batch_tokens: int = 512,
        one_run: bool = True,
        token_cost_s: float = 0.0,
        training_context_tokens: int | None = None,
    ) -> None:
        self.cells = cells
        self.max_sequences = max_sequences
        self.max_batch_tokens = max_batch_tokens
        self.vocabulary = FakeVocabulary()
        self.facts = ModelFacts(
            name="fake",
            architecture="fake",
            fingerprint="fake-weights",
            layout=_LAYOUT,
            layers=1,
            kv_heads=1,
            head_size=1,
            embedding_size=1,
            vocabulary_size=FakeVocabulary.size,
            training_context_tokens=training_context_tokens or cells,
            kv_cell_type="fake",
            kv_bytes_per_token=_CELL.itemsize,
            weights_bytes=0,
            chat_template=CHAT_TEMPLATE,
        )
        self.decoded_tokens = 0
        self.exported_tokens = 0
        self.imported_tokens = 0
        self._one_run = one_run
        self._token_cost_s = token_cost_s
        self._content = np.zeros(cells, dtype=_CELL)
        self._map = CellMap(cells=cells, sequences=max_sequences)
        self._guard = SequenceGuard(
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            vocabulary_size=FakeVocabulary.size,
        )
        favoured = [*range(32, 127), 10, 258]
        self._favour = np.zeros(FakeVocabulary.size, dtype=np.float32)
        self._favour[favoured] = 6.0
        self._spread = np.arange(1, FakeVocabulary.size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._fail_next = False
        self._dead = False

    def fail_next_decode(self) -> None:
        """Let the next decode raise DriverFailure; the driver is dead from then on, as the contract says."""
        self._fail_next = True

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self._check_alive()
        growth = self._guard.check_batch(batch)
        if self._fail_next:
            self._dead = True
            raise DriverFailure("The fake model failed because it was told to.")
        places = self._find_free(len(batch.tokens))
        time.sleep(self._token_cost_s * len(batch.tokens))
        states = {int(s): self._state(int(s)) for s in growth.sequences}
        outputs: list[int] = []
        rows = zip(
            places.tolist(),
            batch.tokens.tolist(),
            batch.positions.tolist(),
            batch.sequences.tolist(),
            batch.wants_logits.tolist(),
            strict=True,
        )
        for place, token, position, sequence, wanted in rows:
            value = _mix(states[sequence] ^ _mix(token << 32 | position))
            states[sequence] ^= value
            self._content[place] = (position, value)
            if wanted:
                outputs.append(_mix(states[sequence]))
        for sequence in states:
            self._map.append(sequence, places[np.flatnonzero(batch.sequences == sequence)])
        self._guard.grow(growth)
        self.decoded_tokens += len(batch.tokens)
        return self._logits(np.array(outputs, dtype=np.uint64))

    def copy(self, source: int, target: int, span: Span) -> None:
        self._check_alive()
        self._guard.check_copy(source, target, span)
        self._map.share(source, target, span)
        self._guard.hold(target, span.end)

    def cut(self, sequence: int, start: int = 0) -> None:
        self._check_alive()
        self._guard.check_cut(sequence, start)
        self._map.cut(sequence, start)
        self._guard.cut(sequence, start)

    def export_spans(self, sequence: int, spans: Sequence[Span]) -> list[bytes]:
        self._check_alive()
        self._guard.check_export(sequence, spans)
        blocks: list[bytes] = []
        for span in spans:
            content = self._content[self._map.held(sequence)[span.start : span.end]]
            header = _HEADER.pack(_LAYOUT.encode(), span.start, len(content))
            blocks.append(header + content.tobytes())
            self.exported_tokens += len(content)
        return blocks

    def import_spans(self, sequence: int, blocks: Sequence[tuple[Span, bytes]], span: Span) -> None:
        self._check_alive()
        self._guard.check_import(sequence, [block for block, _ in blocks], span)
        if span.start == span.end:
            return
        parts = [self._parse(block, data) for block, data in blocks]
        whole = np.concatenate(parts)
        first = blocks[0][0].start
        content = whole[span.start - first : span.end - first]
        places = self._find_free(len(content))
        self._content[places] = content
        self._map.append(sequence, places)
        self._guard.hold(sequence, span.end)
        self.imported_tokens += len(content)

    def used_cells(self) -> int:
        return self._map.used()

    def defragment(self) -> None:
        self._check_alive()
        groups = list(self._map.groups_above(self._map.first_hole()))
        lifted = [self._content[self._map.held(g.holders[0])[g.span.start : g.span.end]] for g in groups]
        for group in groups:
            self._map.lift(group)
        for group, content in zip(groups, lifted, strict=True):
            places = self._find_free(len(content))
            self._content[places] = content
            self._map.land(group, places)

    def clear(self) -> None:
        self._check_alive()
        for sequence in range(self.max_sequences):
            self.cut(sequence)

    def close(self) -> None:
        self._dead = True

    def _check_alive(self) -> None:
        if self._dead:
            raise DriverFailure("The fake driver has failed or was closed and must not be used.")

    def _state(self, sequence: int) -> int:
        """What the sequence holds, in one number."""
        return int(np.bitwise_xor.reduce(self._content["value"][self._map.held(sequence)]))

    def _find_free(self, count: int) -> NDArray[np.int64]:
        """Cells for `count` tokens, lowest first; one run where the fake was told so."""
        places = self._map.lowest_run(count) if self._one_run else self._map.lowest(count)
        if places is None:
            free = self.cells - self._map.used()
            raise OutOfCells(
                f"{count} cells are needed{' in one run' * self._one_run}; {free} of {self.cells} are free."
            )
        return places

    def _parse(self, block: Span, data: bytes) -> NDArray[np.void]:
        length = block.end - block.start
        if len(data) != _HEADER.size + length * _CELL.itemsize:
            raise ValueError(
                f"the bytes of block [{block.start}, {block.end}) have the wrong length, {len(data)}"
            )
        layout, start, count = _HEADER.unpack_from(data)
        if layout.rstrip(b"\0") != _LAYOUT.encode() or (start, count) != (block.start, length):
            raise ValueError(
                f"the bytes of block [{block.start}, {block.end}) belong elsewhere: start {start}, {count}"
            )
        content = np.frombuffer(data, dtype=_CELL, offset=_HEADER.size)
        if not np.array_equal(content["position"], np.arange(block.start, block.end)):
            raise ValueError(f"the cells of block [{block.start}, {block.end}) hold other positions")
        return content

    def _logits(self, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        """SplitMix64 again, over vocabulary x seeds; uniform in [-4, 4) before the favour."""
        z = seeds[:, None] + self._spread[None, :]
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        uniform = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
        return uniform * np.float32(8) - np.float32(4) + self._favour

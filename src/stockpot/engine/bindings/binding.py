"""The C interface that llama.cpp and its fork share, called as it is.

Nothing here checks its arguments: the libraries abort the process on misuse, so `LlamaCppDriver` checks
before it calls. Handles are addresses, valid until freed. Struct layouts and the names that differ are in the
subclasses.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stockpot.errors import ModelError

Handle = int
KV_CELL_TYPES = {"f16": 1, "q8_0": 8}  # enum ggml_type
_WARNING, _ERROR = 3, 4  # enum ggml_log_level
_PIECE_BYTES = 64
_METADATA_BYTES = 1 << 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ContextShape:
    """What a context is opened with. `sequences` includes the driver's scratch sequence."""

    cells: int
    sequences: int
    batch_tokens: int
    threads: int
    kv_cell_type: str
    flash_attention: bool


@dataclass(frozen=True, slots=True)
class StateFormat:
    """How `state_get` begins: `count_at` is where the number of cells stands (u32); from `cells_at` on come
    `words` 32-bit words for each cell, the first of them its position."""

    count_at: int
    cells_at: int
    words: int


@dataclass(frozen=True, slots=True)
class Traits:
    """How a library behaves where the two differ.

    `runs`: a batch needs one run of adjoining free cells, taken lowest first (else any free cells do).
    `sound_flash_attention`: flash attention sees all cells of a sequence wherever they lie.
    `sound_range`: attention reaches the highest used cell even when pages below it end in free cells.
    `fast_8_bit_cells`: attention over KV cells of type q8_0 is faster than over f16.
    """

    runs: bool
    sound_flash_attention: bool
    sound_range: bool
    fast_8_bit_cells: bool


class LogTail:
    """Takes the library's log: warnings and errors go to `logging` as debug lines, the first error is
    kept: it tells the cause, those after it only who passed it on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._error = ""

    def __call__(self, level: int, text: bytes | None, _user: object) -> None:
        line = (text or b"").decode(errors="replace").strip()
        if level in (_WARNING, _ERROR) and line:
            _log.debug("%s: %s", self._name, line)
        if level == _ERROR and line and not self._error:
            self._error = line

    def take_error(self) -> str:
        """The first error since the previous call, "" where there was none."""
        line, self._error = self._error, ""
        return line


class BatchBuffers:
    """One llama_batch whose arrays are numpy's: filled by slices, made once."""

    def __init__(self, batch: Any, capacity: int) -> None:
        self.struct = batch
        self.tokens = np.zeros(capacity, dtype=np.int32)
        self.positions = np.zeros(capacity, dtype=np.int32)
        self.sequences = np.zeros(capacity, dtype=np.int32)
        self.wants_logits = np.zeros(capacity, dtype=np.int8)
        self._sequence_counts = np.ones(capacity, dtype=np.int32)
        first = self.sequences.ctypes.data
        self._sequence_pointers = np.arange(first, first + 4 * capacity, 4, dtype=np.uintp)
        for field, array in (
            ("token", self.tokens),
            ("pos", self.positions),
            ("n_seq_id", self._sequence_counts),
            ("seq_id", self._sequence_pointers),
            ("logits", self.wants_logits),
        ):
            pointer: Any = type(getattr(batch, field))  # pyright: ignore[reportUnknownVariableType] - POINTER(...)
            setattr(batch, field, ctypes.cast(array.ctypes.data, pointer))


def _nothing_but_architecture(architecture: str) -> bytes:
    """A GGUF file (version 3) without tensors, with one key."""
    key, value = b"general.architecture", architecture.encode()
    string = 8  # enum gguf_type
    return (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
        + struct.pack("<Q", len(key))
        + key
        + struct.pack("<IQ", string, len(value))
        + value
    )


class Binding(ABC):
    """One library, loaded. All calls that compute release the GIL."""

    name: str
    version: str
    library: Path
    traits: Traits
    state_format: StateFormat
    file_types: dict[str, int]
    """Encodings this library can write, with their number in enum llama_ftype."""

    def __init__(self, api: Any, *, name: str, version: str, library: Path) -> None:
        self.name = name
        self.version = version
        self.library = library
        self._api = api
        self._tail = LogTail(name)
        self._silence()
        api.llama_backend_init()

    def _silence(self) -> None:
        """Send the library's log to the tail. The library keeps the pointer as long as the process lives, so
        the callback must live as long: its reference is given away on purpose."""
        callback = self._log_callback_type()(self._tail)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(callback))
        self._api.llama_log_set(callback, None)

    def _log_callback_type(self) -> Any:
        return ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

    # The model

    def load_model(self, path: Path, *, vocabulary_only: bool = False) -> Handle:
        """Raises ModelError with what the library said."""
        self._tail.take_error()
        model = self._api.llama_model_load_from_file(
            str(path).encode(), self._model_parameters(vocabulary_only=vocabulary_only)
        )
        if not model:
            raise ModelError(
                f"{self.name} cannot load {path}: {self._tail.take_error() or 'no reason given'}."
            )
        return model

    def knows_architecture(self, architecture: str) -> bool:
        """Whether the library can build models of this architecture, as it says itself: it is given a file
        that holds nothing but the name, and complains either of the name or of what else is missing."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "architecture.gguf"
            path.write_bytes(_nothing_but_architecture(architecture))
            try:
                self.free_model(self.load_model(path, vocabulary_only=True))
            except ModelError as error:
                return "unknown model architecture" not in str(error) and "unknown architecture" not in str(
                    error
                )
        return True

    @abstractmethod
    def free_model(self, model: Handle) -> None: ...

    @abstractmethod
    def model_parameters(self) -> Any:
        """The library's default llama_model_params."""

    @abstractmethod
    def context_parameters(self) -> Any:
        """The library's default llama_context_params."""

    @abstractmethod
    def _model_parameters(self, *, vocabulary_only: bool) -> Any: ...

    @abstractmethod
    def _context_parameters(self, shape: ContextShape) -> Any: ...

    def weights_bytes(self, model: Handle) -> int:
        return int(self._api.llama_model_size(model))

    def metadata(self, model: Handle, key: str) -> str | None:
        """A scalar or string value of the model file, as text."""
        buffer = ctypes.create_string_buffer(_METADATA_BYTES)
        length = self._api.llama_model_meta_val_str(model, key.encode(), buffer, _METADATA_BYTES)
        if length < 0:
            return None
        if length >= _METADATA_BYTES:
            buffer = ctypes.create_string_buffer(length + 1)
            self._api.llama_model_meta_val_str(model, key.encode(), buffer, length + 1)
        return buffer.value.decode(errors="replace")

    def unsuited(self, model: Handle) -> str | None:
        """Why the model has no KV cache that can be cut and shared token by token; None where it has."""
        if self._api.llama_model_has_encoder(model):
            return "it has an encoder"
        if self._api.llama_model_is_recurrent(model) or self._api.llama_model_is_hybrid(model):
            return "it keeps a recurrent state"
        return None

    # The vocabulary

    def vocabulary_size(self, model: Handle) -> int:
        return int(self._api.llama_vocab_n_tokens(self._vocabulary(model)))

    def begin_token(self, model: Handle) -> int:
        """-1 where the model has none."""
        return int(self._api.llama_vocab_bos(self._vocabulary(model)))

    def end_token(self, model: Handle) -> int:
        """-1 where the model has none."""
        return int(self._api.llama_vocab_eos(self._vocabulary(model)))

    def wants_begin(self, model: Handle) -> bool:
        return bool(self._api.llama_vocab_get_add_bos(self._vocabulary(model)))

    def ends_generation(self, model: Handle, token: int) -> bool:
        return bool(self._api.llama_vocab_is_eog(self._vocabulary(model), token))

    def tokenize(self, model: Handle, text: bytes, *, special: bool) -> list[int]:
        """Token ids of UTF-8 text, no begin or end token added."""
        vocabulary = self._vocabulary(model)
        capacity = len(text) + 2
        for _ in range(2):
            tokens = np.empty(capacity, dtype=np.int32)
            count = self._tokenize(vocabulary, text, tokens, special)
            if count >= 0:
                return tokens[:count].tolist()
            capacity = -count
        raise ModelError(f"{self.name} cannot tokenise a text of {len(text)} bytes.")

    def piece(self, model: Handle, token: int, *, special: bool) -> bytes:
        vocabulary = self._vocabulary(model)
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._token_to_piece(vocabulary, token, buffer, size, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def _vocabulary(self, model: Handle) -> Handle:
        return self._api.llama_model_get_vocab(model)

    @abstractmethod
    def _tokenize(self, vocabulary: Handle, text: bytes, out: NDArray[np.int32], special: bool) -> int: ...

    @abstractmethod
    def _token_to_piece(
        self, vocabulary: Handle, token: int, out: ctypes.Array[ctypes.c_char], size: int, special: bool
    ) -> int: ...

    # The context

    def open_context(self, model: Handle, shape: ContextShape) -> Handle:
        """Raises ModelError with what the library said (not enough memory, mostly)."""
        self._tail.take_error()
        context = self._api.llama_init_from_model(model, self._context_parameters(shape))
        if not context:
            raise ModelError(
                f"{self.name} cannot open a context of {shape.cells} tokens with {shape.kv_cell_type} cells: "
                f"{self._tail.take_error() or 'no reason given'}. A smaller engine.context_tokens may fit."
            )
        return context

    def free_context(self, context: Handle) -> None:
        self._api.llama_free(context)

    def cells(self, context: Handle) -> int:
        return int(self._api.llama_n_ctx(context))

    @abstractmethod
    def new_batch(self, capacity: int) -> BatchBuffers: ...

    def decode(self, context: Handle, batch: BatchBuffers) -> int:
        """0: done. 1: no room for the batch, nothing changed. Less than 0: failed."""
        return int(self._api.llama_decode(context, batch.struct))

    def synchronize(self, context: Handle) -> None:
        self._api.llama_synchronize(context)

    def logits(self, context: Handle, rows: int, columns: int) -> NDArray[np.float32]:
        """The library's own buffer, rows in the order of the batch; valid until the next decode."""
        pointer = self._api.llama_get_logits(context)
        return np.ctypeslib.as_array(pointer, (rows, columns))

    @abstractmethod
    def copy(self, context: Handle, source: int, target: int, start: int, end: int) -> None: ...

    @abstractmethod
    def remove(self, context: Handle, sequence: int, start: int, end: int) -> None:
        """`end` -1: to the last position."""

    @abstractmethod
    def clear(self, context: Handle) -> None: ...

    @abstractmethod
    def used_cells(self, context: Handle) -> int | None: ...

    # Bytes of a sequence

    @abstractmethod
    def state_size(self, context: Handle, sequence: int) -> int: ...

    @abstractmethod
    def state_get(self, context: Handle, sequence: int, address: int, size: int) -> int:
        """Write the KV of a sequence to memory; the bytes written, 0 where it failed."""

    @abstractmethod
    def state_set(self, context: Handle, sequence: int, data: bytes) -> int:
        """Replace what a sequence holds; the bytes read, 0 where it failed (no room, other layout)."""

    # Encodings

    def quantize(self, source: Path, target: Path, encoding: str, *, threads: int = 0) -> None:
        """Write `source` again with all its weight matrices in `encoding`; 0 threads: all processors.
        Raises ModelError."""
        file_type = self.file_types.get(encoding)
        if file_type is None:
            raise ModelError(f"{self.name} cannot write {encoding}; it knows {', '.join(self.file_types)}.")
        self._tail.take_error()
        parameters = self._api.llama_model_quantize_default_params()
        parameters.nthread = threads
        parameters.ftype = file_type
        parameters.allow_requantize = True
        parameters.pure = True
        failed = self._api.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
        if failed:
            raise ModelError(
                f"{self.name} cannot write {source} as {encoding}: "
                f"{self._tail.take_error() or 'no reason given'}."
            )

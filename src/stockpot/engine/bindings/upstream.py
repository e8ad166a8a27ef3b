"""llama.cpp itself, through the low-level module of llama-cpp-python. Its high-level classes and its caches
are never used (they pickle)."""

from __future__ import annotations

import ctypes
import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.bindings.binding import (
    KV_CELL_TYPES,
    BatchBuffers,
    Binding,
    ContextShape,
    Handle,
    StateFormat,
    Traits,
)
from stockpot.errors import BindingUnavailable

NAME = "llama-cpp"
PACKAGE = "llama-cpp-python"
_FLASH_ATTENTION_ON, _FLASH_ATTENTION_OFF = 1, 0


def installed_version() -> str | None:
    """The version of the package, without importing it; None where it is missing."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


class UpstreamBinding(Binding):
    """Upstream. Cells are found anywhere, so no run of them is needed; it does not tell how many are used."""

    traits = Traits(runs=False, sound_flash_attention=True, sound_range=True, fast_8_bit_cells=False)
    state_format = StateFormat(count_at=12, cells_at=16, words=3)
    file_types = {  # noqa: RUF012 - a constant table, described in the base class
        "f32": 0,
        "f16": 1,
        "q4_0": 2,
        "q4_1": 3,
        "q8_0": 7,
        "q6_k": 18,
        "bf16": 32,
    }

    def __init__(self) -> None:
        found = installed_version()
        try:
            api: Any = importlib.import_module("llama_cpp.llama_cpp")
        except (ImportError, OSError, RuntimeError) as error:
            raise BindingUnavailable(
                f"{PACKAGE} cannot be loaded: {error}. Install it with: pip install 'stockpot[llama-cpp]'"
            ) from error
        super().__init__(
            api, name=NAME, version=found or "unknown", library=Path(api.__file__).parent / "lib"
        )

    def _log_callback_type(self) -> Any:
        return self._api.llama_log_callback

    def free_model(self, model: Handle) -> None:
        self._api.llama_model_free(model)

    def model_parameters(self) -> Any:
        return self._api.llama_model_default_params()

    def context_parameters(self) -> Any:
        return self._api.llama_context_default_params()

    def _model_parameters(self, *, vocabulary_only: bool) -> Any:
        parameters = self.model_parameters()
        parameters.vocab_only = vocabulary_only
        return parameters

    def _context_parameters(self, shape: ContextShape) -> Any:
        parameters = self.context_parameters()
        parameters.n_ctx = shape.cells
        parameters.n_batch = parameters.n_ubatch = shape.batch_tokens
        parameters.n_seq_max = shape.sequences
        parameters.n_threads = parameters.n_threads_batch = shape.threads
        parameters.type_k = parameters.type_v = KV_CELL_TYPES[shape.kv_cell_type]
        parameters.flash_attn_type = _FLASH_ATTENTION_ON if shape.flash_attention else _FLASH_ATTENTION_OFF
        parameters.kv_unified = True
        # Sliding-window layers keep all their cells, or a prefix could not be cut and shared.
        parameters.swa_full = True
        return parameters

    def _tokenize(self, vocabulary: Handle, text: bytes, out: NDArray[np.int32], special: bool) -> int:
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        return self._api.llama_tokenize(vocabulary, text, len(text), pointer, len(out), False, special)

    def _token_to_piece(
        self, vocabulary: Handle, token: int, out: ctypes.Array[ctypes.c_char], size: int, special: bool
    ) -> int:
        return self._api.llama_token_to_piece(vocabulary, token, out, size, 0, special)

    def new_batch(self, capacity: int) -> BatchBuffers:
        return BatchBuffers(self._api.llama_batch(), capacity)

    def copy(self, context: Handle, source: int, target: int, start: int, end: int) -> None:
        self._api.llama_memory_seq_cp(self._memory(context), source, target, start, end)

    def remove(self, context: Handle, sequence: int, start: int, end: int) -> None:
        self._api.llama_memory_seq_rm(self._memory(context), sequence, start, end)

    def clear(self, context: Handle) -> None:
        self._api.llama_memory_clear(self._memory(context), True)

    def used_cells(self, context: Handle) -> None:
        del context  # the library does not tell

    def state_size(self, context: Handle, sequence: int) -> int:
        return int(self._api.llama_state_seq_get_size(context, sequence))

    def state_get(self, context: Handle, sequence: int, address: int, size: int) -> int:
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        return int(self._api.llama_state_seq_get_data(context, pointer, size, sequence))

    def state_set(self, context: Handle, sequence: int, data: bytes) -> int:
        pointer = ctypes.cast(ctypes.c_char_p(data), ctypes.POINTER(ctypes.c_uint8))
        return int(self._api.llama_state_seq_set_data(context, pointer, len(data), sequence))

    def _memory(self, context: Handle) -> Handle:
        return self._api.llama_get_memory(context)

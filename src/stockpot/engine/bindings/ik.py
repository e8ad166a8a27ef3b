"""ik_llama.cpp, as the package ik-llama-cpp-python 0.1.5 carries it, or built natively from the same source.

Structs follow include/llama.h of that source. The package's own Python is not imported: it would load its
library whichever one is wanted.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
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

NAME = "ik"
PACKAGE = "ik-llama-cpp-python"
VERSION = "0.1.5"
_NO_FLAGS = 0


class ModelParameters(ctypes.Structure):
    """struct llama_model_params"""

    _fields_ = [
        ("devices", c_char_p),
        ("n_gpu_layers", c_int32),
        ("mla", c_int32),
        ("split_mode", c_int),
        ("main_gpu", c_int32),
        ("max_gpu", c_int32),
        ("ncmoe", c_int32),
        ("type_k", c_int),
        ("type_v", c_int),
        ("max_ctx_size", c_uint32),
        ("n_seq_max", c_int32),
        ("n_ubatch", c_int32),
        ("amb", c_int32),
        ("fit_margin", c_int32),
        ("fit", c_bool),
        ("worst_graph_tokens", c_int32),
        ("type_k_first", c_int),
        ("type_k_last", c_int),
        ("type_v_first", c_int),
        ("type_v_last", c_int),
        ("n_k_first", c_int32),
        ("n_k_last", c_int32),
        ("n_v_first", c_int32),
        ("n_v_last", c_int32),
        ("tensor_split", c_void_p),
        ("rpc_servers", c_char_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("use_mmap", c_bool),
        ("use_mlock", c_bool),
        ("check_tensors", c_bool),
        ("repack_tensors", c_bool),
        ("use_thp", c_bool),
        ("validate_quants", c_bool),
        ("merge_qkv", c_bool),
        ("merge_up_gate_exps", c_bool),
        ("mtp", c_bool),
        ("dry_run", c_bool),
        ("flash_attn", c_bool),
    ]


class ContextParameters(ctypes.Structure):
    """struct llama_context_params"""

    _fields_ = [
        ("seed", c_uint32),
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_threads", c_uint32),
        ("n_threads_batch", c_uint32),
        ("max_extra_alloc", c_int32),
        ("worst_case_tokens", c_int32),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("type_reduce", c_int),
        ("type_k_first", c_int),
        ("type_k_last", c_int),
        ("type_v_first", c_int),
        ("type_v_last", c_int),
        ("n_k_first", c_int32),
        ("n_k_last", c_int32),
        ("n_v_first", c_int32),
        ("n_v_last", c_int32),
        ("logits_all", c_bool),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("flash_attn", c_bool),
        ("mla_attn", c_int),
        ("attn_max_batch", c_int),
        ("fused_moe_up_gate", c_bool),
        ("grouped_expert_routing", c_bool),
        ("fused_up_gate", c_bool),
        ("fused_mmad", c_bool),
        ("rope_cache", c_bool),
        ("graph_reuse", c_bool),
        ("min_experts", c_int),
        ("thresh_experts", c_float),
        ("only_active_experts", c_bool),
        ("k_cache_hadamard", c_bool),
        ("v_cache_hadamard", c_bool),
        ("split_mode_graph_scheduling", c_bool),
        ("scheduler_async", c_bool),
        ("mtp", c_bool),
        ("mtp_op_type", c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("offload_policy", c_void_p),
        ("cuda_params", c_void_p),
    ]


class QuantizeParameters(ctypes.Structure):
    """struct llama_model_quantize_params"""

    _fields_ = [
        ("nthread", c_int32),
        ("ftype", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        ("attn_q_type", c_int),
        ("attn_k_type", c_int),
        ("attn_v_type", c_int),
        ("attn_qkv_type", c_int),
        ("attn_output_type", c_int),
        ("ffn_gate_type", c_int),
        ("ffn_down_type", c_int),
        ("ffn_up_type", c_int),
        ("ffn_gate_inp_type", c_int),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("keep_split", c_bool),
        ("ignore_imatrix_rules", c_bool),
        ("only_repack", c_bool),
        ("dry_run", c_bool),
        ("partial_requant", c_bool),
        ("imatrix", c_void_p),
        ("kv_overrides", c_void_p),
        ("custom_quants", c_void_p),
        ("repack_pattern", c_void_p),
    ]


class BatchStruct(ctypes.Structure):
    """struct llama_batch"""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
        ("all_pos_0", c_int32),
        ("all_pos_1", c_int32),
        ("all_seq_id", c_int32),
    ]


_MODEL = _CONTEXT = _VOCABULARY = c_void_p
_SEQUENCE = _POSITION = _TOKEN = c_int32
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "llama_backend_init": ([], None),
    "llama_log_set": ([c_void_p, c_void_p], None),
    "llama_model_default_params": ([], ModelParameters),
    "llama_context_default_params": ([], ContextParameters),
    "llama_model_quantize_default_params": ([], QuantizeParameters),
    "llama_model_load_from_file": ([c_char_p, ModelParameters], c_void_p),
    "llama_free_model": ([_MODEL], None),
    "llama_init_from_model": ([_MODEL, ContextParameters], c_void_p),
    "llama_free": ([_CONTEXT], None),
    "llama_n_ctx": ([_CONTEXT], c_uint32),
    "llama_model_size": ([_MODEL], ctypes.c_uint64),
    "llama_model_meta_val_str": ([_MODEL, c_char_p, c_char_p, c_size_t], c_int32),
    "llama_model_has_encoder": ([_MODEL], c_bool),
    "llama_model_is_recurrent": ([_MODEL], c_bool),
    "llama_model_is_hybrid": ([_MODEL], c_bool),
    "llama_model_get_vocab": ([_MODEL], c_void_p),
    "llama_vocab_n_tokens": ([_VOCABULARY], c_int32),
    "llama_vocab_bos": ([_VOCABULARY], _TOKEN),
    "llama_vocab_eos": ([_VOCABULARY], _TOKEN),
    "llama_vocab_get_add_bos": ([_VOCABULARY], c_bool),
    "llama_vocab_is_eog": ([_VOCABULARY, _TOKEN], c_bool),
    "llama_vocab_tokenize": ([_VOCABULARY, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool], c_int32),
    "llama_token_to_piece_vocab": ([_VOCABULARY, _TOKEN, c_char_p, c_int32, c_int32, c_bool], c_int32),
    "llama_decode": ([_CONTEXT, BatchStruct], c_int32),
    "llama_synchronize": ([_CONTEXT], None),
    "llama_get_logits": ([_CONTEXT], POINTER(c_float)),
    "llama_kv_cache_seq_cp": ([_CONTEXT, _SEQUENCE, _SEQUENCE, _POSITION, _POSITION], None),
    "llama_kv_cache_seq_rm": ([_CONTEXT, _SEQUENCE, _POSITION, _POSITION], c_bool),
    "llama_kv_cache_clear": ([_CONTEXT], None),
    "llama_get_kv_cache_used_cells": ([_CONTEXT], c_int32),
    "llama_state_seq_get_size": ([_CONTEXT, _SEQUENCE, c_uint32], c_size_t),
    "llama_state_seq_get_data": ([_CONTEXT, c_void_p, c_size_t, _SEQUENCE, c_uint32], c_size_t),
    "llama_state_seq_set_data": ([_CONTEXT, c_char_p, c_size_t, _SEQUENCE, c_uint32], c_size_t),
    "llama_model_quantize": ([c_char_p, c_char_p, POINTER(QuantizeParameters)], c_uint32),
}


def wheel_library() -> Path | None:
    """The library in the installed wheel; None where the package is missing or of another version."""
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return None
    spec = importlib.util.find_spec("ik_llama_cpp")
    if installed != VERSION or spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libllama.so"
    return library if library.is_file() else None


class IkBinding(Binding):
    """The fork. Its state functions take flags; its KV functions have the older names."""

    state_format = StateFormat(count_at=0, cells_at=4, words=2)
    file_types = {  # noqa: RUF012 - a constant table, described in the base class
        "f32": 0,
        "f16": 1,
        "q4_0": 2,
        "q4_1": 3,
        "q8_0": 7,
        "q6_k": 18,
        "bf16": 32,
        "q6_0": 135,
        "q8_kv": 149,
        "q8_0_r8": 207,
        "bf16_r16": 232,
        "q8_kv_r8": 398,
        "q8_k_r8": 399,
    }

    def __init__(self, library: Path, *, corrected: bool) -> None:
        """`corrected`: built with the edits of `native_build`, which repair what `traits` tells of."""
        try:
            # Workers meet at some hundred barriers a step. By default libgomp spins there for milliseconds:
            # when another program takes a processor, the spinning thread keeps the one it waits for from
            # running (decode step 96 ms beside one busy process, 20 ms so; alone 7.4 and 7.8). Read once,
            # when the library comes in; a value of the user's own stands.
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
            api = ctypes.CDLL(str(library))
            for name, (arguments, result) in _FUNCTIONS.items():
                function = getattr(api, name)
                function.argtypes, function.restype = arguments, result
        except (OSError, AttributeError) as error:
            raise BindingUnavailable(
                f"{library} cannot be used: {error}. Install {PACKAGE}=={VERSION} again, "
                "or run: stockpot engine build --force"
            ) from error
        self.traits = Traits(
            runs=True,
            sound_flash_attention=corrected,
            sound_range=corrected,
            fast_8_bit_cells=corrected,
        )
        super().__init__(api, name=NAME, version=VERSION, library=library)

    def free_model(self, model: Handle) -> None:
        self._api.llama_free_model(model)

    def model_parameters(self) -> ModelParameters:
        return self._api.llama_model_default_params()

    def context_parameters(self) -> ContextParameters:
        return self._api.llama_context_default_params()

    def _model_parameters(self, *, vocabulary_only: bool) -> ModelParameters:
        parameters = self.model_parameters()
        parameters.vocab_only = vocabulary_only
        return parameters

    def _context_parameters(self, shape: ContextShape) -> ContextParameters:
        parameters = self.context_parameters()
        parameters.n_ctx = shape.cells
        # One physical batch: a batch that is split may fail half way.
        parameters.n_batch = parameters.n_ubatch = shape.batch_tokens
        parameters.n_seq_max = shape.sequences
        parameters.n_threads = parameters.n_threads_batch = shape.threads
        parameters.type_k = parameters.type_v = KV_CELL_TYPES[shape.kv_cell_type]
        parameters.flash_attn = shape.flash_attention
        return parameters

    def _tokenize(self, vocabulary: Handle, text: bytes, out: NDArray[np.int32], special: bool) -> int:
        return self._api.llama_vocab_tokenize(
            vocabulary, text, len(text), out.ctypes.data, len(out), False, special
        )

    def _token_to_piece(
        self, vocabulary: Handle, token: int, out: ctypes.Array[ctypes.c_char], size: int, special: bool
    ) -> int:
        return self._api.llama_token_to_piece_vocab(vocabulary, token, out, size, 0, special)

    def new_batch(self, capacity: int) -> BatchBuffers:
        return BatchBuffers(BatchStruct(), capacity)

    def copy(self, context: Handle, source: int, target: int, start: int, end: int) -> None:
        self._api.llama_kv_cache_seq_cp(context, source, target, start, end)

    def remove(self, context: Handle, sequence: int, start: int, end: int) -> None:
        self._api.llama_kv_cache_seq_rm(context, sequence, start, end)

    def clear(self, context: Handle) -> None:
        self._api.llama_kv_cache_clear(context)

    def used_cells(self, context: Handle) -> int:
        return int(self._api.llama_get_kv_cache_used_cells(context))

    def state_size(self, context: Handle, sequence: int) -> int:
        return int(self._api.llama_state_seq_get_size(context, sequence, _NO_FLAGS))

    def state_get(self, context: Handle, sequence: int, address: int, size: int) -> int:
        return int(self._api.llama_state_seq_get_data(context, address, size, sequence, _NO_FLAGS))

    def state_set(self, context: Handle, sequence: int, data: bytes) -> int:
        return int(self._api.llama_state_seq_set_data(context, data, len(data), sequence, _NO_FLAGS))

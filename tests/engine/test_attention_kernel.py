"""Eight-bit cells against 16-bit ones, on models of many shapes: the default model has only one.

Where `stockpot engine build` has been run on a processor with AVX-512, our own kernel works here, elsewhere
the library's; both must keep what the model says. Tokens of three sequences lie mixed, with gaps between.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stockpot.engine.bindings.native import native_library
from stockpot.engine.driver import Batch, Driver, Span
from stockpot.engine.llamacpp import open_driver
from stockpot.settings import Settings

MAX_ERROR = 0.02
"""Root mean square, of the spread of the logits; 0.0064 with our kernel and with the library's own."""
_STRING, _ARRAY, _U32, _I32, _F32 = 8, 9, 4, 5, 6  # enum gguf_type
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}  # enum ggml_type
_ALIGNMENT = 32
_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6  # enum llama_token_type


@dataclass(frozen=True)
class Shape:
    """A llama without biases; the vocabulary is the 256 bytes behind <unk>, <s>, </s>."""

    heads: int
    kv_heads: int
    head_size: int
    layers: int = 2
    feed_forward: int = 256
    vocabulary: int = 259

    @property
    def embedding(self) -> int:
        return self.heads * self.head_size


SHAPES = (
    Shape(heads=4, kv_heads=4, head_size=64),
    Shape(heads=9, kv_heads=3, head_size=64),
    Shape(heads=8, kv_heads=2, head_size=128),
    Shape(heads=6, kv_heads=1, head_size=128),
    Shape(heads=4, kv_heads=2, head_size=256),
)


def rows_of(driver: Driver) -> NDArray[np.float32]:
    """Logits of a course of steps: prefill in pieces, a shared prefix, decode side by side, gaps."""
    random = np.random.default_rng(2)
    texts = random.integers(3, 259, (3, 700))
    found: list[NDArray[np.float32]] = []

    def step(rows: list[tuple[int, int]], *, wanted: bool = False) -> None:
        sequences, positions = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        tokens = texts[sequences, positions].astype(np.int32)
        wants = np.full(len(rows), wanted)
        logits = driver.decode(Batch(tokens, positions, sequences, wants))
        if wanted:
            found.append(logits.copy())

    texts[1, :200] = texts[0, :200]
    step([(0, i) for i in range(200)])
    driver.copy(0, 1, Span(0, 200))
    step([(2, i) for i in range(37)], wanted=True)
    step([(0, i) for i in range(200, 405)], wanted=True)
    for i in range(37, 45):
        step([(1, 200 + i - 37), (2, i), (0, 405 + i - 37)], wanted=True)
    driver.cut(0)
    step([*((2, i) for i in range(45, 90)), (1, 208)], wanted=True)
    step([(1, 209)], wanted=True)
    return np.concatenate(found)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.heads}x{s.head_size}/{s.kv_heads}")
def test_eight_bit_cells_keep_what_the_model_says(
    shape: Shape, tmp_path: Path, user_settings: Settings
) -> None:
    cache_dir = user_settings.cache_dir
    if native_library(cache_dir) is None:
        pytest.skip("the native library is not built: stockpot engine build")
    path = tmp_path / "random.gguf"
    write_model(path, shape)
    found: list[NDArray[np.float32]] = []
    for kv_cell_type in ("f16", "q8_0"):
        driver = open_driver(
            path,
            name="random",
            library="native",
            cache_dir=cache_dir,
            cells=2048,
            max_sequences=3,
            max_batch_tokens=256,
            kv_cell_type=kv_cell_type,
            threads=2,
        )
        found.append(rows_of(driver))
        driver.close()
    exact, rounded = found
    error = float(np.sqrt(np.square(exact - rounded).mean()) / exact.std())
    print(f"error {error:.4f} of the spread")
    assert error < MAX_ERROR


def write_model(path: Path, shape: Shape, seed: int = 1) -> None:
    """Write `path`, a GGUF (version 3) with matrices in float16."""
    tensors = dict(_tensors(shape, np.random.default_rng(seed)))
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs := _pairs(shape)))
    head += b"".join(_string(key) + value for key, value in pairs.items())
    data = b""
    for name, tensor in tensors.items():
        sizes = struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape))
        head += _string(name) + struct.pack("<I", tensor.ndim) + sizes
        head += struct.pack("<IQ", _TYPES[tensor.dtype], len(data))
        data += _padded(tensor.tobytes())
    path.write_bytes(_padded(head) + data)


def _tensors(
    shape: Shape, random: np.random.Generator
) -> Iterator[tuple[str, NDArray[np.float16] | NDArray[np.float32]]]:
    def matrix(rows: int, columns: int, scale: float = 1.0) -> NDArray[np.float16]:
        return (random.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float16)

    width, keys = shape.embedding, shape.kv_heads * shape.head_size
    ones = np.ones(width, np.float32)
    yield "token_embd.weight", matrix(shape.vocabulary, width, scale=width**0.5)
    yield "output_norm.weight", ones
    yield "output.weight", matrix(shape.vocabulary, width, scale=4.0)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", ones
        yield block + "attn_q.weight", matrix(width, width, scale=2.0)  # scores wide enough to choose
        yield block + "attn_k.weight", matrix(keys, width)
        yield block + "attn_v.weight", matrix(keys, width)
        yield block + "attn_output.weight", matrix(width, width)
        yield block + "ffn_norm.weight", ones
        yield block + "ffn_gate.weight", matrix(shape.feed_forward, width)
        yield block + "ffn_up.weight", matrix(shape.feed_forward, width)
        yield block + "ffn_down.weight", matrix(width, shape.feed_forward)


def _pairs(shape: Shape) -> dict[str, bytes]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *([_BYTE] * 256)]
    words = b"".join(map(_string, tokens))
    return {
        "general.architecture": struct.pack("<I", _STRING) + _string("llama"),
        "llama.context_length": _u32(4096),
        "llama.embedding_length": _u32(shape.embedding),
        "llama.block_count": _u32(shape.layers),
        "llama.feed_forward_length": _u32(shape.feed_forward),
        "llama.attention.head_count": _u32(shape.heads),
        "llama.attention.head_count_kv": _u32(shape.kv_heads),
        "llama.rope.dimension_count": _u32(shape.head_size),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", _F32, 1e-5),
        "tokenizer.ggml.model": struct.pack("<I", _STRING) + _string("llama"),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", _ARRAY, _STRING, len(tokens)) + words,
        "tokenizer.ggml.scores": struct.pack(
            f"<IIQ{len(tokens)}f", _ARRAY, _F32, len(tokens), *[0.0] * len(tokens)
        ),
        "tokenizer.ggml.token_type": struct.pack(f"<IIQ{len(tokens)}i", _ARRAY, _I32, len(tokens), *kinds),
        "tokenizer.ggml.bos_token_id": _u32(1),
        "tokenizer.ggml.eos_token_id": _u32(2),
    }


def _u32(value: int) -> bytes:
    return struct.pack("<II", _U32, value)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)

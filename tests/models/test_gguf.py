"""Facts of a GGUF file, from one made here byte by byte; damaged ones end in a sentence."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stockpot.errors import ModelError, ModelNotFound
from stockpot.models.gguf import read_facts

U32, F32, STRING, ARRAY = 4, 6, 8, 9
ALIGNMENT = 32


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _string(value: str) -> bytes:
    return struct.pack("<I", STRING) + _text(value)


def _u32(value: int) -> bytes:
    return struct.pack("<II", U32, value)


def _f32(value: float) -> bytes:
    return struct.pack("<If", F32, value)


def _strings(*values: str) -> bytes:
    return struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(_text, values))


def _u32s(*values: int) -> bytes:
    return struct.pack(f"<IIQ{len(values)}I", ARRAY, U32, len(values), *values)


LLAMA = {
    "general.architecture": _string("llama"),
    "general.name": _string("Ladle"),
    "llama.block_count": _u32(2),
    "llama.attention.head_count": _u32(4),
    "llama.attention.head_count_kv": _u32(2),
    "llama.embedding_length": _u32(128),
    "llama.context_length": _u32(2048),
    "llama.rope.dimension_count": _u32(32),
    "llama.rope.freq_base": _f32(100_000.0),
    "tokenizer.ggml.tokens": _strings("<s>", "salt", "pepper"),
    "tokenizer.chat_template": _string("{{ messages }}"),
}
# Name, shape (row length first), type number, bytes.
TENSORS = (
    ("token_embd.weight", (128, 3), 8, 3 * 128 // 32 * 34),
    ("blk.0.attn_q.weight", (96, 2), 1, 96 * 2 * 2),
    ("output_norm.weight", (128,), 0, 128 * 4),
)


def _gguf(pairs: dict[str, bytes] = LLAMA) -> bytes:
    infos = data = b""
    for name, shape, type_number, size_bytes in TENSORS:
        infos += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos += struct.pack("<IQ", type_number, len(data))
        data += bytes(size_bytes + -size_bytes % ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(TENSORS), len(pairs))
    head += b"".join(_text(key) + value for key, value in pairs.items()) + infos
    return head + bytes(-len(head) % ALIGNMENT) + data


WHOLE = _gguf()
DATA_BYTES = sum(size + -size % ALIGNMENT for *_, size in TENSORS)
_shared_folder = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ladle.gguf"


def test_facts_of_a_small_model(path: Path) -> None:
    path.write_bytes(WHOLE)
    facts = read_facts(path)
    assert (facts.architecture, facts.name, facts.layers) == ("llama", "Ladle", 2)
    assert (facts.heads, facts.kv_heads_by_layer, facts.kv_heads) == (4, (2, 2), 2)
    # Without a length of its own, a head has its share of the embedding.
    assert (facts.key_size, facts.value_size, facts.embedding_size) == (32, 32, 128)
    assert (facts.vocabulary_size, facts.training_context_tokens) == (3, 2048)
    assert (facts.rope.dimensions, facts.rope.frequency_base, facts.rope.scaling) == (32, 100_000.0, None)
    assert facts.chat_template == "{{ messages }}"
    assert facts.elements_by_type == {"q8_0": 384, "f16": 192, "f32": 128}
    assert facts.encoding == "q8_0"
    assert facts.parameters == 704
    assert facts.ragged_types == {"f16"}
    assert (facts.weights_bytes, facts.file_bytes) == (DATA_BYTES, len(WHOLE))
    assert facts.bits_per_weight == 8 * DATA_BYTES / 704
    assert facts.parts == (path,)


def test_key_and_value_sizes_of_their_own_win(path: Path) -> None:
    own = {"llama.attention.key_length": _u32(48), "llama.attention.value_length": _u32(16)}
    path.write_bytes(_gguf(LLAMA | own))
    facts = read_facts(path)
    assert (facts.key_size, facts.value_size) == (48, 16)


def test_kv_heads_may_differ_between_layers(path: Path) -> None:
    path.write_bytes(_gguf(LLAMA | {"llama.attention.head_count_kv": _u32s(0, 2)}))
    assert read_facts(path).kv_heads_by_layer == (0, 2)


def test_without_kv_heads_every_query_head_has_its_own(path: Path) -> None:
    pairs = {key: value for key, value in LLAMA.items() if not key.endswith("head_count_kv")}
    path.write_bytes(_gguf(pairs))
    assert read_facts(path).kv_heads_by_layer == (4, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", _u32(0)),
        ("llama.block_count", _string("two")),
        ("llama.attention.head_count_kv", _u32s(2)),
        ("llama.attention.head_count_kv", _u32s(0, 0)),
        ("llama.rope.freq_base", _f32(float("nan"))),
        ("general.name", _u32(7)),
    ],
)
def test_a_value_that_cannot_be_is_named(path: Path, key: str, value: bytes) -> None:
    path.write_bytes(_gguf(LLAMA | {key: value}))
    with pytest.raises(ModelError, match=key):
        read_facts(path)


@pytest.mark.parametrize("key", ["llama.block_count", "llama.context_length", "llama.embedding_length"])
def test_a_missing_key_is_named(path: Path, key: str) -> None:
    path.write_bytes(_gguf({other: value for other, value in LLAMA.items() if other != key}))
    with pytest.raises(ModelError, match=f"no {key}"):
        read_facts(path)


def test_a_gguf_without_an_architecture_is_no_model(path: Path) -> None:
    path.write_bytes(_gguf({"general.name": _string("Ladle")}))
    with pytest.raises(ModelError, match="does not say its architecture"):
        read_facts(path)


@_shared_folder
@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_truncated_file_is_a_model_error(path: Path, length: int) -> None:
    # The last tensor fills its place to the last byte, so every cut takes something away.
    path.write_bytes(WHOLE[:length])
    with pytest.raises(ModelError):
        read_facts(path)


@_shared_folder
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - DATA_BYTES - 1), st.integers(1, 255)), min_size=1, max_size=4
    )
)
def test_flipped_bytes_raise_nothing_but_a_model_error(path: Path, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(WHOLE)
    for at, mask in flips:
        damaged[at] ^= mask
    path.write_bytes(damaged)
    try:
        facts = read_facts(path)
    except ModelError as error:
        assert str(path) in str(error)
    else:
        # Some flips are plausible (a letter of the name); then the facts stay within sense.
        assert facts.layers == len(facts.kv_heads_by_layer) >= 1
        assert facts.bits_per_weight >= 0


@pytest.mark.parametrize("content", [b"", b"GGU", b"Once upon a time", b"GGML" + bytes(64)])
def test_another_kind_of_file_is_a_model_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        read_facts(path)


def test_a_missing_file_is_not_found(path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model file"):
        read_facts(path)


def test_a_missing_part_of_a_split_model_is_not_found(tmp_path: Path) -> None:
    pairs = LLAMA | {"split.count": _u32(2)}
    first = tmp_path / "ladle-00001-of-00002.gguf"
    first.write_bytes(_gguf(pairs))
    with pytest.raises(ModelNotFound, match=r"ladle-00002-of-00002\.gguf is missing"):
        read_facts(first)
    second = tmp_path / "ladle-00002-of-00002.gguf"
    second.write_bytes(_gguf(pairs))
    facts = read_facts(first)
    assert facts.parts == (first, second)
    assert facts.weights_bytes == 2 * DATA_BYTES
    with pytest.raises(ModelError, match="give the first one"):
        read_facts(second)

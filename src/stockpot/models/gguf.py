"""What a model file says about the model, read in milliseconds, without loading it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stockpot.errors import ModelError, ModelNotFound
from stockpot.models.gguf_reader import GgufHead, SkippedArray, Value, read_head
from stockpot.models.tensor_types import type_name

MAX_LAYERS = 4096
MAX_HEADS = 1 << 16
MAX_SIZE = 1 << 24
MAX_CONTEXT_TOKENS = 1 << 40
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: how many dimensions of a head are rotated, the base, and how they are stretched."""

    dimensions: int
    frequency_base: float
    scaling: str | None
    scaling_factor: float | None


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """Facts of a language model from its GGUF metadata.

    `heads` are query heads. `kv_heads_by_layer` has one number for each layer (0 where a layer keeps no
    KV, as in hybrid models); `key_size` and `value_size` are elements of one head. `elements_by_type` counts
    weights by tensor type, most first; `encoding` is the type of most of them. `ragged_types` are those with
    matrices whose rows are no multiple of 128 elements. `weights_bytes` is the data of all tensors,
    `file_bytes` the whole file; both include all parts of a split model.
    """

    architecture: str
    name: str | None
    layers: int
    heads: int
    kv_heads_by_layer: tuple[int, ...]
    key_size: int
    value_size: int
    embedding_size: int
    vocabulary_size: int
    training_context_tokens: int
    rope: Rope
    chat_template: str | None
    elements_by_type: Mapping[str, int]
    ragged_types: frozenset[str]
    weights_bytes: int
    file_bytes: int
    parts: tuple[Path, ...]

    @property
    def encoding(self) -> str:
        return next(iter(self.elements_by_type), "none")

    @property
    def kv_heads(self) -> int:
        """Of the layer with the most."""
        return max(self.kv_heads_by_layer)

    @property
    def parameters(self) -> int:
        return sum(self.elements_by_type.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weights_bytes / self.parameters if self.parameters else 0.0


def read_facts(path: Path) -> GgufFacts:
    """The facts of the GGUF file `path`; the first file, where a model is split into several.

    Raises ModelNotFound (no such file, or a part of a split model is missing) and ModelError: not GGUF,
    truncated, numbers that cannot be, or a GGUF that is not a language model.
    """
    head = read_head(path)
    parts = _parts(path, head)
    heads = [head, *(read_head(part) for part in parts[1:])]
    pairs = _Pairs(path, head.pairs)
    architecture = pairs.text("general.architecture")
    if architecture is None:
        raise ModelError(
            f"{path} does not say its architecture; it is a GGUF of something else than a model."
        )
    layers = pairs.integer(f"{architecture}.block_count", MAX_LAYERS)
    query_heads = max(pairs.per_layer(f"{architecture}.attention.head_count", layers, None))
    embedding = pairs.integer(f"{architecture}.embedding_length", MAX_SIZE)
    head_size = max(embedding // max(query_heads, 1), 1)
    key_size = pairs.integer(f"{architecture}.attention.key_length", MAX_SIZE, head_size)
    elements = _elements_by_type(heads)
    return GgufFacts(
        architecture=architecture,
        name=pairs.text("general.name"),
        layers=layers,
        heads=query_heads,
        kv_heads_by_layer=pairs.per_layer(f"{architecture}.attention.head_count_kv", layers, query_heads),
        key_size=key_size,
        value_size=pairs.integer(f"{architecture}.attention.value_length", MAX_SIZE, head_size),
        embedding_size=embedding,
        vocabulary_size=pairs.vocabulary_size(architecture),
        training_context_tokens=pairs.integer(f"{architecture}.context_length", MAX_CONTEXT_TOKENS),
        rope=_rope(pairs, architecture, key_size),
        chat_template=pairs.text("tokenizer.chat_template"),
        elements_by_type=elements,
        ragged_types=_ragged_types(heads),
        weights_bytes=sum(head.data_bytes for head in heads),
        file_bytes=sum(head.file_bytes for head in heads),
        parts=parts,
    )


class _Pairs:
    """Typed access to the key/value pairs; every complaint is a sentence that names the key."""

    def __init__(self, path: Path, pairs: Mapping[str, Value]) -> None:
        self._path = path
        self._pairs = pairs

    def text(self, key: str) -> str | None:
        value = self._pairs.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value)
        return value or None

    def integer(self, key: str, most: int, default: int | None = None) -> int:
        """A positive integer; of an array (one value for each layer) the largest."""
        value = self._pairs.get(key, default)
        if isinstance(value, tuple) and value:
            value = max(value)
        if value is None:
            raise ModelError(
                f"{self._path} has no {key} in its metadata: it is not a language model of its own "
                "(perhaps a projector or an adapter)."
            )
        if not isinstance(value, int) or not 1 <= value <= most:
            raise self._wrong(key, value)
        return value

    def real(self, key: str, default: float | None) -> float | None:
        value = self._pairs.get(key, default)
        if value is None:
            return None
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, value)
        return float(value)

    def per_layer(self, key: str, layers: int, default: int | None) -> tuple[int, ...]:
        """One integer for each layer, from an array or from one number for all."""
        value = self._pairs.get(key)
        if not isinstance(value, tuple):
            return (self.integer(key, MAX_HEADS, default),) * layers
        counts = tuple(int(count) for count in value if isinstance(count, int) and 0 <= count <= MAX_HEADS)
        if len(counts) != len(value) or len(counts) < layers or not any(counts[:layers]):
            raise self._wrong(key, value)
        return counts[:layers]

    def vocabulary_size(self, architecture: str) -> int:
        tokens = self._pairs.get("tokenizer.ggml.tokens")
        if isinstance(tokens, SkippedArray) and tokens.elements:
            return tokens.elements
        return self.integer(f"{architecture}.vocab_size", MAX_SIZE)

    def _wrong(self, key: str, value: object) -> ModelError:
        return ModelError(f"{self._path} says {key} = {str(value)[:80]}, which cannot be. Fetch it again.")


def _rope(pairs: _Pairs, architecture: str, key_size: int) -> Rope:
    prefix = f"{architecture}.rope"
    return Rope(
        dimensions=pairs.integer(f"{prefix}.dimension_count", MAX_SIZE, key_size),
        frequency_base=pairs.real(f"{prefix}.freq_base", 10_000.0) or 10_000.0,
        scaling=pairs.text(f"{prefix}.scaling.type"),
        scaling_factor=pairs.real(f"{prefix}.scaling.factor", None),
    )


def _parts(path: Path, head: GgufHead) -> tuple[Path, ...]:
    """All files of a model, the first first."""
    count = head.pairs.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return (path,)
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or match[2] != "00001" or int(match[3]) != count:
        raise ModelError(
            f"{path} is a part of a model in {count} files; give the first one, "
            f"under the name it had (…-00001-of-{count:05d}.gguf)."
        )
    parts = tuple(path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, count + 1))
    for part in parts:
        if not part.is_file():
            raise ModelNotFound(f"The model {path} is split into {count} files, and {part.name} is missing.")
    return parts


def _elements_by_type(heads: list[GgufHead]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for head in heads:
        for tensor in head.tensors:
            counts[type_name(tensor.type_number)] += tensor.elements
    return dict(counts.most_common())


def _ragged_types(heads: list[GgufHead]) -> frozenset[str]:
    return frozenset(
        type_name(tensor.type_number)
        for head in heads
        for tensor in head.tensors
        if len(tensor.shape) > 1 and tensor.shape[0] % 128
    )

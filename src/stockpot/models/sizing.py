"""What the KV cache of a model takes, and what fits in memory, from metadata alone."""

from __future__ import annotations

from dataclasses import dataclass

from stockpot.models.gguf import GgufFacts
from stockpot.models.tensor_types import TENSOR_TYPES

CELL_TYPES = ("f32", "f16", "q8_0", "q4_0")
ENGINE_OVERHEAD_BYTES = 300_000_000
"""What the process takes beside weights and KV: Python, buffers of a step, logits."""
MIN_CONTEXT_TOKENS = 1024

_TYPE_BY_NAME = {kind.name: kind for kind in TENSOR_TYPES.values()}


@dataclass(frozen=True, slots=True)
class Fit:
    """`sequences` requests of `context_tokens` each fit at once; one of them takes `sequence_bytes`."""

    context_tokens: int
    sequences: int
    sequence_bytes: int


def kv_bytes_per_token(facts: GgufFacts, cell_type: str) -> int:
    """Bytes of keys and values of one token in all layers: sum over layers of KV heads x (key size + value
    size) x bytes of a cell element.

    Quantised cells come in blocks of 32 with a scale (q8_0: 34 bytes, q4_0: 18), so a layer's row is
    rounded up to whole blocks. For models that compress keys and values (multi-head latent attention) or
    keep a state instead, this is an upper bound. Raises ValueError for a type not in CELL_TYPES.
    """
    if cell_type not in CELL_TYPES:
        raise ValueError(f"unknown KV cell type {cell_type!r}; known are {', '.join(CELL_TYPES)}")
    kind = _TYPE_BY_NAME[cell_type]
    return sum(
        kind.size_bytes(heads * facts.key_size, 1) + kind.size_bytes(heads * facts.value_size, 1)
        for heads in facts.kv_heads_by_layer
        if heads
    )


def what_fits(
    facts: GgufFacts, cell_type: str, available_bytes: int, *, weights_bytes: int | None = None
) -> tuple[Fit, ...]:
    """For contexts of 1,024 tokens, doubled up to the model's own, how many requests fit at once into
    `available_bytes` beside the weights and the engine's overhead. `weights_bytes` when the weights are
    kept in another encoding than the facts are of."""
    weights = facts.weights_bytes if weights_bytes is None else weights_bytes
    room = max(0, available_bytes - weights - ENGINE_OVERHEAD_BYTES)
    per_token = max(1, kv_bytes_per_token(facts, cell_type))
    contexts: list[int] = []
    tokens = min(MIN_CONTEXT_TOKENS, facts.training_context_tokens)
    while tokens < facts.training_context_tokens:
        contexts.append(tokens)
        tokens *= 2
    contexts.append(facts.training_context_tokens)
    return tuple(Fit(tokens, room // (tokens * per_token), tokens * per_token) for tokens in contexts)

"""From a model file to a driver: checks, the choice of library, loading, facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from blake3 import blake3

from stockpot.engine.bindings.binding import KV_CELL_TYPES, Binding, ContextShape, Handle, Traits
from stockpot.engine.bindings.choice import choose_binding, load
from stockpot.engine.driver import Driver, DriverFailure, ModelFacts
from stockpot.engine.llamacpp_driver import LlamaCppDriver, LoadedModel, StateSize
from stockpot.errors import BindingUnavailable, ConfigurationError, ModelError
from stockpot.models.gguf import GgufFacts, read_facts
from stockpot.models.machine import usable_processors


def open_driver(
    path: Path,
    *,
    name: str,
    binding: str = "auto",
    library: str = "auto",
    cache_dir: Path,
    cells: int,
    max_sequences: int,
    max_batch_tokens: int,
    kv_cell_type: str,
    threads: int | None,
) -> Driver:
    """Load the model file `path` and open one context of `cells` (rounded up to what the library needs).

    `binding`, `library`, `kv_cell_type` and `threads` as in the settings. Raises ModelNotFound, ModelError,
    BindingUnavailable, ConfigurationError.
    """
    file = read_facts(path)
    chosen = load(choose_binding(file.architecture, binding, library, cache_dir=cache_dir))
    kv_cell_type = _cell_type(kv_cell_type, chosen.traits, file)
    shape = ContextShape(
        cells=cells,
        sequences=max_sequences + 1,
        batch_tokens=max_batch_tokens,
        threads=threads or usable_processors(),
        kv_cell_type=kv_cell_type,
        flash_attention=chosen.traits.sound_flash_attention,
    )
    model = chosen.load_model(path)
    try:
        if why := chosen.unsuited(model):
            raise ModelError(f"{path} is a model Stockpot cannot serve: {why}, so prefixes cannot be shared.")
        context = chosen.open_context(model, shape)
    except ModelError:
        chosen.free_model(model)
        raise
    try:
        state, kv_bytes_per_token = _measure_state(chosen, context, max_sequences)
    except (BindingUnavailable, DriverFailure):
        chosen.free_context(context)
        chosen.free_model(model)
        raise
    facts = _facts(file, name, _layout(chosen, shape, file), kv_cell_type, kv_bytes_per_token)
    return LlamaCppDriver(LoadedModel(chosen, model, context, facts, max_sequences, max_batch_tokens, state))


def _cell_type(wanted: str, traits: Traits, file: GgufFacts) -> str:
    """The type of the KV cells. "auto" is q8_0 where it is faster: with the default model answers then differ
    from those over f16 cells by a KL of 0.0046 nats, as much as eight-bit activations cost anyway."""
    if wanted == "auto":
        fits = file.key_size == file.value_size and file.key_size % 64 == 0
        return "q8_0" if traits.fast_8_bit_cells and fits else "f16"
    if wanted not in KV_CELL_TYPES:
        raise ConfigurationError(
            f"engine.kv_cell_type {wanted!r} is not one of auto, {', '.join(KV_CELL_TYPES)}."
        )
    if wanted != "f16" and not traits.sound_flash_attention:
        raise ConfigurationError(
            f"KV cells of type {wanted} need flash attention, which the wheel of ik_llama.cpp does not "
            "do right for several sequences. Run `stockpot engine build`, or set engine.kv_cell_type to f16."
        )
    return wanted


def fingerprint(parts: tuple[Path, ...]) -> str:
    """A hash of the content of all files of a model."""
    hasher = blake3(max_threads=blake3.AUTO)
    for part in parts:
        hasher.update_mmap(part)
    return hasher.hexdigest()


def _measure_state(binding: Binding, context: Handle, scratch: int) -> tuple[StateSize, int]:
    """What spans take, exported and in the context, learnt from two tokens; the context is empty after."""
    batch = binding.new_batch(2)
    batch.positions[:] = np.arange(2)
    batch.struct.n_tokens = 2
    if binding.decode(context, batch) != 0:
        raise DriverFailure(f"{binding.name} could not decode the first two tokens.")
    binding.synchronize(context)
    both = binding.state_size(context, 0)
    if _exported_positions(binding, context, both) != [0, 1]:
        raise BindingUnavailable(
            f"{binding.name} {binding.version} writes KV in a form this version of Stockpot does not know "
            "(or the model's positions are no simple indices). Another version of the library may do."
        )
    binding.copy(context, 0, scratch, 0, 1)
    one = binding.state_size(context, scratch)
    binding.clear(context)
    per_token = both - one
    return StateSize(fixed=one - per_token, per_token=per_token), per_token - 4 * binding.state_format.words


def _exported_positions(binding: Binding, context: Handle, size: int) -> list[int]:
    """The positions that the export of sequence 0 states, read as `state_format` says."""
    form = binding.state_format
    data = np.zeros(size, dtype=np.uint8)
    binding.state_get(context, 0, data.ctypes.data, size)
    count = int(data[form.count_at : form.count_at + 4].view("<u4")[0])
    end = form.cells_at + 4 * form.words * count
    return data[form.cells_at : end].view("<i4")[:: form.words].tolist() if end <= size else []


def _layout(binding: Binding, shape: ContextShape, file: GgufFacts) -> str:
    """All that decides what KV bytes mean, besides the weights."""
    rope = file.rope
    return (
        f"{binding.name}-{binding.version}/{shape.kv_cell_type}/fa{int(shape.flash_attention)}"
        f"/rope-{rope.dimensions}-{rope.frequency_base:g}"
        f"-{rope.scaling or 'none'}-{rope.scaling_factor or 1:g}"
    )


def _facts(file: GgufFacts, name: str, layout: str, kv_cell_type: str, kv_bytes_per_token: int) -> ModelFacts:
    return ModelFacts(
        name=name,
        architecture=file.architecture,
        fingerprint=fingerprint(file.parts),
        layout=layout,
        layers=file.layers,
        kv_heads=file.kv_heads,
        head_size=file.key_size,
        embedding_size=file.embedding_size,
        vocabulary_size=file.vocabulary_size,
        training_context_tokens=file.training_context_tokens,
        kv_cell_type=kv_cell_type,
        kv_bytes_per_token=kv_bytes_per_token,
        weights_bytes=file.weights_bytes,
        chat_template=file.chat_template,
    )

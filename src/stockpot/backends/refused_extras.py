"""Fields not read here that must not reach a backend: they change what is generated, billed, or who waits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from stockpot.errors import UnsupportedField

_NEVER: tuple[Any, ...] = (None,)

_EVERYWHERE: Mapping[str, tuple[Any, ...]] = {
    # More output than was asked for and reserved.
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "n_predict": _NEVER,
    "max_new_tokens": _NEVER,
    # Another price.
    "service_tier": (None, "auto", "default"),
    "speed": (None, "standard"),
    "modalities": (None, ["text"]),
    "audio": _NEVER,
    "web_search_options": _NEVER,
    # A prompt nobody here has seen.
    "chat_template": _NEVER,
    "input_ids": _NEVER,
    "input_embeds": _NEVER,
    "prompt_embeds": _NEVER,
    # The order of the queue there, names of requests there, and what operators alone decide.
    "priority": (None, 0),
    "request_id": _NEVER,
    "kv_transfer_params": _NEVER,
    "lora": _NEVER,
    "lora_path": _NEVER,
    "id_slot": (None, -1),
}
"""At every server, since nothing says what is behind a `generic` one; and the values that ask for nothing."""

_OF_SERVER: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    # Of services that pass requests on: other models, other providers, plug-ins that search.
    "generic": {"models": _NEVER, "provider": _NEVER, "route": _NEVER, "plugins": _NEVER},
    "vllm": {
        "logits_processors": _NEVER,
        "mm_processor_kwargs": _NEVER,
        "vllm_xargs": _NEVER,
        "ec_transfer_params": _NEVER,
    },
    "llama-server": {"n_keep": (None, 0), "n_discard": (None, 0), "n_cmpl": (None, 1)},
    "sglang": {
        "rid": _NEVER,
        "session_params": _NEVER,
        "custom_logit_processor": _NEVER,
        "custom_params": _NEVER,
        "bootstrap_host": _NEVER,
        "bootstrap_port": _NEVER,
        "bootstrap_room": _NEVER,
        "data_parallel_rank": _NEVER,
        "mm_processor_kwargs": _NEVER,
    },
    "stockpot": {},
    "anthropic": {
        "service_tier": (None, "auto", "standard_only"),
        "container": _NEVER,
        "mcp_servers": _NEVER,
        "inference_geo": _NEVER,
        "workspace_id": _NEVER,
    },
}


def refuse_extras_of(server: str, extras: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Raise UnsupportedField for the first that is not let through to a server of this kind (`anthropic`, or
    as settings name it) and is not `allowed` (`BackendSettings.allow_extras`)."""
    if not extras:
        return
    own = _OF_SERVER[server]
    for name, value in extras.items():
        harmless = own.get(name) or _EVERYWHERE.get(name)
        if harmless is None or name in allowed or any(_same(value, each) for each in harmless):
            continue
        values = ", ".join(repr(each) for each in harmless if each is not None)
        instead = f"leave it out, or set it to {values}" if values else "leave it out"
        raise UnsupportedField(
            f"The field {name!r} is not passed to this model's backend, because it changes what is generated,"
            f" billed or served first there; {instead}. (Operators may let it through: allow_extras of the"
            " backend.)",
            param=name,
        )


def _same(value: object, other: object) -> bool:
    """JSON's true is not its 1."""
    return type(value) is type(other) and value == other

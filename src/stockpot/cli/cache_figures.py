"""The table of `stockpot cache stats`: every figure, and what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from stockpot.cli.cache_words import size, span, visible

if TYPE_CHECKING:
    from rich.table import Table

# Figure -> (unit, what it means), in the order shown; * is any name, which the meaning has for {}. Figures a
# server adds are shown without a meaning.
_MEANINGS: Mapping[str, tuple[str, str]] = {
    "hit_ratio": ("share", "of all prompt tokens so far, the share that was not computed"),
    "prompt_tokens_computed": ("count", "prompt tokens computed"),
    "prompt_tokens_cached.context": ("count", "prompt tokens shared with a request that was running"),
    "prompt_tokens_cached.ram": ("count", "prompt tokens brought back from RAM"),
    "prompt_tokens_cached.disk": ("count", "prompt tokens brought back from disk"),
    "prompt_tokens_cached.redis": ("count", "prompt tokens brought back from Redis"),
    "tokens_generated": ("count", "tokens of answers"),
    "cache_enabled": ("", "whether prefixes are reused at all (cache.enabled)"),
    "block_tokens": ("count", "tokens of a block, the unit in which the tiers keep them"),
    "cells": ("count", "tokens the context holds at most, all running requests together"),
    "cells_used": ("count", "tokens it holds now"),
    "kv_bytes_used": ("bytes", "keys and values in the context now"),
    "kv_bytes_per_token": ("bytes", "keys and values of one token, all layers"),
    "prefill_s_per_token": (
        "seconds",
        "computing one prompt token takes, as measured: what loading must beat",
    ),
    "ram_capacity_bytes": (
        "bytes",
        "what the RAM tier may take (cache.ram_bytes, less under memory pressure)",
    ),
    "ram_used_bytes": ("bytes", "what it takes now"),
    "ram_blocks": ("count", "blocks in the RAM tier"),
    "ram_pinned_blocks": ("count", "of these, blocks that a request uses or a pin holds: never evicted"),
    "tenant_bytes.": ("bytes", "RAM of prompts that belong to nobody, or are shared"),
    "tenant_bytes.*": ("bytes", "RAM of prompts of the tenant {}"),
    "promised_bytes": ("bytes", "RAM that clients were promised (cache_control)"),
    "promises_refused": ("count", "promises not given: too much was promised already"),
    "running": ("count", "requests in the batch"),
    "waiting": ("count", "requests without a place in the batch"),
    "joining": ("count", "of these, requests that wait for another to prefill their common prefix"),
    "fetching": ("count", "of these, requests whose blocks are on their way from disk or Redis"),
    "preempted": ("count", "requests put aside to make room, to be resumed"),
    "preemptions": ("count", "how often that happened"),
    "steps": ("count", "decodes of the model"),
    "evicted_blocks.capacity": ("count", "blocks dropped because the RAM tier was full: more RAM would help"),
    "evicted_blocks.quota": ("count", "blocks dropped because their tenant had its share"),
    "evicted_blocks.pressure": ("count", "blocks dropped because the machine ran short of memory"),
    "evicted_blocks.expired": ("count", "blocks dropped because they were too old"),
    "evicted_blocks.replaced": ("count", "blocks dropped for longer ones that hold the same tokens"),
    "evicted_blocks.invalidated": ("count", "blocks dropped because somebody invalidated them"),
    "evicted_blocks.cleared": ("count", "blocks dropped because somebody cleared the cache"),
    "evicted_blocks.refused_pinned": ("count", "new blocks not kept: everything older was in use"),
    "evicted_blocks.refused_quota": ("count", "new blocks not kept: all their tenant may have was in use"),
    "evicted_blocks.refused_invalidated": ("count", "new blocks not kept: invalidated while computed"),
    "write_behind_bytes": ("bytes", "what waits to be written to disk and Redis"),
    "tiers.*.counts.state": ("", "{}: up; open: not asked after failures; half-open: being tried again"),
    "tiers.*.counts.capacity_bytes": ("bytes", "{}: what it may take; - where it decides itself"),
    "tiers.*.counts.used_bytes": ("bytes", "{}: what it takes now, or was given"),
    "tiers.*.counts.blocks": ("count", "{}: blocks it has, or was given"),
    "tiers.*.counts.hits": ("count", "{}: blocks it gave"),
    "tiers.*.counts.misses.*": ("count", "{}: blocks it did not give, because: {}"),
    "tiers.*.counts.unkept.*": ("count", "{}: blocks not written, because: {}"),
    "tiers.*.counts.evicted.*": ("count", "{}: blocks that left it, because: {}"),
    "tiers.*.counts.read_bytes": ("bytes", "{}: read so far"),
    "tiers.*.counts.written_bytes": ("bytes", "{}: written so far"),
    "tiers.*.speed.latency_s": ("seconds", "{}: finding out what it has takes, as measured"),
    "tiers.*.speed.bytes_per_s": ("rate", "{}: gives, as measured, verification included"),
}


_PLACES = {pattern: place for place, pattern in enumerate(_MEANINGS)}
_TIERS = min(place for pattern, place in _PLACES.items() if pattern.startswith("tiers."))


def table_of(figures: Mapping[str, Any]) -> Table:
    """The figures with their meanings, those that are known first."""
    from rich.table import Table
    from rich.text import Text

    table = Table("figure", "value", "meaning", box=None, header_style="bold")
    table.columns[1].justify = "right"
    for name, value in sorted(_flattened(figures), key=lambda row: _order(row[0])):
        if name.startswith("tiers.") and name.endswith(".counts.name"):
            continue  # says what the figure's name says
        pattern, named = _pattern(name)
        unit, meaning = _MEANINGS.get(pattern, ("", ""))
        table.add_row(
            Text(visible(name)), Text(visible(_shown(value, unit))), Text(visible(meaning.format(*named)))
        )
    return table


def _order(name: str) -> tuple[int, str, int]:
    """Where a figure stands; a tier's stand together."""
    place = _PLACES.get(_pattern(name)[0], len(_PLACES))
    return (_TIERS, name.split(".")[1], place) if name.startswith("tiers.") else (place, "", place)


def _pattern(name: str) -> tuple[str, list[str]]:
    """The key of `_MEANINGS` that a figure's name matches, and what stands in its places; else the name."""
    if name in _MEANINGS:
        return name, []
    parts = name.split(".")
    for pattern in _MEANINGS:
        wanted = pattern.split(".")
        if len(wanted) == len(parts) and all(w in ("*", part) for w, part in zip(wanted, parts, strict=True)):
            return pattern, [part for w, part in zip(wanted, parts, strict=True) if w == "*"]
    return name, []


def _flattened(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested figures by dotted name."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flattened(cast(dict[str, Any], value), f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _shown(value: Any, unit: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    match unit:
        case "share":
            return f"{value:.1%}"
        case "bytes":
            return size(value)
        case "rate":
            return f"{size(value)}/s"
        case "seconds":
            return span(value)
        case _:
            return f"{value:,}"

"""`stockpot cache`: what the caches of a running server hold and save."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, cast

import typer

from stockpot.errors import ServerUnreachable

_TIMEOUT_S = 5.0

# Figure -> (unit, what it means). Figures a server adds are shown without a meaning.
_MEANINGS: Mapping[str, tuple[str, str]] = {
    "hit_ratio": ("share", "of all prompt tokens so far, the share that was not computed"),
    "prompt_tokens_computed": ("count", "prompt tokens computed"),
    "prompt_tokens_cached.context": ("count", "prompt tokens shared with a request that was running"),
    "prompt_tokens_cached.ram": ("count", "prompt tokens brought back from RAM"),
    "tokens_generated": ("count", "tokens of answers"),
    "cache_enabled": ("", "whether prefixes are reused at all (cache.enabled)"),
    "block_tokens": ("count", "tokens of a block, the unit in which the RAM tier keeps them"),
    "cells": ("count", "tokens the context holds at most, all running requests together"),
    "cells_used": ("count", "tokens it holds now"),
    "kv_bytes_used": ("bytes", "keys and values in the context now"),
    "kv_bytes_per_token": ("bytes", "keys and values of one token, all layers"),
    "ram_capacity_bytes": ("bytes", "what the RAM tier may take (cache.ram_bytes)"),
    "ram_used_bytes": ("bytes", "what it takes now"),
    "ram_blocks": ("count", "blocks in the RAM tier"),
    "ram_pinned_blocks": ("count", "of these, blocks a request is using: never evicted"),
    "running": ("count", "requests in the batch"),
    "waiting": ("count", "requests without a place in the batch"),
    "joining": ("count", "of these, requests that wait for another to prefill their common prefix"),
    "preempted": ("count", "requests put aside to make room, to be resumed"),
    "preemptions": ("count", "how often that happened"),
    "steps": ("count", "decodes of the model"),
    "evicted_blocks.capacity": ("count", "blocks dropped because the RAM tier was full: more RAM would help"),
    "evicted_blocks.cleared": ("count", "blocks dropped because somebody cleared the cache"),
    "evicted_blocks.refused_pinned": ("count", "new blocks not kept: everything older was in use"),
}


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        no_args_is_help=True, help="What the caches of a running server hold, and what they saved."
    )

    @group.callback()
    def root() -> None:
        pass

    @group.command()
    def stats(
        url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
        as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    ) -> None:
        """Show hits, sizes and evictions of a running server.

        A prompt token is cached in one of two places: the context, while another request with the same
        prefix runs, or the RAM tier, where blocks of finished requests wait for their return.
        """
        figures = _fetch(url)
        if as_json:
            typer.echo(json.dumps(figures, indent=2))
        else:
            _print_table(figures)

    app.add_typer(group, name="cache")


def _fetch(url: str) -> dict[str, Any]:
    """The server's figures. Raises ServerUnreachable where there is no Stockpot at `url`."""
    import httpx2

    address = url.rstrip("/").removesuffix("/v1") + "/admin/cache/stats"
    try:
        response = httpx2.get(address, timeout=_TIMEOUT_S)
        response.raise_for_status()
        figures = response.json()
    except httpx2.HTTPStatusError as error:
        raise ServerUnreachable(
            f"{address} answers {error.response.status_code}: is it a Stockpot server?"
            " Give its address with --url."
        ) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ServerUnreachable(
            f"No server answers at {url} ({error}). Start one with 'stockpot serve',"
            " or give its address with --url."
        ) from error
    except ValueError as error:
        raise ServerUnreachable(
            f"{address} does not answer in JSON: is it a Stockpot server? Give its address with --url."
        ) from error
    if not isinstance(figures, dict):
        raise ServerUnreachable(f"{address} does not answer as Stockpot does; give its address with --url.")
    return cast(dict[str, Any], figures)


def _print_table(figures: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "meaning", box=None, header_style="bold")
    table.columns[1].justify = "right"
    flat = dict(_flattened(figures))
    known = [name for name in _MEANINGS if name in flat]
    for name in [*known, *(name for name in flat if name not in _MEANINGS)]:
        unit, meaning = _MEANINGS.get(name, ("", ""))
        table.add_row(name, _shown(flat[name], unit), meaning)
    Console().print(table)


def _flattened(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested figures by dotted name."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flattened(cast(dict[str, Any], value), f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _shown(value: Any, unit: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    match unit:
        case "share":
            return f"{value:.1%}"
        case "bytes":
            return _size(value)
        case _:
            return f"{value:,}"


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:,.0f} {unit}" if unit == "B" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.2f} GiB"

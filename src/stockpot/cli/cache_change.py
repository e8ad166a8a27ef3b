"""`stockpot cache warm` and `invalidate`: fill the cache ahead of time, and make what it holds unusable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stockpot.cli.admin_client import DEFAULT_URL, AdminClient, AdminKey, AdminRefused, AsJson, Url
from stockpot.cli.cache_pins import login_name
from stockpot.cli.cache_prompts import (
    MessagesFile,
    PromptLine,
    Text,
    TextFile,
    lines_of,
    prefix_of,
    text_of,
)

if TYPE_CHECKING:
    from stockpot.models.progress import Progress

Kind = Literal["all", "tenant", "tag", "document", "model", "prefix"]

_OF_EVERY_LINE = frozenset({401, 403, 501})
"""Statuses that say nothing of a line: the next would be refused as well."""


def add(group: typer.Typer) -> None:
    """Add the commands."""
    _add_warm(group)
    _add_invalidate(group)


@dataclass(slots=True)
class _Warmed:
    """What came of a file of prompts. `failed` is by line: (number, why)."""

    prompts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    failed: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])


def _add_warm(group: typer.Typer) -> None:
    @group.command()
    def warm(
        *,
        file: Annotated[
            Path,
            typer.Argument(
                exists=True,
                dir_okay=False,
                readable=True,
                help='JSON lines, each {"messages": [...]} or {"prompt": "..."}.',
            ),
        ],
        text: Annotated[bool, typer.Option("--text", help="The file is one prompt, taken as it is.")] = False,
        tenant: Annotated[str, typer.Option(help="Whose prompts these will be; left out: nobody's.")] = "",
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """Prefill prompts ahead of time, one after the other, so that the first who asks finds them.

        A line may name its own "tenant" and "model", and its messages may carry "cache_control" (with a ttl
        and tags). A line that is not taken is reported, and the others are warmed all the same; the exit code
        is then 1.
        """
        from rich.console import Console

        from stockpot.cli.progress import terminal_progress

        client = AdminClient(url, admin_key)
        with terminal_progress(Console(stderr=True)) as progress:
            warmed = _warm(client, _prompts(file, text), tenant, file.stat().st_size, progress)
        _report(warmed, as_json=as_json)
        if warmed.failed:
            raise typer.Exit(1)


def _prompts(file: Path, whole: bool) -> Iterator[PromptLine]:
    if whole:
        return iter([PromptLine(1, file.stat().st_size, {"prompt": text_of(file)})])
    return lines_of(file)


def _warm(
    client: AdminClient, lines: Iterator[PromptLine], tenant: str, size_bytes: int, progress: Progress
) -> _Warmed:
    warmed = _Warmed()
    for line in lines:
        if line.wrong:
            warmed.failed.append((line.number, line.wrong))
        else:
            try:
                done = client.post("warm", {"tenant": tenant, **line.prompt}, long=True)
            except AdminRefused as error:
                if error.status in _OF_EVERY_LINE:
                    raise
                warmed.failed.append((line.number, str(error)))
            else:
                warmed.prompts += 1
                warmed.prompt_tokens += done["prompt_tokens"]
                warmed.cached_tokens += done["cached_tokens"]
                warmed.seconds += done["seconds"]
        progress("warming", line.end_bytes, size_bytes)
    return warmed


def _report(warmed: _Warmed, *, as_json: bool) -> None:
    from stockpot.cli.cache_words import plural, span, visible

    computed = warmed.prompt_tokens - warmed.cached_tokens
    if as_json:
        figures: dict[str, Any] = {
            "prompts": warmed.prompts,
            "prompt_tokens": warmed.prompt_tokens,
            "cached_tokens": warmed.cached_tokens,
            "seconds": warmed.seconds,
            "failed": [{"line": number, "why": why} for number, why in warmed.failed],
        }
        typer.echo(json.dumps(figures, indent=2))
        return
    for number, why in warmed.failed:
        typer.echo(f"Line {number} is not warmed: {visible(why)}", err=True)
    typer.echo(
        f"{plural(warmed.prompts, 'prompt')} warmed in {span(warmed.seconds)}: {computed:,} tokens computed,"
        f" {warmed.cached_tokens:,} were there already."
    )
    if warmed.failed:
        typer.echo(f"{plural(len(warmed.failed), 'line')} could not be.")


def _add_invalidate(group: typer.Typer) -> None:
    @group.command()
    def invalidate(
        *,
        kind: Annotated[Kind, typer.Argument(help="What to invalidate by.")],
        value: Annotated[
            str | None,
            typer.Argument(
                help="The tenant, tag, document or model (name or fingerprint).", show_default=False
            ),
        ] = None,
        text: Text = None,
        file: TextFile = None,
        messages: MessagesFile = None,
        tenant: Annotated[
            str | None,
            typer.Option(help="Of a tag, document or prefix: of this tenant alone. [default: all]"),
        ] = None,
        reason: Annotated[str | None, typer.Option(help="Why; explanations will say so.")] = None,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before 'all'.")] = False,
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """Make cached prefixes unusable, here and on all servers that share the Redis.

        Those are told within a second, or when they are back. Running requests are not stopped. Examples:
        'invalidate document handbook', 'invalidate prefix --file rules.txt', 'invalidate all'.
        """
        from stockpot.cli.cache_words import plural

        prefix = prefix_of(text, file, messages)
        _check(kind, value, prefix)
        client = AdminClient(url, admin_key)
        if kind == "all" and not yes:
            typer.confirm(f"Invalidate everything cached by {url} and its peers?", abort=True, err=True)
        order = {
            "kind": kind,
            "value": value,
            "tenant": tenant,
            "reason": reason,
            "by": login_name(),
            **prefix,
        }
        done = client.post("invalidate", {name: each for name, each in order.items() if each is not None})
        if as_json:
            typer.echo(json.dumps(done, indent=2))
            return
        typer.echo(
            f"Invalidated (epoch {done['epoch']}): {plural(done['blocks'], 'block')} dropped from RAM here."
        )
        if done["pending"]:
            typer.echo("Redis cannot be reached: other servers will be told once it can.")


def _check(kind: Kind, value: str | None, prefix: dict[str, Any]) -> None:
    """Raises BadParameter for what does not go together: never ask or act on half of what was meant."""
    if (kind == "prefix") != bool(prefix):
        words = "needs one of --text, --file and --messages" if not prefix else "takes no prefix"
        raise typer.BadParameter(f"{kind!r} {words}", param_hint="KIND")
    if (value is None) != (kind in ("all", "prefix")):
        words = "takes no value" if value is not None else "needs a value"
        raise typer.BadParameter(f"{kind!r} {words}", param_hint="VALUE")

"""`stockpot cache`: what the caches of a running server hold and save, and how to change that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockpot.cli import cache_change, cache_pins
from stockpot.cli.admin_client import DEFAULT_URL, AdminClient, AdminKey, AsJson, Url, escaped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SHOWN_CHARACTERS = 48
"""Of a prefix's beginning, and of its end, in the list."""


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        no_args_is_help=True,
        help=(
            "What the caches of a running server hold, what they saved, and why something was not there.\n\n"
            "A server without an admin key (access.admin_key) takes these commands from its own machine only;"
            " one with a key takes them from wherever the key is given."
        ),
    )

    @group.callback()
    def root() -> None:
        pass

    _add_stats(group)
    _add_list(group)
    _add_explain(group)
    cache_pins.add(group)
    cache_change.add(group)
    _add_verify(group)
    _add_export(group)
    app.add_typer(group, name="cache")


def _add_stats(group: typer.Typer) -> None:
    @group.command()
    def stats(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
        """Show hits, sizes and evictions of a running server, tier by tier.

        A prompt token is cached in one of four places: the context, while another request with the same
        prefix runs; the RAM tier, where blocks of finished requests wait for their return; disk, where they
        outlive the server; and Redis, where other servers find them.
        """
        figures = AdminClient(url, admin_key).get("stats")
        if as_json:
            typer.echo(json.dumps(figures, indent=2))
            return
        from stockpot.cli.cache_figures import table_of

        _console().print(table_of(figures))


def _add_list(group: typer.Typer) -> None:
    @group.command("list")
    def list_entries(
        limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
        tenant: Annotated[
            str | None, typer.Option(help='Of this tenant; "" are prompts of nobody. [default: all]')
        ] = None,
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """Show the prefixes in RAM, last used first: how long, of whom, how they begin and end."""
        answer = AdminClient(url, admin_key).get("entries", limit=limit, tenant=tenant)
        if as_json:
            typer.echo(json.dumps(answer["entries"], indent=2))
        elif not answer["entries"]:
            typer.echo("Nothing is in RAM. What requests leave is listed here once they have ended.")
        else:
            _console().print(_entry_table(answer))


def _add_explain(group: typer.Typer) -> None:
    @group.command()
    def explain(
        request: Annotated[
            str | None,
            typer.Argument(
                help="The id of an answer (chatcmpl-...), or its X-Request-Id. [default: list the last]"
            ),
        ] = None,
        count: Annotated[
            int, typer.Option(min=1, max=2_048, help="How many to list, without a request.")
        ] = 20,
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """Tell why a request was found in the cache as far as it was, and why the rest was not there.

        Which positions came from which tier; the first token that differed from an earlier request, with the
        text around it; why each other part had to be computed, since when and by whose doing; and what each
        tier behind RAM was asked, and decided.
        """
        client = AdminClient(url, admin_key)
        answer = client.get(f"explain/{escaped(request)}") if request else client.get("explain", count=count)
        if as_json:
            typer.echo(json.dumps(answer if request else answer["requests"], indent=2))
        elif request:
            from stockpot.cli.cache_story import story_of

            _console().print(story_of(answer))
        elif not answer["requests"]:
            typer.echo("No request has had its place in the batch yet.")
        else:
            _console().print(_request_table(answer))


def _add_verify(group: typer.Typer) -> None:
    @group.command()
    def verify(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
        """Read and check every block on disk; put aside what is not what it should be.

        Exit code 1 where there was such a block.
        """
        from stockpot.kv.tier import REFUSED_BY_CHECK

        found = AdminClient(url, admin_key).post("verify", {}, long=True)
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            _print_verdicts(found)
        if REFUSED_BY_CHECK.intersection(found["refused"]):
            raise typer.Exit(1)


def _add_export(group: typer.Typer) -> None:
    @group.command()
    def export(
        folder: Annotated[str, typer.Argument(help="An absolute path on the server's machine.")],
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """Write all blocks of RAM and disk into a folder that another server can use as its disk tier.

        It is used with cache.disk.path, by a server of the same model and with the same cache.secret.
        """
        from stockpot.cli.cache_words import plural, size, visible

        written = AdminClient(url, admin_key).post("export", {"folder": folder}, long=True)
        if as_json:
            typer.echo(json.dumps(written, indent=2))
            return
        where = visible(written["folder"])
        typer.echo(f"{plural(written['blocks'], 'block')}, {size(written['bytes'])}, are in {where}.")
        if written.get("not_written"):
            typer.echo(f"{plural(written['not_written'], 'block')} could not be written there.")


def _print_verdicts(found: Mapping[str, Any]) -> None:
    from stockpot.cli.cache_words import plural, span, visible

    checked, refused = plural(found["checked"], "block"), found["refused"]
    typer.echo(f"{checked} on disk read in {span(found['seconds'])}: {found['sound']:,} sound.")
    for cause, count in sorted(refused.items()):
        typer.echo(f"  refused: {visible(cause)}, {plural(count, 'block')}")


def _entry_table(answer: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from stockpot.cli.cache_words import shortened, size, span, visible

    now_s = answer["now_s"]
    table = Table("tokens", "size", "used", "kept for", "hits", box=None, header_style="bold", padding=(0, 1))
    for name in ("tenant", "tags", "begins", "ends"):
        table.add_column(name, overflow="fold")
    for column in table.columns[:5]:
        column.justify = "right"
        column.no_wrap = True
    for entry in answer["entries"]:
        kept_s = (entry["kept_until_s"] or 0) - now_s
        kept = span(kept_s) if kept_s > 0 else ""
        if entry["pins"]:
            kept = "pinned"
        table.add_row(
            f"{entry['tokens']:,}",
            size(entry["bytes"]),
            f"{span(now_s - entry['used_s'])} ago",
            kept,
            f"{entry['hits']:,}",
            Text(visible(entry["tenant"])),
            Text(visible(", ".join(entry["tags"]))),
            Text(shortened(visible(entry["begins"]), _SHOWN_CHARACTERS)),
            Text(shortened(visible(entry["ends"]), _SHOWN_CHARACTERS, end=True)),
        )
    return table


def _request_table(answer: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from stockpot.cli.cache_story import cause_words
    from stockpot.cli.cache_words import span, visible

    table = Table("request", "when", "prompt", "found", box=None, header_style="bold", padding=(0, 1))
    table.columns[0].overflow = "fold"
    table.columns[2].justify = table.columns[3].justify = "right"
    table.add_column("tenant")
    table.add_column("why not all of it: the rest")
    for each in answer["requests"]:
        table.add_row(
            Text(visible(each["request"])),
            f"{span(answer['now_s'] - each['at_s'])} ago",
            f"{each['prompt_tokens']:,}",
            f"{each['found_tokens']:,}",
            Text(visible(each["tenant"])),
            Text(visible(cause_words(each["first_cause"]))),
        )
    return table


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)

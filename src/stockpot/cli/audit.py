"""`stockpot audit`: who did what, and whether the log of it is whole."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stockpot.accounts.audit import AuditLog, Entry, Verdict

Config = Annotated[
    Path | None, typer.Option(help="Settings as TOML. [default: ./stockpot.toml where it exists]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Who changed keys, settings and caches: the audit log, in the database of these settings.",
    )

    @group.callback()
    def root() -> None:
        pass

    _add_list(group)
    _add_verify(group)
    app.add_typer(group, name="audit")


def _add_list(group: typer.Typer) -> None:
    @group.command("list")
    def list_entries(
        *,
        limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many, the last ones.")] = 50,
        actor: Annotated[str | None, typer.Option(help="Only what this one did.")] = None,
        action: Annotated[str | None, typer.Option(help="Only this, as keys.create.")] = None,
        since: Annotated[str | None, typer.Option(help="From when: 7d, 2026-11-01.")] = None,
        as_json: AsJson = False,
        config: Config = None,
    ) -> None:
        """Show the last lines, newest first."""
        since_s = 0.0
        if since is not None:
            import time

            from stockpot.accounts.usage import moment

            try:
                since_s = moment(since, time.time())
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--since") from error
        with _log(config) as log:
            entries = log.entries(limit=limit, actor=actor, action=action, since=since_s)
        if as_json:
            lines = [asdict(entry) | {"detail": json.loads(entry.detail)} for entry in entries]
            typer.echo(json.dumps(lines, indent=2))
        elif not entries:
            typer.echo("The audit log has no such lines.")
        else:
            _print(entries)


def _add_verify(group: typer.Typer) -> None:
    @group.command()
    def verify(
        *,
        head: Annotated[
            str | None,
            typer.Option(
                metavar="LINES:HASH", help="A head printed before and kept elsewhere; compared too."
            ),
        ] = None,
        as_json: AsJson = False,
        config: Config = None,
    ) -> None:
        """Check the chain: no line edited, removed, moved, or cut off at the end.

        Prints the head; kept in another place and given with --head later, it also finds a log that was
        rewritten as a whole. Exit code 1 where something is wrong.
        """
        from stockpot.accounts.audit import Head

        try:
            kept = None if head is None else Head.parsed(head)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--head") from error
        with _log(config) as log:
            verdict = log.verify(kept)
        if as_json:
            anchored = None if verdict.anchored is None else str(verdict.anchored)
            figures = {"head": str(verdict.head), "anchor": anchored, "problems": verdict.problems}
            typer.echo(json.dumps(figures, indent=2))
        else:
            _print_verdict(verdict, compared=kept is not None)
        if verdict.problems:
            raise typer.Exit(1)


@contextmanager
def _log(config: Path | None) -> Generator[AuditLog]:
    from stockpot.accounts.accounts import open_audit
    from stockpot.accounts.database import database_url, open_database
    from stockpot.clock import SystemClock
    from stockpot.settings import load_settings

    settings = load_settings(config)
    database = open_database(database_url(settings))
    try:
        yield open_audit(database, settings, clock=SystemClock())
    finally:
        database.close()


def _print(entries: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    from stockpot.cli.cache_words import moment, visible

    table = Table(
        "line", "when", "who", "what", "to", "detail", box=None, header_style="bold", padding=(0, 1)
    )
    table.columns[0].justify = "right"
    table.columns[5].overflow = "fold"
    for entry in entries:
        words = (visible(text) for text in (entry.actor, entry.action, entry.target, entry.detail))
        table.add_row(f"{entry.seq}", moment(entry.at), *words)
    Console(highlight=False, markup=False).print(table)


def _print_verdict(verdict: Verdict, *, compared: bool) -> None:
    from stockpot.cli.cache_words import plural

    for problem in verdict.problems:
        typer.echo(f"WRONG: {problem}")
    if not verdict.problems:
        typer.echo(f"{plural(verdict.head.lines, 'line')}, each as it was written.")
    if verdict.anchored is None and not compared and verdict.head.lines:
        typer.echo(
            "There is no anchor on this machine to compare the end with: a log rewritten or cut off as a"
            " whole would not be seen. Give a head that was kept with --head."
        )
    typer.echo(f"head {verdict.head}")

"""`stockpot usage`: what was used and what it cost, from the ledger."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from stockpot.accounts.usage import UsageQuery

T = TypeVar("T")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def usage(
        *,
        by: Annotated[
            str,
            typer.Option(
                help="Group by these, separated by commas: team, model, requested_model, backend, key, tag,"
                " task, session, user, day, operation, cause, recall."
            ),
        ] = "",
        since: Annotated[
            str, typer.Option(help="From when: 7d, 24h, 30min (ago), 2026-11-01, 2026-11-01T12:00 (UTC).")
        ] = "30d",
        until: Annotated[
            str | None, typer.Option(help="Before when, written likewise. [default: now]")
        ] = None,
        only: Annotated[
            list[str] | None,
            typer.Option("--only", metavar="NAME=VALUE", help="Only requests with this; may be repeated."),
        ] = None,
        team: Annotated[str | None, typer.Option(help="Only this team; as --only team=...")] = None,
        model: Annotated[str | None, typer.Option(help="Only what this model answered.")] = None,
        key: Annotated[str | None, typer.Option(help="Only the key of this id.")] = None,
        tag: Annotated[str | None, typer.Option(help="Only requests with this tag.")] = None,
        tasks: Annotated[
            bool, typer.Option("--tasks", help="Tasks instead of requests: how they ended, cost per success.")
        ] = False,
        style: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
        config: Annotated[
            Path | None, typer.Option(help="Settings as TOML. [default: ./stockpot.toml where it exists]")
        ] = None,
    ) -> None:
        """Add up the ledger: requests, tokens (fresh, cached, written, output), cost and waiting;
        answers given from caches (recall), and what they saved.

        Reads the database of these settings itself; no server need run. A running server's last second may
        be missing.
        """
        if style not in ("table", "csv", "json"):
            raise typer.BadParameter(f"{style!r} is none of table, csv, json", param_hint="--format")
        named = {"team": team, "model": model, "key": key, "tag": tag}
        chosen = {name: value for name, value in named.items() if value is not None}
        query = _query(by, since, until, _pairs(only or ()) | chosen)
        rows = _rows(query, config, tasks=tasks)
        if style == "json":
            typer.echo(json.dumps(rows, indent=2))
        elif style == "csv":
            _write_csv(rows, tasks=tasks, by=query.by)
        elif not rows:
            typer.echo("The ledger has no such requests.")
        else:
            from rich.console import Console

            console = Console(highlight=False, markup=False)
            console.print(_task_table(rows, query.by) if tasks else _usage_table(rows, query.by))
            _explain(rows)


def _query(by: str, since: str, until: str | None, only: Mapping[str, str]) -> UsageQuery:
    import math
    import time

    from stockpot.accounts.usage import UsageQuery, checked_only, dimensions_of, moment

    now = time.time()
    return UsageQuery(
        by=_given("--by", lambda: dimensions_of(by)),
        since=_given("--since", lambda: moment(since, now)),
        until=_given("--until", lambda: math.inf if until is None else moment(until, now)),
        only=_given("--only", lambda: checked_only(only)),
    )


def _given(option: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--only")
        pairs[name.strip()] = value
    return pairs


def _rows(query: UsageQuery, config: Path | None, *, tasks: bool) -> list[dict[str, Any]]:
    from stockpot.accounts import usage
    from stockpot.accounts.database import database_url, open_database
    from stockpot.settings import load_settings

    with closing(open_database(database_url(load_settings(config)))) as database:
        found = usage.tasks(database, query) if tasks else usage.usage(database, query)
    return [dict(usage.plain(row)) for row in found]


def _write_csv(rows: Sequence[Mapping[str, Any]], *, tasks: bool, by: Sequence[str]) -> None:
    import csv

    from stockpot.accounts.usage import TaskRow, UsageRow, names_of

    writer = csv.DictWriter(sys.stdout, names_of(TaskRow if tasks else UsageRow, by), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    """A value as a spreadsheet may have it: a text that begins like a formula would be run as one."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value


def _usage_table(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> Table:
    # Columns of recall are there where an answer was looked for.
    recall = any(row["recall_share"] is not None for row in rows)
    table = _table(
        by,
        *("requests", "failed", "fresh", "cached", "written", "output", "hits", "cost", "TTFT", "P95"),
        *(("exact", "semantic", "recalled", "saved tokens", "saved wait", "saved") if recall else ()),
    )
    for row in rows:
        table.add_row(
            *_group(row, by),
            *(f"{row[name]:,}" for name in ("requests", "failures", "fresh_tokens", "cached_tokens")),
            *(f"{row[name]:,}" for name in ("written_tokens", "output_tokens")),
            _share(row["hit_share"]),
            _usd(row["cost_usd"], row["unpriced"]),
            _span(row["ttft_mean_s"]),
            _span(row["ttft_p95_s"]),
            *(_recalled(row) if recall else ()),
        )
    return table


def _recalled(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['exact_hits']:,}",
        f"{row['semantic_hits']:,}",
        _share(row["recall_share"]),
        f"{row['saved_prompt_tokens'] + row['saved_output_tokens']:,}",
        _span(row["saved_s"]),
        _usd(row["saved_usd"], 0),
    )


def _task_table(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> Table:
    table = _table(by, "tasks", "succeeded", "failed", "not said", "requests", "cost", "cost per success")
    for row in rows:
        open_ended = row["tasks"] - row["succeeded"] - row["failed"]
        each = row["usd_per_success"]
        table.add_row(
            *_group(row, by),
            *(f"{count:,}" for count in (row["tasks"], row["succeeded"], row["failed"], open_ended)),
            f"{row['requests']:,}",
            _usd(row["cost_usd"], row["unpriced"]),
            "" if each is None else _usd(each, row["unpriced"]),
        )
    return table


def _explain(rows: Sequence[Mapping[str, Any]]) -> None:
    unpriced = sum(row["unpriced"] for row in rows)
    if unpriced:
        from stockpot.cli.cache_words import plural

        typer.echo(
            f"* {plural(unpriced, 'request')} used tokens whose price is not known, and count as $0: set"
            " backends.NAME.prices, .hardware or .provider."
        )


def _table(by: Sequence[str], *figures: str) -> Table:
    from rich.table import Table

    table = Table(*by, *figures, box=None, header_style="bold", padding=(0, 1))
    for column in table.columns[: len(by)]:
        column.overflow = "fold"
    for column in table.columns[len(by) :]:
        column.justify, column.no_wrap = "right", True
    return table


def _group(row: Mapping[str, Any], by: Sequence[str]) -> list[str]:
    from stockpot.cli.cache_words import visible

    return [visible(row[name]) or "-" for name in by]


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _usd(usd: float, unpriced: int) -> str:
    return (f"${usd:,.2f}" if usd >= 100 else f"${usd:.6f}") + ("*" if unpriced else "")


def _span(seconds: float | None) -> str:
    from stockpot.cli.cache_words import span

    return "" if seconds is None else span(seconds)

"""The command line: one file per command, put together here; errors become sentences and exit codes here.

Exit codes: 0 done; 1 a check or benchmark found what it looks for; 2 wrong usage; 65 unusable model file;
66 no such model; 69 something needed is not available (network, server, library); 70 internal or build
failure; 71 address taken; 78 configuration; 130 interrupted.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from stockpot import __version__
from stockpot.cli import (
    audit,
    bench,
    cache,
    chat,
    config,
    doctor,
    engine,
    keys,
    lessons,
    models,
    recall,
    serve,
    usage,
)
from stockpot.cli.large_pages import restart_with_large_pages
from stockpot.errors import StockpotError


def build() -> typer.Typer:
    """The application with all commands."""
    app = typer.Typer(
        name="stockpot",
        help="A cache-first runtime for large language models: cook the context once, serve it all day.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"stockpot {__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version and leave."
        ),
    ) -> None:
        pass

    for command in (
        serve,
        chat,
        models,
        engine,
        cache,
        recall,
        doctor,
        lessons,
        keys,
        usage,
        audit,
        config,
        bench,
    ):
        command.register(app)
    return app


def main() -> None:
    """Run the command line; StockpotError becomes its sentence on stderr and its exit code."""
    if sys.argv[1:2] == ["serve"]:
        restart_with_large_pages()
    try:
        build()()
    except StockpotError as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)

"""How benchmarks run at a terminal: progress, Ctrl-C, tables, files, and the exit code."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console
    from rich.progress import TaskID

    from stockpot.bench.progress import BenchProgress
    from stockpot.bench.results import Result

_OUT = Path("bench-results")
_Found = TypeVar("_Found")


def run_measurement(measurement: Coroutine[Any, Any, _Found]) -> _Found:
    """Measure; SIGTERM ends it as Ctrl-C does, so that the servers it started end with it."""

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, end)
    try:
        return asyncio.run(measurement)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def shown_progress() -> Generator[BenchProgress]:
    """One bar for each piece of work; where nobody watches, a line when each is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:

        def advance(description: str, done: int, total: int | None, /) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description)
            bars.update(tasks[description], completed=done, total=total)
            if done == total and not console.is_terminal:
                console.print(f"{description}: done", markup=False, highlight=False)

        yield advance


def finish(result: Result, out: Path | None) -> None:
    """Show, write, and leave with 1 where a floor is missed."""
    finish_all([(result, out or _OUT / result.name)])


def finish_all(results: Sequence[tuple[Result, Path]]) -> None:
    """As `finish`, of several results and their folders; leaves when all are written."""
    from rich.console import Console

    from stockpot.bench.charts import can_draw
    from stockpot.bench.results import write_result

    console = Console()
    for result, folder in results:
        _show(result, console)
        written = write_result(result, folder)
        console.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True, highlight=False)
    if any(result.chart is not None for result, _ in results) and not can_draw():
        console.print(
            "No chart: matplotlib is not installed. Get it with: pip install 'stockpot[bench]'",
            style="yellow",
            markup=False,
        )
    if not all(result.passed for result, _ in results):
        raise typer.Exit(1)


def _show(result: Result, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from stockpot.bench.results import shown

    for table in result.tables[:1]:
        drawn = Table(title=table.title, title_justify="left", header_style="bold")
        for column in table.columns:
            drawn.add_column(column, justify="right")
        step = max(1, len(table.rows) // 40)  # a table longer than the screen is in the files
        for row in table.rows[::step]:
            drawn.add_row(*(Text(shown(cell)) for cell in row))
        console.print(drawn)
    for verdict in result.verdicts:
        console.print(Text(verdict.sentence(), style="green" if verdict.met else "red"))
    for note in (*result.notes, result.idleness.sentence()):
        console.print(Text(note), soft_wrap=True)

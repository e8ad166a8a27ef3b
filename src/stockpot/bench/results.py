"""Where figures go: JSON for programs, CSV for spreadsheets, Markdown for people, a chart where possible."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stockpot.bench.charts import Chart, write_chart
from stockpot.bench.machine import Idleness, describe_machine, machine_json

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Figures by row. Column names carry the unit."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def markdown(self) -> str:
        """As a Markdown table under its title."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        return "\n".join([*lines, *(_line([shown(cell) for cell in row]) for row in self.rows), ""])


@dataclass(frozen=True, slots=True)
class Result:
    """What a benchmark found. `verdicts` are floors and whether they were met; `notes` are for people."""

    name: str
    parameters: Mapping[str, Any]
    tables: tuple[Table, ...]
    figures: Mapping[str, Any]
    idleness: Idleness
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    chart: Chart | None = None

    @property
    def passed(self) -> bool:
        """Whether every floor was met."""
        return all(verdict.met for verdict in self.verdicts)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A floor: the figure must be at most `limit`. `value` None (not measured) does not meet it."""

    what: str
    value: float | None
    limit: float

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.limit

    def sentence(self) -> str:
        """For people."""
        state = "met" if self.met else "MISSED"
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        return f"{state}: {self.what} {value} (at most {self.limit:g})"


def shown(cell: Cell) -> str:
    """A cell as people read it: three significant digits for fractions."""
    match cell:
        case None:
            return "-"
        case float():
            return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
        case int():
            return f"{cell:,}"
        case str():
            return cell


def write_result(result: Result, folder: Path) -> tuple[Path, ...]:
    """Write result.json, one CSV for each table, figures.md and, where matplotlib is installed, chart.png.

    Returns what was written; existing files of these names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [_write_json(result, folder / "result.json"), _write_markdown(result, folder / "figures.md")]
    for number, table in enumerate(result.tables):
        path = folder / ("result.csv" if number == 0 else f"result-{number + 1}.csv")
        written.append(_write_csv(table, path))
    if result.chart is not None and write_chart(result.chart, folder / "chart.png"):
        written.append(folder / "chart.png")
    return tuple(written)


def _write_json(result: Result, path: Path) -> Path:
    content = {
        "benchmark": result.name,
        "parameters": dict(result.parameters),
        "machine": machine_json(describe_machine()),
        "before": {"cpu_percent": result.idleness.cpu_percent, "load_average": result.idleness.load_average},
        "figures": dict(result.figures),
        "verdicts": [
            {"what": v.what, "value": v.value, "limit": v.limit, "met": v.met} for v in result.verdicts
        ],
        "notes": list(result.notes),
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", encoding="utf-8")
    return path


def _write_markdown(result: Result, path: Path) -> Path:
    machine = describe_machine()
    about = (
        f"Measured on {machine.cpu}, {machine.processors} processors, "
        f"{machine.memory_bytes / 2**30:.0f} GiB, {machine.system}, Python {machine.python}. "
        f"{result.idleness.sentence()}"
    )
    parts = [about, "", *(table.markdown() for table in result.tables)]
    parts += [f"- {verdict.sentence()}" for verdict in result.verdicts]
    parts += [f"- {note}" for note in result.notes]
    path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return path


def _write_csv(table: Table, path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        writer.writerows(table.rows)
    return path


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

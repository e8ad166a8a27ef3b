"""Charts as data, and the one place that draws them. matplotlib is optional and imported only here."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DOTS_PER_INCH = 100
_PANEL_INCHES = (4.8, 4.0)
_BAR_SHARE = 0.8
"""Share of the space between two groups of bars that the bars fill."""
_MARKERS = ("o-", "s--", "^:", "d-.")


@dataclass(frozen=True, slots=True)
class Lines:
    """One line of (x, y) points for each name, from zero upwards."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    marked: bool = True


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of bars: one group for each of `groups`, in it one bar for each name; `series[name][group]`."""

    title: str
    x_label: str
    y_label: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float]]
    logarithmic: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Panels side by side."""

    panels: tuple[Lines | Bars, ...]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_chart(chart: Chart, path: Path) -> bool:
    """Draw `chart` as a PNG. False, and nothing written, without matplotlib."""
    if not can_draw():
        return False
    # Through the object interface: pyplot would keep figures and a backend for the whole process. Its types
    # are only partly known, hence Any from here on.
    figure_module: Any = importlib.import_module("matplotlib.figure")
    agg_module: Any = importlib.import_module("matplotlib.backends.backend_agg")
    width, height = _PANEL_INCHES
    figure = figure_module.Figure(figsize=(width * len(chart.panels), height), layout="constrained")
    agg_module.FigureCanvasAgg(figure)
    for axes, panel in zip(
        figure.subplots(1, len(chart.panels), squeeze=False)[0], chart.panels, strict=True
    ):
        match panel:
            case Lines():
                _draw_lines(axes, panel)
            case Bars():
                _draw_bars(axes, panel)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return True


def _draw_lines(axes: Any, panel: Lines) -> None:
    for number, (name, points) in enumerate(panel.series.items()):
        style = _MARKERS[number % len(_MARKERS)] if panel.marked else "-"
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=name)
    axes.set_ylim(bottom=0)


def _draw_bars(axes: Any, panel: Bars) -> None:
    width = _BAR_SHARE / len(panel.series)
    for number, (name, values) in enumerate(panel.series.items()):
        shift = (number - (len(panel.series) - 1) / 2) * width
        axes.bar([place + shift for place in range(len(values))], values, width, label=name)
    axes.set_xticks(range(len(panel.groups)), panel.groups)
    if panel.logarithmic:
        axes.set_yscale("log")

"""Figures of a report as people read them, and text of prompts as it may be shown."""

from __future__ import annotations

from stockpot.doctor.finding import Excerpt
from stockpot.doctor.report import CauseTotal, Report

_SHOWN = 48


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def count(value: float) -> str:
    return f"{value:,.0f}"


def money(value: float) -> str:
    """US dollars; cents and their parts as they are needed."""
    if value == 0:
        return "-"
    return f"${value:,.2f}" if value >= 1 else f"${value:.2g}"


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f} s" if value >= 1 else f"{1e3 * value:,.0f} ms"


def period(report: Report) -> tuple[float, str]:
    """What to multiply with, and what figures then are of."""
    if report.per_day is not None:
        return report.per_day, "a day"
    return 1.0, "in all"


def shown(text: str, limit: int = _SHOWN) -> str:
    """On one line, without what a terminal or an editor would obey."""
    clean = "".join(character if character.isprintable() else _spelt(character) for character in text[:limit])
    return clean + ("\u2026" if len(text) > limit else "")


def excerpt(found: Excerpt) -> tuple[str, str, str]:
    """What is the same, what stood there earlier, what stands there later."""
    before = "".join(c if c.isprintable() else _spelt(c) for c in found.before[-_SHOWN:])
    return before, shown(found.earlier), shown(found.later)


def sentence(total: CauseTotal) -> str:
    """A cause as words."""
    return total.cause.replace("_", " ")


def _spelt(character: str) -> str:
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return known.get(character) or f"\\u{ord(character):04x}"

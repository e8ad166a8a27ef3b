"""The lessons, in order."""

from __future__ import annotations

from collections.abc import Sequence

from stockpot.errors import ConfigurationError
from stockpot.lessons import append_only, manual_boundary, session_affinity, stable_prefix
from stockpot.lessons.lesson import Lesson


def all_lessons() -> tuple[Lesson, ...]:
    """All of them."""
    return (stable_prefix.LESSON, append_only.LESSON, manual_boundary.LESSON, session_affinity.LESSON)


def chosen(names: Sequence[str]) -> tuple[Lesson, ...]:
    """By number or name; "all" is all. Raises ConfigurationError for one that is not there."""
    known = all_lessons()
    if not names or "all" in names:
        return known
    found: list[Lesson] = []
    for name in names:
        lesson = next((each for each in known if name in (str(each.number), each.name)), None)
        if lesson is None:
            listed = ", ".join(f"{each.number} ({each.name})" for each in known)
            raise ConfigurationError(f"There is no lesson {name!r}; there are {listed}, and all.")
        found.append(lesson)
    return tuple(dict.fromkeys(found))

"""Conditions under which a check in CI fails: `hit<0.8`, `usd_per_day>5`, `timestamp>0`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from stockpot.doctor.finding import Cause
from stockpot.doctor.report import Report
from stockpot.errors import ConfigurationError

_FORM = re.compile(r"\s*([a-z_]+)\s*(<=|>=|==|<|>)\s*(\d+(?:\.\d+)?)(%?)\s*")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge, "==": operator.eq}
)
_FIGURES: Mapping[str, Callable[[Report], float]] = MappingProxyType(
    {
        "hit": lambda report: report.hit_ratio,
        "possible": lambda report: report.possible_ratio,
        "tokens_lost": lambda report: report.tokens_lost,
        "breaks": lambda report: sum(each.count for each in report.causes),
        "usd_lost": lambda report: report.usd_lost,
        "usd_per_day": lambda report: report.usd_lost * (report.per_day or 1.0),
    }
)


@dataclass(frozen=True, slots=True)
class Threshold:
    """`name` is a figure, or a cause (then it is how often)."""

    name: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Raises ConfigurationError."""
        found = _FORM.fullmatch(text)
        names = (*_FIGURES, *get_args(Cause))
        if found is None or found[1] not in names:
            raise ConfigurationError(
                f"{text!r} is no condition: give NAME<NUMBER, with <, <=, >, >= or ==, as hit<0.8. Names:"
                f" {', '.join(names)}."
            )
        value = float(found[3])
        return cls(found[1], found[2], value / 100 if found[4] else value)

    def value_in(self, report: Report) -> float:
        """What it is in a report."""
        if self.name in _FIGURES:
            return _FIGURES[self.name](report)
        return float(sum(each.count for each in report.causes if each.cause == self.name))

    def fires(self, report: Report) -> bool:
        """Whether the condition holds: then the check has failed."""
        return _OPERATORS[self.sign](self.value_in(report), self.value)

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.value:g}"

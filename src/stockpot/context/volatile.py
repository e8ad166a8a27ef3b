"""Recognises text that is another one soon: times, dates, random identifiers, counters.

What is found early in a prompt makes all that follows uncacheable. The rules look at form alone, so they err:
`timestamp` and `uuid` rarely, `date` and `counter` (a founding year, a list of steps) more often. Whoever has
two versions of a text knows better, and asks only what the part that differs is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

VolatileKind = Literal["timestamp", "date", "uuid", "counter"]


@dataclass(frozen=True, slots=True)
class Volatile:
    """Characters [start, end) of a text that look like something that changes."""

    kind: VolatileKind
    start: int
    end: int


_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?,?\s+)?"
_ISO_DATE = r"(?:19|20)\d\d-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
_DATE = (
    rf"(?:{_ISO_DATE}"
    r"|(?:19|20)\d\d[/.](?:0?[1-9]|1[0-2])[/.](?:0?[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])[/.](?:0?[1-9]|[12]\d|3[01])[/.](?:19|20)\d\d"
    rf"|{_DAY}{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+(?:19|20)\d\d"
    rf"|{_DAY}\d{{1,2}}(?:st|nd|rd|th)?\.?\s+{_MONTH},?\s+(?:19|20)\d\d)"
)
_CLOCK = r"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:[.,]\d{1,9})?)?(?:\s?[ap]\.?m\b\.?)?"
_ZONE = r"(?:\s?(?:z\b|utc\b|gmt\b|[+-]\d\d:?\d\d\b))?"
_LABEL = r"(?:request|message|msg|turn|step|attempt|iteration|round|session|seq(?:uence)?|build|retry|nonce)"

# In this order: what one has found no later one finds again. Each is linear: no repetition within another.
_PATTERNS: tuple[tuple[VolatileKind, str], ...] = (
    ("uuid", r"(?<![\w-])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![\w-])"),
    # A number of at least one digit among letters: words are none.
    ("uuid", r"(?<!\w)(?=[a-z]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{12,64}(?!\w)"),
    ("uuid", r"(?<!\w)01[0-9a-hjkmnp-tv-z]{24}(?!\w)"),  # ULID of this century
    (
        "uuid",
        r"(?<!\w)(?:req|request|chatcmpl|msg|run|trace|span|sess|session|conv|thread|call|id|usr|user)"
        r"[_-](?=[a-z]*[0-9])[0-9a-z]{8,64}(?!\w)",
    ),
    ("timestamp", rf"(?<!\w){_DATE}(?:t|[,\s]\s?(?:at\s)?){_CLOCK}{_ZONE}"),
    ("timestamp", rf"(?<!\w){_DAY}\d{{1,2}}\s{_MONTH}\s(?:19|20)\d\d\s{_CLOCK}{_ZONE}"),
    ("timestamp", rf"(?<![\w:.]){_CLOCK}{_ZONE}(?![\w:])"),
    ("timestamp", r"(?<![\w.])1[0-9]{9}(?:\.\d{1,9}|\d{3}|\d{6}|\d{9})?(?![\w.]\w)"),  # since 1970
    ("date", rf"(?<![\w/.-]){_DATE}(?![\w/-])"),
    (
        "counter",
        rf"\b{_LABEL}(?:[\s_-]?(?:number|count|counter|no\.?|id|index))?\s?[:=#]?\s?#?\d{{1,12}}\b",
    ),
)
_RULES: tuple[tuple[VolatileKind, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE | re.ASCII)) for kind, pattern in _PATTERNS
)


def find_volatile(text: str) -> list[Volatile]:
    """All of them, in order, none within another. Time grows with the length of the text alone."""
    found: list[Volatile] = []
    for kind, rule in _RULES:
        fresh: list[Volatile] = []
        for match in rule.finditer(text):
            if not _overlaps(found, match.start(), match.end()):
                fresh.append(Volatile(kind, match.start(), match.end()))
        found = sorted((*found, *fresh), key=lambda one: one.start)
    return found


def ends_at(text: str, kind: VolatileKind, start: int) -> int | None:
    """Where something of that kind ends which begins at `start`; None where none does. Much cheaper than
    looking for it."""
    ends = [
        match.end() for of, rule in _RULES if of == kind and (match := rule.match(text, start)) is not None
    ]
    return max(ends, default=None)


def _overlaps(found: list[Volatile], start: int, end: int) -> bool:
    place = bisect_right(found, start, key=lambda one: one.start)
    return (place > 0 and found[place - 1].end > start) or (place < len(found) and found[place].start < end)

"""Why two versions of one text differ: what stands at the first character in which they do."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, Literal

from stockpot.context.volatile import Volatile, ends_at, find_volatile

TextCause = Literal["timestamp", "date", "uuid", "counter", "key_order", "white_space", "unicode_form"]

_AROUND = 50
_WORD = re.compile(r"[\w-]+")
_RANDOM_MIN = 6
_COUNTS_UP_BY = 1_000
_JSONS_TRIED = 8
_DAYS = frozenset(("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"))
_LOOKALIKES = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-",
        "\u2026": "...", "\u00a0": " ", "\u202f": " ", "\u200b": "", "\ufeff": "", "\u2011": "-",
    }
)  # fmt: skip
"""What word processors and editors put in the place of ASCII."""


def first_difference(one: str, other: str) -> int:
    """The first character in which they differ; where one ends, if it is a beginning of the other."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared at once, characters one by one
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix(one: str, other: str, at: int) -> int:
    """How many characters behind `at` are the same at both ends."""
    low, high = 0, min(len(one), len(other)) - at
    while low < high:
        middle = (low + high + 1) // 2
        if one[len(one) - middle : len(one) - low] == other[len(other) - middle : len(other) - low]:
            low = middle
        else:
            high = middle - 1
    return low


def text_cause(earlier: str, later: str, at: int | None = None) -> TextCause | None:
    """None: the words themselves are others. `at` is where they differ, if that is known."""
    at = first_difference(earlier, later) if at is None else at
    # Letters and digits first: that is what moves on, and it is found at once.
    if earlier[at : at + 1].isalnum() and later[at : at + 1].isalnum():
        moving = _moving(earlier, later, at)
        if moving is not None:
            return moving
    if (form := _same_but_form(earlier, later)) is not None:
        return form
    if (of_json := _json_cause(earlier, later, at)) is not None:
        return of_json
    return _moving(earlier, later, at)


def _same_but_form(earlier: str, later: str) -> Literal["white_space", "unicode_form"] | None:
    if earlier.split() == later.split():
        return "white_space"
    one, other = (unicodedata.normalize("NFKC", text.translate(_LOOKALIKES)) for text in (earlier, later))
    if one == other or one.split() == other.split():
        return "unicode_form"
    return None


def _json_cause(earlier: str, later: str, at: int) -> Literal["key_order", "white_space"] | None:
    """Whether it is JSON that says the same, alone or within a text."""
    starts = [place for place, sign in enumerate(earlier[: at + 1]) if sign in "{["][:_JSONS_TRIED]
    decoder = json.JSONDecoder()
    for start in starts:
        try:
            one, end = decoder.raw_decode(earlier, start)
            other, other_end = decoder.raw_decode(later, start)
        except (ValueError, RecursionError):
            continue
        if end <= at and other_end <= at:
            continue  # it ends before they differ
        if one != other:
            continue
        return "white_space" if _order(one) == _order(other) else "key_order"
    return None


def _order(value: Any) -> str:
    return json.dumps(value)


def _moving(earlier: str, later: str, at: int) -> Literal["timestamp", "date", "uuid", "counter"] | None:
    one = _covering(earlier, at)
    # Both are the same up to it: what began in the earlier one begins at the same place of the later.
    if one is not None and one.kind != "counter" and _goes_on(later, one, at):
        return one.kind
    other = _covering(later, at)
    word, other_word = _word_at(earlier, at), _word_at(later, at)
    if word.isdigit() and other_word.isdigit() and 0 < int(other_word[:30]) - int(word[:30]) <= _COUNTS_UP_BY:
        return "counter"
    if {word.lower(), other_word.lower()} <= _DAYS:
        return "date"
    if one is not None and other is not None:
        return "timestamp" if "timestamp" in (one.kind, other.kind) else one.kind
    if _is_random(word) and _is_random(other_word) and abs(len(word) - len(other_word)) <= 2:
        return "uuid"
    return None


def _goes_on(text: str, found: Volatile, at: int) -> bool:
    """Whether something of that kind begins at that place of the window, and goes on to `at`."""
    start = max(0, at - _AROUND)
    end = ends_at(text[start : at + _AROUND], found.kind, found.start)
    return end is not None and end + start >= at


def _covering(text: str, at: int) -> Volatile | None:
    """What moves on at that place of the text, or begins or ends there; in characters of the window."""
    start = max(0, at - _AROUND)
    for each in find_volatile(text[start : at + _AROUND]):
        if each.start + start <= at <= each.end + start:
            return each
    return None


def _word_at(text: str, at: int) -> str:
    """The word around it: texts that differ at the end of a word differ in that word."""
    start = max(0, at - _AROUND)
    for each in _WORD.finditer(text[start : at + _AROUND]):
        if each.start() + start <= at <= each.end() + start:
            return each[0]
    return ""


def _is_random(word: str) -> bool:
    """Letters among digits: no word of a language."""
    return (
        len(word) >= _RANDOM_MIN
        and any(sign.isdigit() for sign in word)
        and any(sign.isalpha() for sign in word)
    )

"""Whether two answers say the same: told from their words, and only where that is sure."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import cast

from stockpot.recall.questions import words as known
from stockpot.recall.questions.features import Features, conflict_between, read_features

_ALIKE = 0.93
"""Cosine from which answers that agree in all that can be read say the same."""
_APART = 0.5
_SHARED = 0.6
"""Share of the words with meaning that both must have."""
_LONGEST = 8_000
"""Characters; longer answers are the same only if they are equal."""
_FENCES = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_REPLACED_MAX = 3

_Json = dict[str, object] | list[object]


def same_answer(first: str, second: str, similarity: float | None) -> bool | None:
    """True: they say the same. False: they differ in something that matters (a number, a name, yes or no,
    code). None: it cannot be told. `similarity`: cosine of their vectors, None where there is none.

    Symmetric. A wrong True would break the bound on the error, so it takes all signs together: equal numbers,
    names, code, negations and opposites, most words shared, no word in another's place, near vectors."""
    if _trivially(first) == _trivially(second):
        return True
    one, other = _json(first), _json(second)
    if one is not None and other is not None:
        return _same_json(one, other)
    blocks, others = _blocks(first), _blocks(second)
    if blocks and others and blocks != others:
        return False
    comparable = (one is None) == (other is None) and blocks == others
    if not comparable or max(len(first), len(second)) > _LONGEST:
        return None
    return _same_text(read_features(first), read_features(second), similarity)


def _trivially(text: str) -> str:
    """Without what is written but not read: white space around, case of the first letter, the last full stop.
    Code keeps its case and its lines."""
    text = text.strip()
    if "```" in text or "\n    " in text or "\t" in text:
        return text
    words = " ".join(text.split()).rstrip(".")
    return words[:1].lower() + words[1:]


def _json(text: str) -> _Json | None:
    stripped = text.strip()
    if not stripped.startswith(("{", "[")):
        return None
    try:
        value = cast(object, json.loads(stripped))
    except (ValueError, RecursionError):
        return None
    return cast(_Json, value) if isinstance(value, dict | list) else None


def _same_json(first: object, second: object) -> bool | None:
    """Equal as values. Other words in a string cannot be told; anything else that differs is different."""
    same: bool | None = None
    if isinstance(first, dict) and isinstance(second, dict):
        one, other = cast(dict[str, object], first), cast(dict[str, object], second)
        same = one.keys() == other.keys() and _all_same([_same_json(one[key], other[key]) for key in one])
    elif isinstance(first, list) and isinstance(second, list):
        items, others = cast(list[object], first), cast(list[object], second)
        same = len(items) == len(others) and _all_same(list(map(_same_json, items, others)))
    elif isinstance(first, bool) or isinstance(second, bool):
        same = first is second
    elif not (isinstance(first, str) and isinstance(second, str)) or first == second:
        same = first == second
    return same


def _all_same(parts: Sequence[bool | None]) -> bool | None:
    if any(part is False for part in parts):
        return False
    return None if None in parts else True


def _blocks(text: str) -> list[str]:
    return [
        "\n".join(line.rstrip() for line in block.strip("\n").splitlines()) for block in _FENCES.findall(text)
    ]


def _same_text(a: Features, b: Features, similarity: float | None) -> bool | None:
    verdicts = {_verdict(a), _verdict(b)} - {""}
    if len(verdicts) > 1 or conflict_between(a, b, both=True):
        return False
    if similarity is None or similarity < _ALIKE:
        return False if similarity is not None and similarity < _APART else None
    agree = (
        Counter(_numbers(a)) == Counter(_numbers(b))
        and a.codes == b.codes
        and _negations(a) == _negations(b)
        and a.values == b.values
        and set(a.names) == set(b.names)
        and _verdict(a) == _verdict(b)
        and len(a.content & b.content) >= _SHARED * len(a.content | b.content)
    )
    return True if agree and not _has_replacement(a.normal.plain, b.normal.plain) else None


def _verdict(features: Features) -> str:
    """Yes or no, where an answer begins with it."""
    first = features.normal.plain[:1]
    return first[0] if first and first[0] in ("yes", "no", "true", "false", "correct", "incorrect") else ""


def _numbers(features: Features) -> list[str]:
    return [word for word in features.normal.plain if word in features.numbers]


def _negations(features: Features) -> int:
    return sum(word in known.NEGATIONS for word in features.normal.plain)


def _has_replacement(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether a word or a few stand in the place of others: a synonym, or another fact. Words that both have
    somewhere have only moved; that may turn the sense around too ("A is larger than B")."""
    for tag, i, j, k, m in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        mine = [word for word in first[i:j] if word not in known.ENGLISH]
        others = [word for word in second[k:m] if word not in known.ENGLISH]
        if mine and others and max(len(mine), len(others)) <= _REPLACED_MAX:
            return True
        if {*mine} & {*second} or {*others} & {*first}:
            return True
    return False

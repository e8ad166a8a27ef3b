"""What a question depends on: numbers, dates, negation, names, code, kind and the like, each read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from stockpot.recall.questions import opposites
from stockpot.recall.questions import words as known
from stockpot.recall.questions.normal_form import NormalForm, Token, normal_form

_FUNCTION_WORDS = known.ENGLISH | known.AUXILIARIES | known.PRONOUNS | known.WH | known.PREPOSITIONS
_ANY = frozenset(("a", "an", "the", "my", "your", "our", "me", "us", "any", "some"))
_KINDS = {
    "when": "when",
    "<get when>": "when",
    "where": "where",
    "<where>": "where",
    "who": "who",
    "whom": "who",
    "<who>": "who",
    "why": "why",
    "<price>": "how much",
    "<cost to>": "how much",
    "<take to>": "how long",
}
"""What is asked for, by the first word of the normal form."""
_ALL_OF = frozenset(("place", "date", "currency"))
"""Classes of which all values that are named count, not one in common."""
_SPAN = 4
"""Words of a place or a thing after `from` and `to`."""


Direction = tuple[frozenset[str], frozenset[str]]
"""Whence and whither: the words of each."""


@dataclass(frozen=True, slots=True)
class Features:
    """`values`: by class, the values of it that are named. `names`: capitalised words and what follows them,
    in order. `content` are the words that carry meaning, `kind` what is asked for ("" where that is open)."""

    normal: NormalForm
    numbers: frozenset[str]
    values: Mapping[tuple[str, int], frozenset[str]]
    negated: bool
    names: tuple[str, ...]
    codes: frozenset[str]
    content: frozenset[str]
    kind: str
    direction: Direction | None
    initials: frozenset[str] = frozenset()
    measures: Mapping[str, str] = field(default_factory=dict[str, str])
    """By number, what it counts."""


def read_features(text: str) -> Features:
    """Reads it once. What only English tells is left empty for other languages."""
    normal = normal_form(text)
    plain = normal.plain
    numbers = frozenset(word for word in plain if word[:1].isdigit() and _is_number(word))
    codes = frozenset(
        token.text
        for token in normal.tokens
        if token.kind in ("code", "quoted") and not _is_number(token.text)
    )
    if not normal.is_english:
        return Features(normal, numbers, {}, False, (), codes, frozenset(plain), "", None)
    return Features(
        normal=normal,
        numbers=numbers,
        values=_values(plain),
        negated=_is_negated(normal),
        names=_names(normal.tokens),
        codes=codes,
        content=frozenset(_meaning(plain)),
        kind=_kind(normal.form),
        direction=_direction(plain),
        initials=_initials(plain),
        measures=_measures(plain),
    )


def conflict_between(a: Features, b: Features, *, both: bool = False) -> str:
    """What rules out one answer for both, or "". `both`: only what both of them have and disagree on (what
    one of them does not say may not matter). Symmetric."""
    return next(_conflicts(a, b, both=both), "")


def _conflicts(a: Features, b: Features, *, both: bool) -> Iterator[str]:
    """Surest first."""
    if _tells(a, b) and not (both and not (a.codes and b.codes)):
        yield "code"
    if (a.numbers and b.numbers and a.numbers != b.numbers) if both else _digits(a, b):
        yield "numbers"
    if any(b.measures.get(number, unit) != unit for number, unit in a.measures.items()):
        yield "units"
    if not (a.normal.is_english and b.normal.is_english):
        return
    if not both and a.negated != b.negated:
        yield "negation"
    yield from sorted(_disagreements(a, b, both=both))
    if a.direction and b.direction and _crosses(a.direction, b.direction):
        yield "order"
    if _missing(a, b) and _missing(b, a):
        yield "names"
    if not both and a.kind and b.kind and a.kind != b.kind:
        yield "kind"


def _crosses(one: Direction, other: Direction) -> bool:
    """Whether the way goes back: from A to B, from B to A."""
    return bool(one[0] & other[1]) and bool(one[1] & other[0])


def _tells(a: Features, b: Features) -> bool:
    """Whether code that differs is not only written differently (`P60` and `p60`, quotes or none)."""
    one, other = _bare(a), _bare(b)
    return bool((one ^ other) - set(a.normal.plain) - set(b.normal.plain)) or bool(
        one - other and other - one
    )


def _bare(features: Features) -> set[str]:
    bare = {code.strip("`'\"") for code in features.codes} - known.SYNONYMS.keys()
    return {code if code.startswith("-") or "/" in code else code.casefold() for code in bare}


def _digits(a: Features, b: Features) -> bool:
    """Numbers differ: not only by a one that may be no number ("the other one")."""
    return bool((a.numbers ^ b.numbers) - {"1", "1st"})


def _is_number(word: str) -> bool:
    return word.rstrip("stndrh").replace(".", "").replace(",", "").replace(":", "").isdigit()


def _measures(plain: Sequence[str]) -> dict[str, str]:
    units = known.UNITS.values()
    return {number: unit for number, unit in pairwise(plain) if number[:1].isdigit() and unit in units}


def _values(plain: Sequence[str]) -> dict[tuple[str, int], frozenset[str]]:
    """The values by class; a class with several values says so."""
    members = _members()
    found: dict[tuple[str, int], set[str]] = {}
    last = ""
    for raw in plain:
        word = raw.lstrip("^")
        for each in (word, f"{last}-{word}" if last else ""):
            for group, value in members.get(each, ()):
                found.setdefault(group, set()).add(value)
        last = word
    return {group: frozenset(values) for group, values in found.items()}


@cache
def _members() -> dict[str, tuple[tuple[tuple[str, int], str], ...]]:
    """By word: the classes it belongs to, and its value there."""
    found: dict[str, list[tuple[tuple[str, int], str]]] = {}
    for name, classes in (("opposites", opposites.ANTONYMS), *opposites.CLASSES.items()):
        for number, members in enumerate(classes):
            own = {written for member in members for written in member.split("/")[:1]}
            for at, member in enumerate(members):
                first, *others = member.split("/")
                value = first if name != "opposites" else str(at)
                for written in (first, *others):
                    if written == first or written not in own:
                        found.setdefault(written, []).append(((name, number), value))
    return {word: tuple(groups) for word, groups in found.items()}


def _disagreements(a: Features, b: Features, *, both: bool) -> Iterator[str]:
    """Names of classes of which they have other values."""
    for group in a.values.keys() & b.values.keys():
        one, other = a.values[group], b.values[group]
        if not one & other or (one != other and group[0] in _ALL_OF):
            yield group[0]
    if both:
        return
    dates, others = _dates(a), _dates(b)
    if dates and others and not dates & others:
        yield "date"
    for group in a.values.keys() ^ b.values.keys():
        if group[0] in opposites.ONE_SIDED:
            yield group[0]


def _dates(features: Features) -> set[str]:
    return {value for group, values in features.values.items() if group[0] == "date" for value in values}


def _is_negated(normal: NormalForm) -> bool:
    """Whether what is asked is negated; two negations are none. Only of the clause that asks."""
    count = 0
    for word in _asking(normal):
        if word in known.NEGATIONS or (word.startswith(("non", "un")) and word in known.NEGATED):
            count += 1
    return count % 2 == 1


def _asking(normal: NormalForm) -> Sequence[str]:
    """The clause that asks: the last that begins as questions do."""
    asking = [clause for clause in normal.clauses if clause[0] in known.WH or clause[0] in known.AUXILIARIES]
    return asking[-1] if asking else normal.plain


def _names(tokens: Iterable[Token]) -> tuple[str, ...]:
    return tuple(
        token.text.lstrip("^").replace("'s", "").strip("'")
        for token in tokens
        if token.named and token.kind == "word"
    )


def _initials(plain: Sequence[str]) -> frozenset[str]:
    """Of every two to five words in a row: what an acronym of them would be."""
    letters = "".join(word[0] if word[0].isalpha() else " " for word in plain if word)
    return frozenset(
        letters[at : at + width] for width in range(2, 6) for at in range(len(letters) - width + 1)
    )


def _missing(a: Features, b: Features) -> list[str]:
    """What only the first names: not the second in small letters, in full or by its initials either."""
    there = {word.lstrip("^") for word in b.normal.plain}
    values = {value for values in b.values.values() for value in values}
    return [
        name
        for name in a.names
        if not (set(_spoken(name)) <= there or name in b.initials or _member(name) & values)
    ]


def _spoken(name: str) -> list[str]:
    return known.SYNONYMS.get(name, known.SPELLINGS.get(name, name)).split()


def _member(name: str) -> set[str]:
    return {value for _, value in _members().get(name, ())}


def _kind(form: Sequence[str]) -> str:
    first, second, third = (*form[:3], "", "", "")[:3]
    if first in _KINDS:
        return _KINDS[first]
    if (first, second) == ("what", "time"):
        return "when"
    if first == "how" and second in ("much", "many", "often", "old", "long", "far"):
        return "how long" if second == "many" and known.UNITS.get(third) in known.SPANS else f"how {second}"
    return ""


def _direction(plain: Sequence[str]) -> Direction | None:
    """What is between `from` and `to`, and after `to`: which way it goes."""
    whence, whither, before = frozenset[str](), frozenset[str](), frozenset[str]()
    for at, word in enumerate(plain):
        if word == "from":
            whence = frozenset(_phrase(plain[at + 1 :])) or whence
        elif word in ("to", "into", "onto") and (phrase := _phrase(plain[at + 1 :])):
            before = before if whither else frozenset(_meaning(plain[max(0, at - _SPAN) : at]))
            whither = frozenset(phrase)
    whence = whence or before
    return (whence, whither) if whence and whither else None


def _meaning(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in _FUNCTION_WORDS and word not in _ANY]


def _phrase(plain: Sequence[str]) -> list[str]:
    words: list[str] = []
    for word in plain[: _SPAN + 1]:
        if word in _ANY:
            continue
        if word in _FUNCTION_WORDS or len(words) == _SPAN:
            break
        words.append(word)
    return words

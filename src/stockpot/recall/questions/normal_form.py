"""The normal form of a question: equal for two texts where all that sets them apart means nothing.

Case, punctuation, white space, politeness, contractions, British and American spelling, a few true synonyms,
frames of questions ("what is the way to" is "how do I"), and a phrase moved to the front. A list of what is
allowed, never of what is not: what no rule here knows stays as it is, and sets two questions apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from stockpot.recall.questions import words as known
from stockpot.recall.questions.frames import direct, framed, unfronted

_TOKENS = re.compile(
    r"""
    (?P<quoted>`[^`]+` | "[^"]+" | (?<!\w)'[^'\s][^']*'(?!\w))
  | (?P<initials>(?:\b[A-Za-z]\.){2,}(?!\w))
  | (?P<code>\w+://\S+ | [\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+ | (?<![\w-])--?[A-Za-z][\w-]*(?![\w-])
      | (?:~|\.{1,2})?/\w[\w./-]*\w | [A-Za-z]:\\\S+
      | (?=\d*[^\W\d])\w+(?:(?:::|->|[.\\])\w+)+(?:\(\))? | \w+\(\) | (?<!\w)\.[A-Za-z]\w+
      | \b[A-Za-z](?:\+\+|\#)(?!\w) | \w*_\w* )
  | (?P<number>(?:[£$€]\s?)?\d+(?:[.,:]\d+)*)(?P<tail>[^\W\d_]+|%)?(?!\w)
  | (?P<word>[^\W_]+(?:'[^\W\d_]+)*'?)
  | (?P<symbol>\S)
    """,
    re.VERBOSE,
)
_WRITTEN_ALIKE = str.maketrans(
    "\u2018\u2019\u02bc\u201c\u201d\u00ab\u00bb\u00a0\u2026\u2013\u2014", '\'\'\'"""" .--'
)
_PAUSES = frozenset(",;:-(")
_ENDS = frozenset(".!?\u3002\uff1f\uff01")
_DROPPED = frozenset(",;:()[]{}\"'-\u00bf\u00a1\uff0c\u3001") | _ENDS
PAUSE, END = ",", "."
_CURRENCIES = {"£": "£", "$": "dollar", "€": "euro"}
_TAILS = {"re": "are", "ve": "have", "ll": "will"}
_SUFFIXED = re.compile(r"st|nd|rd|th")


@dataclass(frozen=True, slots=True)
class Token:
    """`text` is in lower case, save code. `named`: capitalised where that says something."""

    text: str
    kind: str
    named: bool = False


@dataclass(frozen=True, slots=True)
class NormalForm:
    """`tokens` in order as read, pauses and ends among them; `plain` are the words with what is spelt or
    contracted in two ways in one, `clauses` the same between pauses and ends, `form` what is left when
    politeness is gone and frames are known."""

    tokens: tuple[Token, ...]
    plain: tuple[str, ...]
    form: tuple[str, ...]
    clauses: tuple[tuple[str, ...], ...]
    is_english: bool


def normal_form(text: str) -> NormalForm:
    """Reads it once: linear in its length."""
    tokens = tuple(_tokens(unicodedata.normalize("NFC", text).translate(_WRITTEN_ALIKE)))
    if not _is_english(tokens):
        words = [token.text for token in tokens]
        plain = tuple(token.text for token in tokens if token.kind not in ("pause", "end"))
        return NormalForm(tokens, plain, plain, _clauses(words), is_english=False)
    words = _spelt(tokens)
    plain = tuple(word for word in words if word not in (PAUSE, END))
    form: list[str] = []
    for sentence in _split(words, (END,)):
        form += framed(_unpaused(unfronted(direct(_unwrapped(sentence)))))
    return NormalForm(tokens, plain, tuple(form) or plain, _clauses(words), is_english=True)


def _clauses(words: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(clause) for clause in _split(words, (PAUSE, END)))


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    mixed = _is_mixed(text)
    starts = True
    for match in _TOKENS.finditer(text):
        kind, found = match.lastgroup or "symbol", match.group()
        if kind == "tail":
            kind = "number"
        if kind == "number":
            tokens += _number(match)
        elif kind == "symbol":
            _symbol(tokens, match, text)
            starts = found in _ENDS or (starts and found in _DROPPED)
            continue
        elif kind in ("quoted", "code"):
            tokens.append(Token(found, kind))
        else:
            lower = found.replace(".", "").casefold() if kind == "initials" else found.casefold()
            inside = mixed and not starts and (found[0].isupper() or any(c.isupper() for c in found[1:]))
            named = inside and lower not in ("i", "i'm", "i'd", "i've", "i'll", "ok")
            if kind == "initials":
                named = True
            has_digit = any(c.isdigit() for c in lower)
            if named and lower in known.CASE_TELLS:
                lower = "^" + lower
            tokens.append(Token(lower, "code" if has_digit else "word", named))
        starts = False
    return tokens


def _is_mixed(text: str) -> bool:
    """Whether capitals say anything: not where all words have them, or none."""
    initials = [word[0] for word in text.split() if word[0].isalpha()]
    small = sum(letter.islower() for letter in initials)
    return small >= max(1, len(initials) // 3)


def _symbol(tokens: list[Token], match: re.Match[str], text: str) -> None:
    symbol, end = match.group(), match.end()
    before = text[match.start() - 1] if match.start() else " "
    after = text[end] if end < len(text) else " "
    if symbol == "-" and after.isdigit() and (before.isdigit() or before.isspace()):
        tokens.append(Token("-", "symbol"))  # a range or a sign
    elif symbol in _ENDS:
        tokens.append(Token(END, "end"))
    elif symbol in _PAUSES and not (symbol == "-" and before.isalnum() and after.isalnum()):
        tokens.append(Token(PAUSE, "pause"))
    elif symbol not in _DROPPED:
        tokens.append(Token(symbol, "symbol"))


def _number(match: re.Match[str]) -> list[Token]:
    number, tail = match.group("number"), (match.group("tail") or "").casefold()
    currency = ""
    if number[0] in _CURRENCIES:
        currency, number = _CURRENCIES[number[0]], number[1:].strip()
        number = number.removesuffix(".00")
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", number):
        number = number.replace(",", "")
    if tail in ("am", "pm") or known.UNITS.get(tail) in ("am", "pm"):
        number = number.removesuffix(":00").removesuffix(".00")
    if _SUFFIXED.fullmatch(tail):
        return [Token(number + tail, "number")]
    found = [Token(number, "number")]
    if currency:
        found.append(Token(currency, "word"))
    if tail in known.UNITS:
        found.append(Token(known.UNITS[tail], "word"))
    elif tail == "k" and currency:
        found[0] = Token(number + "000", "number")
    elif tail:
        return [Token(match.group().casefold(), "code")]
    return found


def _is_english(tokens: Sequence[Token]) -> bool:
    found = [token.text.partition("'")[0] for token in tokens if token.kind == "word"]
    if any(not word.isascii() and word[:1] > "\u024f" for word in found):
        return False
    english = sum(word in known.ENGLISH for word in found)
    return english > 0 and english > sum(word in known.NOT_ENGLISH for word in found)


def _spelt(tokens: Sequence[Token]) -> list[str]:
    """The words with contractions, spellings, synonyms and numbers in one way each."""
    words: list[str] = []
    for token in tokens:
        if token.kind != "word":
            words += known.SYNONYMS.get(token.text, token.text).split()
        else:
            for word in _expanded(token.text).split():
                word = known.SPELLINGS.get(word, word)
                words += known.SYNONYMS.get(word, word).split(" ")
    return _counted(_fused(words))


def _expanded(word: str) -> str:
    if (whole := known.CONTRACTIONS.get(word)) is not None:
        return whole
    stem, apostrophe, tail = word.partition("'")
    if tail == "t" and stem.endswith("n"):
        return f"{stem[:-1]} not"
    if (tail == "s" and stem in known.TAKES_IS) or (tail == "d" and stem in known.PRONOUNS):
        return f"{stem} {'is' if tail == 's' else 'would'}"
    full = _TAILS.get(tail) if apostrophe else None
    return f"{stem} {full}" if full else word.replace("'", "")


def _fused(words: list[str]) -> list[str]:
    """Words that are written in two parts, or in one."""
    out: list[str] = []
    for word in words:
        if out and (fused := known.FUSED.get((out[-1], word))) is not None:
            out[-1:] = fused
        else:
            out.append(word)
    return out


def _counted(words: list[str]) -> list[str]:
    """Number words as digits; what follows a number, where it is a unit, by its name."""
    out: list[str] = []
    value: int | None = None
    tens = False
    for word in [*words, ""]:
        small = known.NUMBER_WORDS.get(word)
        scale = known.SCALES.get(word)
        if small is not None and (value is None or (tens and 0 < small < 10)):
            value, tens = (value or 0) + small, small >= 20
            continue
        if scale is not None and value is not None:
            value, tens = value * scale, False
            continue
        if value is not None:
            out.append(str(value))
            value, tens = (small, small >= 20) if small is not None else (None, False)
            if small is not None:
                continue
        if word in known.UNITS and out and out[-1][:1].isdigit():
            word = known.UNITS[word]
        else:
            word = known.ORDINALS.get(word, word)
        if word:
            out.append(word)
    return out


def _split(words: Sequence[str], at: tuple[str, ...]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in at:
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def _unpaused(words: Sequence[str]) -> list[str]:
    return [word for word in words if word != PAUSE]


def _unwrapped(words: list[str]) -> list[str]:
    """Without greetings, thanks and what only asks for an ear."""
    again = True
    while again and words:
        again = False
        while words and words[0] == PAUSE:
            words = words[1:]
        for phrase in known.GREETINGS:
            if tuple(words[: len(phrase)]) == phrase and _may_go(words[len(phrase) :], phrase):
                words, again = words[len(phrase) :], True
                break
        else:
            rest = words[1:]
            if words and words[0] in known.OPENERS and _asks(rest[1:] if rest[:1] == [PAUSE] else rest):
                words, again = rest, True
    again = True
    while again and words:
        again = False
        while words and words[-1] == PAUSE:
            words = words[:-1]
        for phrase in known.FAREWELLS:
            if tuple(words[-len(phrase) :]) == phrase:
                words, again = words[: -len(phrase)], True
                break
    return [
        word
        for at, word in enumerate(words)
        if not (word in known.HESITATIONS or (word == "please" and at and words[at - 1] == "you"))
    ]


def _may_go(rest: Sequence[str], phrase: tuple[str, ...]) -> bool:
    """A word that may be something else goes only before a pause, a question or nothing."""
    return (
        phrase not in known.DOUBTFUL_GREETINGS
        or not rest
        or rest[0] == PAUSE
        or _asks(rest)
        or (rest[0] in known.OPENERS and _asks(rest[1:]))
    )


def _asks(words: Sequence[str]) -> bool:
    return bool(words) and (
        words[0] in known.WH or words[0] in known.AUXILIARIES or words[0] in known.PRONOUNS
    )

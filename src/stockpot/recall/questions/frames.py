"""Frames of English questions: the ways to ask one thing that differ in words only."""

from __future__ import annotations

from collections.abc import Sequence

from stockpot.recall.questions import words as known
from stockpot.recall.questions.spelling import known_words

_PAUSE = ","


def _phrases(text: str) -> tuple[tuple[str, ...], ...]:
    found = {tuple(line.split()) for line in text.strip().splitlines()}
    return tuple(sorted(found, key=len, reverse=True))


_HOW_TO = _phrases("""
    how do i
    how can i
    how could i
    how would i
    how to
    how am i able to
    what is the way to
    what is the process to
    what are the steps to
    what do i need to do to
    what do i have to do to
    what must i do to
""")
_HOW_DOING = _phrases("""
    how do i go about
    how can i go about
    how would i go about
    how should i go about
    what is the process for
    what is the procedure for
    what are the steps for
    what is the way of
""")
_CAN_I = _phrases("""
    can i
    could i
    am i able to
    is it possible to
    is it possible for me to
    would it be possible to
    would it be possible for me to
    is there a way to
    is there any way to
    is there a way for me to
    would i be able to
    will i be able to
""")
_MAY_I = _phrases("""
    may i
    am i allowed to
    am i permitted to
    is it ok to
    is it ok for me to
    is it ok if i
    is it all right to
    is it all right if i
    is it alright to
    is it alright if i
    is it allowed to
    is it permitted to
""")
_MUST_I = _phrases("""
    do i need to
    do i have to
    must i
    am i required to
    is it necessary to
    is it necessary for me to
""")
_YOU_HAVE = _phrases("""
    do you have
    have you got
""")
_COST_TO = _phrases("""
    how much does it cost to
    what does it cost to
    how much is it to
    how much would it cost to
    what would it cost to
    how much will it cost to
""")
_TAKE_TO = _phrases("""
    how long does it take to
    how long will it take to
    how long would it take to
""")
_GET_WHEN = _phrases("""
    when will i get
    when will i receive
    when do i get
    when do i receive
""")
_PRICE_OF = _phrases("""
    what is the price of
    what is the price for
    what is the cost of
    what are the prices of
    what are the prices for
    how much is
    how much are
""")
_COSTS = _phrases("""
    how much does
    how much do
    what does
    what do
""")
_WANTED = _phrases("""
    i want to
    i would like to
    i need to
    i am trying to
    i am looking to
""")
_DO_SO = _phrases("""
    how do i do that
    how do i do this
    how do i do it
    how can i do that
    how can i do this
    how can i do it
    how do i go about that
    how do i go about it
    how would i do that
""")
_FRAMES = (
    ("<how>", _HOW_TO),
    ("<cost to>", _COST_TO),
    ("<take to>", _TAKE_TO),
    ("<can>", _CAN_I),
    ("<may>", _MAY_I),
    ("<must>", _MUST_I),
    ("<get when>", _GET_WHEN),
    ("<you have>", _YOU_HAVE),
)
_PLACE_VERBS = known.words_of(
    "find get buy see view park check download change access submit send upload pay report apply sign"
    " register collect pick return read"
)
_PERSON_VERBS = known.words_of("contact call speak talk ask tell email write phone notify inform")
_MEASURES = known.words_of("much many long often far old soon time")
_WHO_MODALS = known.words_of("do should can would")
_NO_VERBS = known.words_of("us be th")


def framed(words: list[str]) -> list[str]:
    """With the frame, where one is known, as one word that stands for all its wordings."""
    if (wanted := _wanted(words)) is not None:
        return ["<how>", *wanted]
    if (rest := _after(words, _HOW_DOING)) and (verb := base_of(rest[0])):
        return ["<how>", verb, *rest[1:]]
    for name, phrases in _FRAMES:
        if rest := _after(words, phrases):
            return [name, *rest]
    return _priced(words) or _placed(words) or words


def _priced(words: Sequence[str]) -> list[str]:
    if (rest := _after(words, _PRICE_OF)) and rest[0] not in ("it", "that", "this"):
        return ["<price>", *rest]
    if (rest := _after(words, _COSTS)) and rest[-1] == "cost" and len(rest) > 2:
        return ["<price>", *rest[:-1]]
    return []


def _placed(words: Sequence[str]) -> list[str]:
    """Where, or to whom, for verbs that make no difference between what one does and what one can do."""
    first, second, third, verb = (*words[:4], "", "", "", "")[:4]
    if first == "where" and second in ("do", "can", "could") and third == "i" and verb in _PLACE_VERBS:
        return ["<where>", *words[3:]]
    if first == "who" and second in _WHO_MODALS and third == "i" and verb in _PERSON_VERBS:
        return ["<who>", *words[3:]]
    return []


def unfronted(words: list[str]) -> list[str]:
    """A phrase before the question, set off by a pause, at its end: where it would stand otherwise."""
    if not words or words[0] not in known.PREPOSITIONS or words.count(_PAUSE) != 1:
        return words
    at = words.index(_PAUSE)
    phrase, question = words[:at], words[at + 1 :]
    if len(phrase) < 2 or not question or question[0] not in known.WH | known.AUXILIARIES:
        return words
    return [*question, *phrase]


def direct(words: list[str]) -> list[str]:
    """The question itself where one asks to be told: "can you tell me how I ..." is "how do I ..."."""
    for phrase in known.TELL_ME:
        if tuple(words[: len(phrase)]) == phrase:
            rest = words[len(phrase) :]
            while rest and rest[0] == _PAUSE:
                rest = rest[1:]
            if rest and rest[0] in ("if", "whether"):
                return _asked([], rest[1:]) or words
            if rest and rest[0] in known.WH:
                width = 2 if rest[1:2] and rest[1] in _MEASURES else 1
                return _asked(rest[:width], rest[width:]) or rest
            return rest if rest and rest[0] in known.AUXILIARIES else words
    return words


def _asked(head: list[str], clause: list[str]) -> list[str]:
    """The clause in the order of a question; [] where that order is not known."""
    if not clause:
        return []
    subject, *rest = clause
    if subject in known.PRONOUNS and rest:
        if rest[0] in known.AUXILIARIES - {"do", "does", "did", "have", "has", "had"}:
            return [*head, rest[0], subject, *rest[1:]]
        is_plain = subject in ("i", "you", "we", "they") and not rest[0].endswith("ed")
        return [*head, "do", subject, *rest] if is_plain else []
    if head and subject not in known.AUXILIARIES:
        if clause[-1] in ("is", "are", "was", "were"):
            return [*head, clause[-1], *clause[:-1]]
        if head[-1] == "much" and clause[-1] == "costs":
            return [*head, "does", *clause[:-1], "cost"]
    return []


def base_of(gerund: str) -> str:
    """`apply` of `applying`; "" where it is not known for sure."""
    if not gerund.endswith("ing") or len(gerund) < 5:
        return ""
    stem = gerund[:-3]
    candidates = {stem, stem + "e"}
    if len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "sz":
        candidates.add(stem[:-1])
    if stem.endswith("y"):
        candidates.add(stem[:-1] + "ie")
    found = [each for each in candidates if each in known_words() and each not in _NO_VERBS and len(each) > 1]
    return found[0] if len(found) == 1 else ""


def _wanted(words: Sequence[str]) -> list[str] | None:
    rest = _after(words, _WANTED)
    if not rest:
        return None
    for phrase in _DO_SO:
        if tuple(rest[-len(phrase) :]) == phrase:
            wanted = [word for word in rest[: -len(phrase)] if word != _PAUSE]
            return wanted or None
    return None


def _after(words: Sequence[str], phrases: tuple[tuple[str, ...], ...]) -> list[str] | None:
    for phrase in phrases:
        if tuple(words[: len(phrase)]) == phrase:
            return list(words[len(phrase) :])
    return None

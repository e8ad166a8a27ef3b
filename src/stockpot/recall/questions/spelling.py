"""Slips of the pen: whether one word is the other one misspelt, and surely no word of its own."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files

from stockpot.recall.questions import words

_SHORTEST = 5
"""Shorter words have too many neighbours to tell a slip from another word."""
_LOST_CONSONANT_SHORTEST = 7
_SAME_START = 2
"""Letters before a lost or mistaken one: beginnings tell words apart (pre- and pro-, hyper- and hypo-)."""
_SUFFIXES = ("s", "es", "ed", "d", "ing", "ly", "er", "ers", "est", "y", "ness", "able", "ful", "less", "ish")
_PREFIXES = (
    "un",
    "re",
    "non",
    "dis",
    "pre",
    "over",
    "sub",
    "anti",
    "inter",
    "multi",
    "micro",
    "hyper",
    "hypo",
)
_SUBSTANCES = ("ine", "ane", "ene", "yne", "ite", "ide", "ose", "ase", "ol", "one", "in", "ium", "mab")
"""Endings where one letter makes another substance: propane and propene, cysteine and cystine."""
_VOWELS = frozenset("aeiouy")


@cache
def known_words() -> frozenset[str]:
    """The frequent words of English: whole words of BERT's vocabulary. Empty where that is missing, and then
    nothing counts as a slip."""
    try:
        text = files("stockpot.recall.vectors").joinpath("data", "bert_uncased_vocab.txt").read_text("utf-8")
    except (FileNotFoundError, ModuleNotFoundError, NotADirectoryError):
        return frozenset()
    return frozenset(line for line in text.split() if line.isalpha()) | words.KNOWN_RARE


def is_word(word: str) -> bool:
    """Whether it is a word, or made from one by an ending or a beginning."""
    known = known_words()
    if word in known or word in words.SPELLINGS:
        return True
    for suffix in _SUFFIXES:
        stem = word.removesuffix(suffix)
        if len(stem) >= 4 and stem != word and stem[-1] == stem[-2] and stem[:-1] in known:
            return True
        if len(stem) >= 4 and stem != word and stem[-1] != "s" and (stem in known or stem + "e" in known):
            return True
    return any(
        word.startswith(each) and word[len(each) :] in known
        for each in _PREFIXES
        if len(word) > len(each) + 3
    )


@lru_cache(maxsize=4096)
def is_slip(first: str, second: str) -> bool:
    """Whether one is the other misspelt: one of them is no word, the other is (and no name), and they differ
    by two letters that changed places, a letter doubled or not, a vowel lost or mistaken, a consonant lost
    from a long word. Anything else is another word as far as we know."""
    if not (first.isascii() and second.isascii() and first.isalpha() and second.isalpha()):
        return False
    slip, meant = (second, first) if is_word(first) else (first, second)
    if is_word(slip) or not is_word(meant) or min(len(slip), len(meant)) < _SHORTEST:
        return False
    named = words.NAMES | words.MONTHS | words.WEEKDAYS
    if meant in named or meant.removesuffix("s") in named or slip[:2] != meant[:2]:
        return False
    return _differs_as_slips_do(slip, meant)


def _differs_as_slips_do(slip: str, meant: str) -> bool:
    shorter = min(len(slip), len(meant))
    at = next((i for i in range(shorter) if slip[i] != meant[i]), shorter)
    is_inside = _SAME_START <= at < len(meant) - 1 and not meant.removesuffix("s").endswith(_SUBSTANCES)
    if len(slip) == len(meant):
        swapped = slip[at : at + 2] == meant[at : at + 2][::-1] and slip[at + 2 :] == meant[at + 2 :]
        mistaken = {slip[at], meant[at]} <= _VOWELS and slip[at + 1 :] == meant[at + 1 :]
        return swapped or (mistaken and is_inside and not (meant.endswith("ate") and at >= len(meant) - 3))
    if len(slip) == len(meant) + 1:
        return slip[at] == slip[at - 1] and slip[at + 1 :] == meant[at:]
    if len(slip) + 1 != len(meant) or slip[at:] != meant[at + 1 :]:
        return False
    lost = meant[at]
    can_be_lost = lost in _VOWELS or len(meant) >= _LOST_CONSONANT_SHORTEST
    return lost == meant[at - 1] or (can_be_lost and is_inside)

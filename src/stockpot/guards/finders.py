"""What rules find in a text: secrets, personal data, words. Built once, used on every text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import regex

from stockpot.errors import ConfigurationError

MATCH_CHARACTERS_MAX = 4096
"""What is longer is found by its beginning: bounds how much of a stream is ever held back."""

_NARROWER_MAX = 64


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of thing to find. `sure` tells real ones from what only looks like one (check digits). A text
    without any of `hints` holds none of these, and to look for words is much faster than to match."""

    name: str
    pattern: str
    sure: Callable[[str], bool] | None = None
    hints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """Characters `start` to `end` of a text are a `kind`."""

    start: int
    end: int
    kind: str


def secret_kinds() -> tuple[Kind, ...]:
    """Credentials by the shapes their issuers give them (the providers' own documentation of their
    formats)."""
    return (
        Kind(
            "private_key",  # RFC 7468; also one whose end is missing
            r"-----BEGIN [A-Z0-9 ]{0,24}PRIVATE KEY-----(?:"
            r"[A-Za-z0-9+/=\s:,\-]{0,3800}?-----END [A-Z0-9 ]{0,24}PRIVATE KEY-----"
            r"|[A-Za-z0-9+/=\s]{4,3800})",
            hints=("-----BEGIN ",),
        ),
        Kind("aws_access_key", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b", hints=("AKIA", "ASIA")),
        Kind(
            "github_token",
            r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})\b",
            hints=("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        ),
        Kind("gitlab_token", r"\bglpat-[A-Za-z0-9_-]{20,64}\b", hints=("glpat-",)),
        Kind("slack_token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,250}\b", hints=("xox",)),
        Kind("api_key", r"\bsk-[A-Za-z0-9_-]{20,200}\b", hints=("sk-",)),
        Kind("google_api_key", r"\bAIza[A-Za-z0-9_-]{35}\b", hints=("AIza",)),
        Kind("stripe_key", r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,255}\b", hints=("k_live_", "k_test_")),
        Kind(
            "json_web_token",
            r"\beyJ[A-Za-z0-9_-]{10,1000}\.eyJ[A-Za-z0-9_-]{10,1800}\.[A-Za-z0-9_-]{10,1000}",
            hints=(".eyJ",),
        ),
        Kind(
            "url_password",
            r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,100}:[^\s/@]{3,200}@",
            hints=("://",),
        ),
    )


def personal_kinds() -> tuple[Kind, ...]:
    """Personal data that has a shape of its own. Names and addresses have none: they need a classifier."""
    return (
        Kind(
            "email",
            r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b",
            hints=("@",),
        ),
        Kind("phone", r"(?<![\w.])\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}(?!\w)", _is_phone, ("+",)),
        Kind("payment_card", r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])", _is_card),
        Kind("iban", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _is_iban),
        Kind("us_social_security", r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
    )


def word_kinds(words: Iterable[str]) -> tuple[Kind, ...]:
    """Words and phrases of a block list, in any case and with any white space between."""
    cleaned = {" ".join(word.split()) for word in words} - {""}
    if not cleaned:
        return ()
    # Longest first: an alternation takes the first branch that matches.
    branches = sorted(cleaned, key=lambda word: (-len(word), word))
    spelled = [r"\s{1,16}".join(regex.escape(part) for part in branch.split(" ")) for branch in branches]
    return (Kind("blocked_word", rf"(?i:(?<!\w)(?:{'|'.join(spelled)})(?!\w))"),)


class Finder:
    """Finds all kinds at once, in whole texts and at the growing end of one."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        """Raises ConfigurationError where there is nothing to find."""
        self._kinds: Mapping[str, Kind] = {kind.name: kind for kind in kinds}
        if not self._kinds:
            raise ConfigurationError("A guard has nothing to find; give it kinds or words.")
        self._pattern = _union(self._kinds.values())
        self._narrower: dict[tuple[str, ...], regex.Pattern[str]] = {}
        """Patterns of only some kinds, by their names; bounded."""

    def find(self, text: str) -> list[Finding]:
        """All findings, in order, none overlapping."""
        found: list[Finding] = []
        pattern = self._pattern_for(text)
        place = 0
        while pattern is not None and (match := pattern.search(text, pos=place)):
            kind = self._kinds[match.lastgroup or ""]
            if kind.sure is None or kind.sure(match.group()):
                found.append(Finding(match.start(), match.end(), kind.name))
                place = match.end()
            else:
                place = match.start() + 1  # within what only looked like one there may be another
        return found

    def _pattern_for(self, text: str) -> regex.Pattern[str] | None:
        """The pattern of those kinds the text may hold; None: it holds none."""
        kinds = [
            kind
            for kind in self._kinds.values()
            if not kind.hints or any(hint in text for hint in kind.hints)
        ]
        if not kinds:
            return None
        names = tuple(kind.name for kind in kinds)
        pattern = self._pattern if len(kinds) == len(self._kinds) else self._narrower.get(names)
        if pattern is None:
            if len(self._narrower) >= _NARROWER_MAX:
                return self._pattern
            pattern = self._narrower[names] = _union(kinds)
        return pattern

    def settled(self, text: str) -> int:
        """Up to where no further text can make part of another finding: the first place from which all that
        follows is a match or may become one.

        (A search for partial matches does not say: it prefers a whole match behind a partial one, and a short
        one to a longer one that is not complete yet.)
        """
        for place in range(max(0, len(text) - MATCH_CHARACTERS_MAX), len(text)):
            if self._pattern.fullmatch(text, pos=place, partial=True):
                return place
        return len(text)


def _union(kinds: Iterable[Kind]) -> regex.Pattern[str]:
    return regex.compile("|".join(f"(?P<{kind.name}>{kind.pattern})" for kind in kinds))


def safe_cut(finders: Sequence[Finder], text: str) -> int:
    """How many characters of a growing text may be looked at for good, by all `finders`: none can find
    another thing in them whatever follows, and no finding of one is cut in two."""
    cut = min((finder.settled(text) for finder in finders), default=len(text))
    found = [each for finder in finders for each in finder.find(text)]
    while around := next((each for each in found if each.start < cut < each.end), None):
        cut = around.start
    return cut


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


def _is_phone(text: str) -> bool:
    return 8 <= len(_digits(text)) <= 15  # ITU-T E.164


def _is_card(text: str) -> bool:
    """ISO/IEC 7812: 13 to 19 digits whose Luhn sum is divisible by ten; all equal digits are no card."""
    digits = [int(digit) for digit in _digits(text)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616: rearranged and read as a number, the remainder by 97 is 1."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1

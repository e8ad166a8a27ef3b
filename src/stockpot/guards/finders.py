"""What rules find in a text: secrets, personal data, words. Built once, used on every text."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import regex

from stockpot.errors import ConfigurationError

MATCH_CHARACTERS_MAX = 4096
"""What is longer is found by its beginning: bounds how much of a stream is ever held back."""

READING_MAX_S = 20.0
"""One request's texts, or one piece of an answer: many times what the largest request of plain text takes."""

_RUN_DIGITS = 2048
_DIGIT_RUN = regex.compile(rf"\d(?:[ -]?\d){{12,{_RUN_DIGITS - 1}}}")
_DIGITS = regex.compile(r"\d+")
_EDGE = regex.compile(r"(?<![\w.])")
_WORD = regex.compile(r"\w")
_DOUBLED = bytes(sum(divmod(2 * digit, 10)) for digit in range(10)) + bytes(246)
_LETTERS = str.maketrans({chr(ord("A") + n): str(10 + n) for n in range(26)})


class ReadingTime:
    """How long finders may still read, in any thread; `end` ends it at once."""

    def __init__(self, seconds: float | None = None) -> None:
        """None: as long as the largest request may take."""
        self._until_s = time.monotonic() + (READING_MAX_S if seconds is None else seconds)

    def end(self) -> None:
        self._until_s = -math.inf

    def left_s(self) -> float:
        """Raises TimeoutError where nothing is left."""
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the time to read a text is over")
        return left_s


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of thing to find. `sure` tells real ones from what only looks like one (check digits). A text
    without any of `hints` holds none of these, and to look for words is much faster than to match. `scan`
    gives from a place on, faster, the starts and ends that pattern and `sure` would."""

    name: str
    pattern: str
    sure: Callable[[str], bool] | None = None
    hints: tuple[str, ...] = ()
    scan: Callable[[str, int, ReadingTime], Iterator[tuple[int, int]]] | None = None


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
        Kind("payment_card", r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])", scan=_cards),
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
        self._kinds = tuple(kinds)
        if not self._kinds:
            raise ConfigurationError("A guard has nothing to find; give it kinds or words.")
        # One pattern for each kind: their first characters let the search leap, those of a union do not.
        self._patterns = tuple(regex.compile(kind.pattern) for kind in self._kinds)
        self._any = regex.compile("|".join(f"(?:{kind.pattern})" for kind in self._kinds))

    def find(self, text: str, time_left: ReadingTime) -> list[Finding]:
        """All findings, in order, none overlapping. Raises TimeoutError. Lets other threads run meanwhile."""
        return list(self._findings(text, time_left))

    def finds_any(self, text: str, time_left: ReadingTime) -> bool:
        """Whether there is a finding. Raises TimeoutError."""
        return next(self._findings(text, time_left), None) is not None

    def _findings(self, text: str, time_left: ReadingTime) -> Iterator[Finding]:
        """The first match of each kind waits for its turn: the leftmost is next, the first of two kinds."""
        waiting: list[tuple[int, int, int, Iterator[tuple[int, int]]]] = []

        def wait(number: int, matches: Iterator[tuple[int, int]]) -> None:
            if (match := next(matches, None)) is not None:
                heapq.heappush(waiting, (match[0], number, match[1], matches))

        for number in self._hinted(text):
            wait(number, self._matches(number, text, 0, time_left))
        place = 0
        while waiting:
            start, number, end, matches = heapq.heappop(waiting)
            if start >= place:
                yield Finding(start, end, self._kinds[number].name)
                place = end
            else:
                # What it found reaches into another finding: it begins again behind that.
                matches = self._matches(number, text, place, time_left)
            wait(number, matches)

    def _matches(
        self, number: int, text: str, place: int, time_left: ReadingTime
    ) -> Iterator[tuple[int, int]]:
        """Start and end of what one kind finds from `place` on."""
        if (scan := self._kinds[number].scan) is not None:
            yield from scan(text, place, time_left)
            return
        search, sure = self._patterns[number].search, self._kinds[number].sure
        while match := search(text, pos=place, timeout=time_left.left_s(), concurrent=True):
            if sure is None or sure(match.group()):
                yield match.span()
                place = match.end()
            else:
                place = match.start() + 1  # within what only looked like one there may be another

    def _hinted(self, text: str) -> Iterator[int]:
        """The kinds a text may hold."""
        for number, kind in enumerate(self._kinds):
            if not kind.hints or any(hint in text for hint in kind.hints):
                yield number

    def settled(self, text: str) -> int:
        """Up to where no further text can make part of another finding: the first place from which all that
        follows is a match or may become one.

        (A search for partial matches does not say: it prefers a whole match behind a partial one, and a short
        one to a longer one that is not complete yet.)
        """
        for place in range(max(0, len(text) - MATCH_CHARACTERS_MAX), len(text)):
            if self._any.fullmatch(text, pos=place, partial=True):
                return place
        return len(text)


def safe_cut(finders: Sequence[Finder], text: str, time_left: ReadingTime) -> int:
    """How many characters of a growing text may be looked at for good, by all `finders`: none can find
    another thing in them whatever follows, and no finding of one is cut in two. Raises TimeoutError."""
    cut = min((finder.settled(text) for finder in finders), default=len(text))
    found = [each for finder in finders for each in finder.find(text, time_left)]
    while around := next((each for each in found if each.start < cut < each.end), None):
        cut = around.start
    return cut


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


def _is_phone(text: str) -> bool:
    return 8 <= len(_digits(text)) <= 15  # ITU-T E.164


def _cards(text: str, place: int, time_left: ReadingTime) -> Iterator[tuple[int, int]]:
    """ISO/IEC 7812: 13 to 19 digits whose Luhn sum is divisible by ten; all equal digits are no card.

    A card begins and ends where groups of digits do. Sums over a run of groups, made once, give the Luhn sum
    of any stretch: the work is linear, whatever the digits are."""
    while run := _DIGIT_RUN.search(text, pos=place, timeout=time_left.left_s(), concurrent=True):
        start, place = run.span()
        groups = [group.span() for group in _DIGITS.finditer(text, pos=start, endpos=place)]
        plain = run.group().replace(" ", "").replace("-", "")
        digits = bytes(map(int, plain))
        doubled = digits.translate(_DOUBLED)
        sums: list[list[int]] = []
        for parity in (0, 1):
            alternating = bytearray(digits)
            alternating[parity::2] = doubled[parity::2]
            sums.append([*accumulate(alternating, initial=0)])
        is_cut = len(digits) == _RUN_DIGITS
        ends = [*accumulate(end - begin for begin, end in groups)]
        last_may_end = not is_cut and _WORD.match(text, pos=place) is None
        first = 0 if _EDGE.match(text, pos=start) else 1
        last = 0
        free = start
        for number in range(first, len(groups)):
            before = ends[number] - (groups[number][1] - groups[number][0])
            if is_cut and number and before + 20 > len(digits):
                place = groups[number][0]  # to be seen with what follows
                break
            if groups[number][0] < free:
                continue
            last = max(last, number)
            while last + 1 < len(groups) and ends[last + 1] - before <= 19:
                last += 1
            final = last if last + 1 < len(groups) or last_may_end else last - 1
            if final < number or not 13 <= ends[final] - before <= 19:
                continue
            behind = ends[final]
            odd = sums[behind % 2]  # every second digit from the one before the last is doubled
            if (odd[behind] - odd[before]) % 10 == 0 and len(set(digits[before:behind])) > 1:
                free = groups[final][1]
                yield groups[number][0], free


def _is_iban(text: str) -> bool:
    """ISO 13616: rearranged and read as a number, the remainder by 97 is 1."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int((plain[4:] + plain[:4]).translate(_LETTERS)) % 97 == 1

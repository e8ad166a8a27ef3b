"""Redaction of streams: in any pieces the same as of the whole, and no piece of a secret goes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.errors import GuardRefused
from stockpot.events import Notice
from stockpot.guards.counts import GuardCounts, Told
from stockpot.guards.finders import Finder, Kind, ReadingTime, personal_kinds, secret_kinds, word_kinds
from stockpot.guards.redaction import StreamWindow, inspected
from stockpot.guards.rule import Rule, Scope
from stockpot.settings_guards import Action

REAL = (
    "mail ann.lee+x@mail.example.org now",
    "key AKIAIOSFODNN7EXAMPLE.",
    "ghp_" + "a1B2" * 9,
    "card 4111 1111 1111 1111!",
    "iban DE89 3704 0044 0532 0130 00",
    "call +49 30 901820 today",
    "ssn 123-45-6789",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    "postgres://app:s3cret@db/x",
    "the Secret   Project is",
)
HARMLESS = (
    "4111 1111 1111 1112",
    "DE89 3704 0044 0532 0130 03",
    "a@b",
    "version 1.2.3",
    "sk-",
    "+1",
    "@",
    " ",
)


def rules(action: Action = "redact") -> list[Rule]:
    finders = (
        Finder(secret_kinds()),
        Finder(personal_kinds()),
        Finder(word_kinds(["secret project", "zebra"])),
    )
    return [Rule(f"rule{n}", action, Scope("both"), finder) for n, finder in enumerate(finders)]


def whole(text: str, notices: list[Notice] | None = None) -> str:
    return inspected(
        text,
        rules(),
        "output",
        Told([] if notices is None else notices),
        GuardCounts(),
        time_left=ReadingTime(),
    )


def streamed(pieces: list[str]) -> list[str]:
    window = StreamWindow(rules(), Told([]), GuardCounts())
    return [*map(window.push, pieces), window.finish()]


@pytest.mark.parametrize("text", REAL)
def test_real_ones_are_found_and_nothing_else(text: str) -> None:
    notices: list[Notice] = []
    assert "[redacted:" in whole(text, notices)
    assert len(notices) == 1
    assert notices[0].kind == "guard_redact"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert whole(text) == text


TEXTS = st.lists(
    st.one_of(st.sampled_from(REAL + HARMLESS), st.text("aZ9 .@+-:/_DEAKI\n", max_size=12)), max_size=6
).map(" ; ".join)


@given(TEXTS, st.lists(st.integers(1, 30), max_size=40))
def test_pieces_give_the_same_as_the_whole(text: str, sizes: list[int]) -> None:
    pieces: list[str] = []
    at = 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    pieces.append(text[at:])
    assert "".join(streamed(pieces)) == whole(text)


@given(TEXTS)
def test_letter_by_letter_gives_the_same_as_the_whole(text: str) -> None:
    assert "".join(streamed(list(text))) == whole(text)


def test_plain_words_go_out_at_once_but_for_the_last() -> None:
    out = streamed(["Here is ", "a longer sentence, ", "with words in it. ", "End"])
    assert "".join(out[:-1]).startswith("Here is a longer sentence, with words in ")


def test_refusals_name_the_rule_and_never_the_text() -> None:
    with pytest.raises(GuardRefused) as refused:
        inspected(REAL[1], rules("refuse"), "input", Told([]), GuardCounts(), time_left=ReadingTime())
    assert "rule0" in str(refused.value)
    assert "AKIA" not in str(refused.value)


# --- Large and hostile texts --------------------------------------------------------------------------------


class Looks(StreamWindow):
    """A window that counts how many characters it has looked at."""

    looked = 0

    def _release(self, *, final: bool) -> str:
        self.looked += self._characters
        return super()._release(final=final)


def test_what_is_long_held_is_not_looked_at_again_and_again() -> None:
    window = Looks(rules(), Told([]), GuardCounts())
    pieces = ["-----BEGIN PRIVATE KEY-----", *["A "] * 1500]
    out = [window.push(piece) for piece in pieces]
    assert "".join(out) == ""
    assert window.looked < 40_000  # with every piece: 2.3 million
    assert window.finish() == "[redacted:private_key]"


@given(st.text("1245 -x.", max_size=120), st.lists(st.sampled_from(["4111 1111 1111 1111", " ", "5"])))
def test_cards_are_found_as_their_pattern_says(noise: str, cards: list[str]) -> None:
    """The quick scan of runs against the pattern tried at every place."""
    text = noise.join(cards) + noise

    def is_card(digits: str) -> bool:
        plain = [int(each) for each in digits if each.isdigit()]
        doubled = [sum(divmod(2 * digit, 10)) for digit in plain[-2::-2]]
        return len(set(plain)) > 1 and (sum(plain[-1::-2]) + sum(doubled)) % 10 == 0

    quick = next(kind for kind in personal_kinds() if kind.name == "payment_card")
    slow = Kind("payment_card", quick.pattern, is_card)
    assert Finder([quick]).find(text, ReadingTime()) == Finder([slow]).find(text, ReadingTime())


@given(st.integers(0, 60), st.integers(1, 3))
def test_a_card_in_a_long_run_of_digits_is_found(before: int, times: int) -> None:
    text = "1 " * (2000 + before) + "x 4111-1111-1111-1111 " * times
    found = Finder(personal_kinds()).find(text, ReadingTime())
    assert [text[each.start : each.end] for each in found] == ["4111-1111-1111-1111"] * times


def test_a_text_that_cannot_be_read_in_time_passes_only_a_note() -> None:
    over = ReadingTime()
    over.end()
    for action in ("refuse", "redact"):
        with pytest.raises(GuardRefused, match="could not be read in time"):
            inspected(REAL[0], rules(action), "input", Told([]), GuardCounts(), time_left=over)
    notices: list[Notice] = []
    text = inspected(REAL[0], rules("note"), "input", Told(notices), GuardCounts(), time_left=over)
    assert text == REAL[0]
    assert "could not be read in time" in notices[0].detail

"""Prompts are cut only where that leaves the tokens as they are, and pieces are kept within bounds."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.backends.prompt_encoder import PromptEncoder
from stockpot.engine.chat_template import PromptPart
from stockpot.engine.driver import Driver, Vocabulary
from stockpot.engine.fake_driver import FakeVocabulary

CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


class CountingVocabulary(FakeVocabulary):
    """Remembers what it was asked to encode."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        self.asked.append(text)
        return super().encode(text, special=special, add_begin=add_begin)


class StrippingVocabulary(FakeVocabulary):
    """Takes white space away before the control token `<|im_end|>`, as some models' vocabularies do."""

    stripped: ClassVar[str] = "<|im_end|>"

    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        if special:
            before, found, after = text.partition(self.stripped)
            text = before.rstrip() + found + after if found else text
        return super().encode(text, special=special, add_begin=add_begin)


def encoder_of(vocabulary: Vocabulary, capacity_bytes: int = 10**6) -> PromptEncoder:
    return PromptEncoder(vocabulary, CONTROLS, capacity_bytes=capacity_bytes)


def chat(*turns: str) -> list[PromptPart]:
    return [PromptPart("".join(f"<|im_start|>user\n{turn}<|im_end|>\n" for turn in turns), literal=False)]


texts = st.lists(
    st.one_of(st.sampled_from(CONTROLS), st.text(max_size=20), st.sampled_from([" ", "\n", "  \n"])),
    max_size=12,
).map("".join)


@given(texts, st.booleans())
def test_pieces_give_the_tokens_of_the_whole(text: str, literal: bool) -> None:
    vocabulary = FakeVocabulary()
    encoder = encoder_of(vocabulary)
    pieces = encoder.pieces([PromptPart(text, literal)])
    expected = vocabulary.encode(text, special=not literal)
    assert encoder.encode(pieces).tolist() == expected
    assert encoder.encode(pieces).tolist() == expected


@given(texts)
def test_no_cut_where_the_vocabulary_looks_across_it(text: str) -> None:
    vocabulary = StrippingVocabulary()
    encoder = encoder_of(vocabulary)
    pieces = encoder.pieces([PromptPart(text, literal=False)])
    assert not any(piece.text[:10] == "<|im_end|>" and at for at, piece in enumerate(pieces))


def test_a_turn_more_encodes_that_turn_alone() -> None:
    vocabulary = CountingVocabulary()
    encoder = encoder_of(vocabulary)
    encoder.encode(encoder.pieces(chat("one", "two")))
    vocabulary.asked.clear()
    encoder.encode(encoder.pieces(chat("one", "two", "three")))
    assert vocabulary.asked == ["<|im_start|>user\nthree"]


def test_a_long_text_is_quick_the_second_time() -> None:
    encoder = encoder_of(FakeVocabulary())
    pieces = encoder.pieces(chat("word " * 2000))
    assert not encoder.is_quick(pieces)
    encoder.encode(pieces)
    assert encoder.is_quick(pieces)
    assert encoder.is_quick(encoder.pieces(chat("short")))


@pytest.mark.parametrize("capacity_bytes", [0, 100, 1000])
def test_what_is_kept_stays_within_its_capacity(capacity_bytes: int) -> None:
    encoder = encoder_of(FakeVocabulary(), capacity_bytes)
    for number in range(50):
        pieces = encoder.pieces(chat(f"question {number} " * (number % 7)))
        assert encoder.encode(pieces).tolist() == FakeVocabulary().encode(
            "".join(piece.text for piece in pieces), special=True
        )
        assert encoder.used_bytes <= capacity_bytes


def test_the_same_text_as_control_tokens_and_as_plain_text() -> None:
    encoder = encoder_of(FakeVocabulary())
    structural = encoder.encode([PromptPart("<|im_end|>", literal=False)]).tolist()
    plain = encoder.encode([PromptPart("<|im_end|>", literal=True)]).tolist()
    assert structural == [258]
    assert plain == list(b"<|im_end|>")


def test_each_tenant_has_pieces_of_its_own() -> None:
    vocabulary = CountingVocabulary()
    encoder = encoder_of(vocabulary)
    pieces = encoder.pieces(chat("secret " * 1000))
    expected = encoder.encode(pieces, "ann").tolist()
    assert encoder.is_quick(pieces, "ann")
    assert not encoder.is_quick(pieces, "bob")
    assert not encoder.is_quick(pieces)
    vocabulary.asked.clear()
    assert encoder.encode(pieces, "bob").tolist() == expected
    assert vocabulary.asked == [piece.text for piece in pieces]


def test_tenants_share_one_bound() -> None:
    encoder = encoder_of(FakeVocabulary(), 3000)
    for number in range(30):
        encoder.encode(encoder.pieces(chat("the same words for everyone")), f"tenant-{number}")
        assert encoder.used_bytes <= 3000


def test_the_real_vocabulary_gives_the_same_tokens(real_driver: Driver) -> None:
    vocabulary = real_driver.vocabulary
    encoder = encoder_of(vocabulary)
    turns = ("", " ", "Hello\n\n", "  indented\n\tcode()  ", "naïve 漢字 🍲", "1 + 1 = 2.", "<b>&amp;</b>\n")
    for number in range(len(turns)):
        parts = chat(*turns[: number + 1])
        pieces = encoder.pieces(parts)
        assert len(pieces) == 2 * (number + 1)
        assert encoder.encode(pieces).tolist() == vocabulary.encode(parts[0].text, special=True)

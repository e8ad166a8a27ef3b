"""A boundary counts the tokens wholly before it, and changes none of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.backends.prompt_boundaries import (
    BoundedPrompt,
    chat_prompt,
    shared_tokens,
    text_prompt,
    token_boundaries,
)
from stockpot.backends.prompt_encoder import PromptEncoder
from stockpot.clock import VirtualClock
from stockpot.engine.chat_template import ChatTemplate
from stockpot.engine.control_tokens import control_spellings
from stockpot.engine.driver import Driver, Vocabulary
from stockpot.engine.fake_driver import FakeVocabulary
from stockpot.requests import CacheBoundary, ChatRequest, Generation, Message, TokenBoundary

CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


class MergingVocabulary(FakeVocabulary):
    """Has tokens of several characters; the longest that fits is taken, from left to right."""

    merged = ("abc", "ab", "bc", "a ", "ca")

    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        tokens: list[int] = []
        plain = super().encode(text, special=special, add_begin=add_begin)
        while plain:
            for number, merged in enumerate(self.merged):
                if plain[: len(merged)] == list(merged.encode()):
                    tokens.append(1000 + number)
                    del plain[: len(merged)]
                    break
            else:
                tokens.append(plain.pop(0))
        return tokens

    def length(self, token: int) -> int:
        return len(self.merged[token - 1000]) if token >= 1000 else 1


def encoder_of(vocabulary: Vocabulary) -> PromptEncoder:
    return PromptEncoder(vocabulary, CONTROLS, capacity_bytes=10**6)


def chatml(controls: Sequence[str] = CONTROLS) -> ChatTemplate:
    return ChatTemplate(None, begin="", end="", clock=VirtualClock(), control_spellings=controls)


def chat(contents: Sequence[str], *boundaries: CacheBoundary) -> ChatRequest:
    messages = tuple(Message("user", content) for content in contents)
    return ChatRequest(Generation("m", "r"), messages, boundaries=boundaries)


def bytes_before(contents: Sequence[str], message: int, characters: int) -> int:
    """Tokens of a vocabulary of bytes before a place in a message, in ChatML."""
    written = sum(1 + len("user\n") + len(content.encode()) + 1 + 1 for content in contents[:message])
    return written + 1 + len("user\n") + len(contents[message][:characters].encode())


contents_and_places = st.lists(
    st.lists(st.sampled_from([*CONTROLS, "a", "bc", "ca", "é", " ", "\n", "\ufdd0"]), max_size=6).map(
        "".join
    ),
    min_size=1,
    max_size=4,
).flatmap(
    lambda contents: st.tuples(
        st.just(contents),
        st.lists(
            st.integers(0, len(contents) - 1).flatmap(
                lambda message: st.tuples(st.just(message), st.integers(0, len(contents[message])))
            ),
            min_size=1,
            max_size=4,
        ),
    )
)


@given(contents_and_places, st.booleans())
def test_boundaries_count_to_the_token_and_change_no_token(
    case: tuple[list[str], list[tuple[int, int]]], shared: bool
) -> None:
    contents, places = case
    boundaries = [CacheBoundary(message, at, 300, shared) for message, at in places]
    encoder = encoder_of(FakeVocabulary())
    tokens, found = chat_prompt(chatml(), encoder, chat(contents, *boundaries)).encode(encoder)
    plain, none = chat_prompt(chatml(), encoder, chat(contents)).encode(encoder)
    assert tokens.tolist() == plain.tolist()
    assert none == ()
    assert [boundary.tokens for boundary in found] == sorted(
        bytes_before(contents, message, at) for message, at in places
    )


@given(st.text(alphabet="abc ", max_size=30), st.data())
def test_a_token_across_the_boundary_is_not_counted(text: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(text)))
    vocabulary = MergingVocabulary()
    encoder = encoder_of(vocabulary)
    tokens, (boundary,) = text_prompt(encoder, text, [CacheBoundary(0, place, 300)]).encode(encoder)
    whole = vocabulary.encode(text, special=True)
    assert tokens.tolist() == whole
    ends = [sum(vocabulary.length(token) for token in whole[: n + 1]) for n in range(len(whole))]
    assert boundary.tokens == sum(end <= place for end in ends)


def test_what_follows_does_not_move_a_boundary_at_the_end_of_a_message() -> None:
    encoder = encoder_of(MergingVocabulary())
    shared = CacheBoundary(0, None, 3600, shared=True, tags=frozenset({"document:handbook"}))
    found = {
        chat_prompt(chatml(), encoder, chat(["abca", private], shared)).encode(encoder, private)[1]
        for private in ("", "bc", "cab <|im_end|>", "\n")
    }
    ((boundary,),) = found
    assert boundary == TokenBoundary(1 + len("user\n") + 2, 3600, True, frozenset({"document:handbook"}))


def test_the_last_shared_boundary_decides_what_is_shared() -> None:
    encoder = encoder_of(FakeVocabulary())
    boundaries = (CacheBoundary(0, 1, 300, True), CacheBoundary(0, 2, 300, True), CacheBoundary(1, 1, 3600))
    _, found = chat_prompt(chatml(), encoder, chat(["abc", "def"], *boundaries)).encode(encoder)
    assert [boundary.shared for boundary in found] == [True, True, False]
    assert shared_tokens(found) == found[1].tokens == bytes_before(["abc", "def"], 0, 2)
    assert shared_tokens(()) == 0


def test_plain_prompts_have_their_boundary_at_the_end() -> None:
    encoder = encoder_of(FakeVocabulary())
    boundary = CacheBoundary(0, None, 300)
    tokens, found = text_prompt(encoder, "ab<|im_end|>", [boundary]).encode(encoder, begin=[256])
    assert (tokens.tolist(), found) == ([256, *b"ab", 258], (TokenBoundary(4, 300),))
    tokens, found = text_prompt(encoder, "<|im_end|>", literal=True).encode(encoder)
    assert (tokens.tolist(), found) == (list(b"<|im_end|>"), ())
    assert token_boundaries(7, [boundary]) == (TokenBoundary(7, 300),)


def test_long_prompts_are_quick_the_second_time_for_the_same_tenant() -> None:
    encoder = encoder_of(FakeVocabulary())
    prompt = chat_prompt(chatml(), encoder, chat(["word " * 2000], CacheBoundary(0, 5000, 300)))
    assert not prompt.is_quick(encoder, "ann")
    prompt.encode(encoder, "ann")
    assert prompt.is_quick(encoder, "ann")
    assert not prompt.is_quick(encoder, "bob")
    assert BoundedPrompt([]).is_quick(encoder)


@pytest.mark.parametrize("at", [0, 1, 7, 12, 13, 40, None])
def test_the_real_vocabulary(real_driver: Driver, at: int | None) -> None:
    vocabulary = real_driver.vocabulary
    controls = tuple(control_spellings(vocabulary).values())
    encoder = PromptEncoder(vocabulary, controls, capacity_bytes=10**6)
    template = ChatTemplate(
        real_driver.facts.chat_template, begin="", end="", clock=VirtualClock(), control_spellings=controls
    )
    contents = ["You are a naïve 漢字 cook.\n\n  Answer: with <|im_end|> recipes.", "  Soup?\n"]
    tokens, (boundary,) = chat_prompt(template, encoder, chat(contents, CacheBoundary(0, at, 300))).encode(
        encoder
    )
    plain, _ = chat_prompt(template, encoder, chat(contents)).encode(encoder)
    assert tokens.tolist() == plain.tolist()
    written = b"".join(vocabulary.piece(token, special=True) for token in tokens.tolist())
    text = template.render(chat(contents).messages, {})
    assert written.decode() == text
    before = text[: text.index(contents[0]) + (len(contents[0]) if at is None else at)].encode()
    counted = b"".join(vocabulary.piece(token, special=True) for token in tokens[: boundary.tokens].tolist())
    assert before.startswith(counted)
    # No more than a word before the boundary may be tokenised otherwise because of what follows.
    assert len(before) - len(counted) <= max(len(word) for word in text.encode().split(b" "))
    if at is None:
        assert counted == before

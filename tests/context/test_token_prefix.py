"""In tokens of the real model, by its chat template: each prompt begins with the whole prompt before it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.backends.prompt_boundaries import chat_prompt
from stockpot.backends.prompt_encoder import PromptEncoder
from stockpot.clock import VirtualClock
from stockpot.context import Budget, Context, request_of
from stockpot.context.tokenizers import GgufTokens
from stockpot.engine.chat_template import ChatTemplate
from stockpot.engine.driver import Vocabulary
from stockpot.requests import Generation

CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
WORDS = st.text("ab cé\n日.", min_size=1, max_size=30)
TURNS = st.lists(st.tuples(WORDS, st.sampled_from(["time", "state", ""]), WORDS), min_size=2, max_size=8)


@pytest.fixture(scope="module")
def counter() -> GgufTokens:
    return GgufTokens.of("smollm2-135m-instruct")


def tokens_of(context: Context, vocabulary: Vocabulary) -> list[int]:
    template = ChatTemplate(None, begin="", end="", clock=VirtualClock(), control_spellings=CONTROLS)
    encoder = PromptEncoder(vocabulary, CONTROLS, capacity_bytes=10**6)
    request = request_of(context.prompt, Generation("m", ""))
    tokens, _ = chat_prompt(template, encoder, request).encode(encoder)
    return tokens.tolist()


@settings(max_examples=50, deadline=None)
@given(TURNS)
def test_each_prompt_begins_with_the_tokens_of_the_one_before(
    counter: GgufTokens, turns: list[tuple[str, str, str]]
) -> None:
    context = Context(system="Be kind.", documents={"d": "Be brief."}, examples=[("1 + 1?", "2.")])
    before: list[int] = []
    for number, (said, news, answered) in enumerate(turns):
        if news == "time":
            context.fact("time", f"10:{number:02}")
        elif news == "state":
            context.state.set("step", number)
        context.user(f"q {said}")
        now = tokens_of(context, counter.vocabulary)
        assert now[: len(before)] == before
        before = now
        context.assistant(f"a {answered}")


def test_after_a_compaction_the_stable_sections_are_the_same_tokens(counter: GgufTokens) -> None:
    context = Context(system="Be kind. " * 40)
    for number in range(12):
        context.user(f"question {number} " + "why? " * 20)
        context.assistant("because. " * 20)
    context.user("and now?")
    before = tokens_of(context, counter.vocabulary)
    fitted = context.fit(Budget(600), counter)
    assert fitted.decision is not None
    assert fitted.decision.compact
    now = tokens_of(context, counter.vocabulary)
    stable = counter.count("Be kind. " * 40)
    assert now[:stable] == before[:stable]
    assert len(now) < len(before) / 2

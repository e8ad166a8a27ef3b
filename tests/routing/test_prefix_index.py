"""The token index and the text index, against models that remember everything plainly."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.requests import ChatRequest, CompletionRequest, Generation, ImagePart, Message, Tool
from stockpot.routing.prefix_index import PrefixIndex, TokenChain
from stockpot.routing.text_index import TextIndex, chain_of

BLOCK = 2
GENERATION = Generation("model", "id")
PROMPTS = st.lists(st.integers(0, 1), max_size=9).map(tuple)
SCOPES = st.integers(0, 1)
PLACES = st.sampled_from(["GPU", "CPU"])
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "clear"]), PROMPTS, SCOPES, PLACES), max_size=40
)


def name(scope: int, tokens: tuple[int, ...]) -> int:
    """As a backend would: the whole prefix, and whose it is."""
    return hash((scope, tokens))


@given(actions=ACTIONS, asked=PROMPTS)
def test_the_index_says_what_a_backend_holds(actions: list[Any], asked: tuple[int, ...]) -> None:
    index = PrefixIndex(1000)
    held: set[tuple[int, tuple[int, ...], str]] = set()
    for action, prompt, scope, place in actions:
        prefixes = [prompt[:end] for end in range(BLOCK, len(prompt) + 1, BLOCK)]
        names = [name(scope, prefix) for prefix in prefixes]
        if action == "store" and names:
            # Some of it may be known: only the first block that is new is told of, behind its parent.
            known = 0
            while known < len(names) - 1 and any((scope, prefixes[known], p) in held for p in ("GPU", "CPU")):
                known += 1
            parent = names[known - 1] if known else None
            tokens = prompt[known * BLOCK : len(names) * BLOCK]
            index.stored(names[known:], parent, tokens, BLOCK, place=place)
            held |= {(scope, prefix, place) for prefix in prefixes[known:]}
        elif action == "remove" and names:
            index.removed(names[-1:], place=place)
            held.discard((scope, prefixes[-1], place))
        elif action == "clear":
            index.clear()
            held.clear()
        index.check_integrity()
    somewhere = {prefix for _, prefix, _ in held}
    expected = 0
    while len(asked) >= expected + BLOCK and asked[: expected + BLOCK] in somewhere:
        expected += BLOCK
    assert index.match(TokenChain(asked)) == expected


@given(prompts=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=12), max_size=30))
def test_it_stays_within_its_bound_and_keeps_what_is_asked_for(prompts: list[list[int]]) -> None:
    index = PrefixIndex(6)
    for prompt in prompts:
        whole = tuple(prompt[: len(prompt) // BLOCK * BLOCK])
        names = [name(0, whole[:end]) for end in range(BLOCK, len(whole) + 1, BLOCK)]
        index.stored(names, None, whole, BLOCK)
        index.check_integrity()
        assert len(index) <= 6
        assert index.match(TokenChain(whole)) == len(whole)
    index.limit(1)
    assert len(index) <= 1
    index.check_integrity()


def test_orphans_other_sizes_and_shapes_are_counted_and_left() -> None:
    index = PrefixIndex(100)
    index.stored([1, 2], None, [1, 2, 3, 4], 2)
    index.stored([9], 8, [5, 6], 2)
    index.stored([7], None, [1, 2, 3], 3)
    index.stored([7], None, [1, 2, 3], 2)
    index.stored([7], None, [], 0)
    stats = index.stats()
    assert (stats.blocks, stats.orphans, stats.refused) == (2, 1, 3)
    with pytest.raises(OverflowError):
        index.stored([5], None, [-1, 2], 2)


def test_an_adapter_has_blocks_of_its_own() -> None:
    index = PrefixIndex(100)
    index.stored([1], None, [1, 2], 2, adapter="polite")
    prompt = TokenChain([1, 2])
    assert index.match(prompt, "base") == 0
    assert index.match(prompt, "polite") == 2


def chat(*contents: str, **more: Any) -> ChatRequest:
    return ChatRequest(GENERATION, tuple(Message("user", content) for content in contents), **more)


@given(
    one=st.lists(st.text("ab", max_size=5).map(lambda text: text * 700), max_size=4),
    other=st.lists(st.text("ab", max_size=5).map(lambda text: text * 700), max_size=4),
)
def test_texts_share_as_much_as_they_begin_alike(one: list[str], other: list[str]) -> None:
    index = TextIndex(1000, idle_s=600)
    index.placed(chain_of("model", chat(*one)), 0.0)
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    least = sum(map(len, one[:same])) // 4
    found = index.match(chain_of("model", chat(*other)), 1.0)
    assert found >= least
    if same == len(other):
        assert found == least
    assert index.match(chain_of("another", chat(*other)), 1.0) == 0


def test_tools_images_and_prompts_are_part_of_the_text() -> None:
    index = TextIndex(1000, idle_s=600)
    huge = Tool("f", parameters={"maximum": 2**70})
    index.placed(chain_of("model", chat("hello" * 10, tools=(huge,))), 0.0)
    assert index.match(chain_of("model", chat("hello" * 10, tools=(huge,))), 0.0) > 12
    assert index.match(chain_of("model", chat("hello" * 10)), 0.0) == 0
    picture = Message("user", "look", parts=(ImagePart(url="http://a/b.png"),))
    index.placed(chain_of("model", ChatRequest(GENERATION, (picture,))), 0.0)
    assert (
        index.match(chain_of("model", ChatRequest(GENERATION, (picture, Message("user", "x")))), 0.0) == 257
    )
    for prompt in ("a" * 3000, list(range(700))):
        index.placed(chain_of("model", CompletionRequest(GENERATION, prompt)), 0.0)
        longer = CompletionRequest(GENERATION, [*prompt, 1] if isinstance(prompt, list) else prompt + "b")
        assert index.match(chain_of("model", longer), 0.0) == 512


def test_what_is_idle_is_forgotten_and_little_is_kept() -> None:
    index = TextIndex(3, idle_s=600)
    index.placed(chain_of("model", chat("first" * 4)), 0.0)
    assert index.tokens == 5
    assert index.match(chain_of("model", chat("first" * 4)), 30.0, within_s=10) == 0
    assert index.match(chain_of("model", chat("first" * 4)), 601.0) == 0
    index.placed(chain_of("model", chat("a", "b", "c", "d", "e")), 700.0)
    assert len(index) == 3
    assert index.match(chain_of("model", chat("a", "b", "c", "d", "e")), 700.0) == 0  # 3 characters
    index.limit(0)
    assert (len(index), index.tokens) == (0, 0)

"""When two answers say the same: True only where all signs agree."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.recall.questions.comparison import same_answer

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The capital is Vienna.", " the capital  is Vienna"),
        ('{"a": 1, "b": [true]}', '{ "b": [true], "a": 1.0 }'),
        (
            "You can return it within 30 days if it is unused.",
            "If it is unused, you can return it within 30 days.",
        ),
    ],
)
def test_the_same(first: str, second: str) -> None:
    if second.startswith("If"):
        assert same_answer(first, second, 0.98) is not False
    else:
        assert same_answer(first, second, None) is True


def test_a_word_more_that_says_nothing_is_the_same() -> None:
    first = "You can return unused items to any shop within 30 days of delivery."
    assert same_answer(
        first, "You can return the unused items to any shop within the 30 days of delivery.", 0.98
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("It takes 3 days.", "It takes 5 days."),
        ("Yes, that is possible.", "No, that is possible."),
        ("The answer is Vienna, in Austria.", "The answer is Graz, in Austria."),
        ("Run `ls -a`.", "Run `ls -l`."),
        ("```\nx = 1\n```", "```\nx = 2\n```"),
        ('{"a": 1}', '{"a": 2}'),
        ('{"a": true}', '{"a": 1}'),
        ("[1, 2]", "[2, 1]"),
        ("The shop opens at nine.", "It is closed at ten."),
        ("It is 10 MB.", "It is 10 GB."),
    ],
)
def test_different(first: str, second: str) -> None:
    assert same_answer(first, second, 0.99) is False
    assert same_answer(second, first, 0.99) is False


@pytest.mark.parametrize(
    ("first", "second", "similarity"),
    [
        ("The colour is teal.", "The colour is crimson.", 0.99),
        ("You can get a refund.", "You cannot get a refund.", 0.99),
        ("The cat is larger than the dog.", "The dog is larger than the cat.", 0.99),
        ("It is allowed, and costs 5 euros.", "It is allowed.", 0.99),
        ("A long text that says one thing", "Quite other words for it", 0.8),
        ("Equal words but no vector here", "Equal words but no vectors here", None),
        ('{"a": "one"}', '{"a": "two"}', 0.99),
        ('{"a": 1}', "a is 1", 0.99),
    ],
)
def test_what_cannot_be_told_is_not_the_same(first: str, second: str, similarity: float | None) -> None:
    assert same_answer(first, second, similarity) is not True
    assert same_answer(second, first, similarity) is not True


def test_far_apart_is_different() -> None:
    assert same_answer("Bees make honey out of nectar", "Trains leave the station often", 0.1) is False


@given(st.text(max_size=80), st.text(max_size=80), st.floats(0, 1) | st.none())
def test_it_is_symmetric_and_equal_texts_are_the_same(
    first: str, second: str, similarity: float | None
) -> None:
    assert same_answer(first, first, similarity) is True
    assert same_answer(first, second, similarity) == same_answer(second, first, similarity)


@given(st.lists(VALUES, min_size=1, max_size=3), st.lists(VALUES, min_size=1, max_size=3))
def test_json_is_compared_as_values(first: list[object], second: list[object]) -> None:
    same = same_answer(json.dumps(first), json.dumps(second, indent=2), 0.99)
    assert same is True or json.dumps(first) != json.dumps(second)
    if same is True:
        assert first == second


@given(st.integers(0, 999), st.integers(0, 999))
def test_another_number_is_another_answer(first: int, second: int) -> None:
    same = same_answer(f"It takes {first} days in all cases.", f"It takes {second} days in all cases.", 1.0)
    assert same is (first == second)

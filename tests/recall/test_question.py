"""What two questions have in common, and what rules out one answer for both."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.recall.questions.question import Likeness, compare, read_question
from stockpot.recall.questions.refusals import refusal_of

SAMPLE = (
    "how do i can not the a my order cancel 3 30 pm monday London Paris from to is it open close please hi ,"
    " ? . without what's `x` --force £5 10GB ok so one"
)
WORDS = st.sampled_from(SAMPLE.split(" "))
TEXTS = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=12).map(" ".join))


def likeness(first: str, second: str, before: str = "", other_before: str = "") -> Likeness:
    a, b = read_question(first, before), read_question(second, other_before)
    one, other = compare(a, b, 0.97), compare(b, a, 0.97)
    assert one == other
    return one


@pytest.mark.parametrize(
    ("first", "second", "conflict"),
    [
        ("How long do I boil 2 eggs?", "How long do I boil three eggs?", "numbers"),
        ("Can I upload 10MB?", "Can I upload 10GB?", "units"),
        ("Wake me at 7am", "Wake me at 7pm", "units"),
        ("Is it safe to drink?", "Is it not safe to drink?", "negation"),
        ("Which fees do I pay?", "Which fees don't I pay?", "negation"),
        ("How do I lock the door?", "How do I unlock the door?", "opposites"),
        ("How do I opt in to emails?", "How do I opt out of emails?", "opposites"),
        ("Do you open on Tuesday?", "Do you open on Thursday?", "date"),
        ("Can I come on Friday?", "Can I come tomorrow?", "date"),
        ("What is fever in adults?", "What is fever in babies?", "role"),
        ("What is fever?", "What is fever in babies?", "role"),
        ("Is it in France?", "Is it in Spain?", "place"),
        ("How far is it from Leuven to Ghent?", "How far is it from Ghent to Leuven?", "order"),
        ("How do I use Terraform here?", "How do I use Ansible here?", "names"),
        ("What does grep -v do?", "What does grep -V do?", "code"),
        ("What is `a == b`?", "What is `a is b`?", "code"),
        ("When does the course start?", "Where does the course start?", "kind"),
        ("Was kostet 5 kg?", "Was kostet 50 kg?", "numbers"),
    ],
)
def test_a_conflict_rules_out_one_answer(first: str, second: str, conflict: str) -> None:
    found = likeness(first, second)
    assert (found.conflict, found.equal_form) == (conflict, False)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("How long do I boil 2 eggs?", "For how much time should two eggs be boiled?"),
        ("What is statutory sick pay?", "Tell me what SSP is in short"),
        ("How do I cancel a booking?", "What is the procedure to call off a booking?"),
    ],
)
def test_other_words_are_no_conflict_and_no_equal_form(first: str, second: str) -> None:
    found = likeness(first, second)
    assert (found.conflict, found.equal_form) == ("", False)


def test_the_figures_tell_how_far_apart_the_words_are() -> None:
    found = likeness("How do I cancel a booking?", "How do I cancel a booking and get a refund?")
    assert 0 < found.distance < 1
    assert 0 < found.length_ratio < 1
    assert likeness("Hi!", "hi").distance == 0


def test_a_conversation_must_be_the_same_message_by_message() -> None:
    before = "user: I'm on the Basic plan\nassistant: Good to know."
    assert likeness("Can I add a user?", "can i add a user", before, before.upper().replace("USER:", "user:"))
    same = likeness(
        "Can I add a user?",
        "can i add a user",
        before,
        "user: i am on the basic plan!\nassistant: Good to know",
    )
    assert same.equal_form
    other = likeness("Can I add a user?", "can i add a user", before, before.replace("Basic", "Premium"))
    assert not other.equal_form
    shorter = likeness("Can I add a user?", "can i add a user", before, "user: I'm on the Basic plan")
    assert not shorter.equal_form


def test_a_conversation_that_names_other_numbers_conflicts() -> None:
    before = "user: I pay £26 a month\nassistant: Good to know."
    assert likeness("And with TV?", "And with TV?", before, before.replace("26", "45")).conflict == "context"


def test_a_message_over_several_lines_is_one() -> None:
    one = read_question("And now?", "user: first line\nsecond line\nassistant: well")
    assert [role for role, _ in one.said] == ["user", "assistant"]


@given(TEXTS)
def test_a_question_is_like_itself(text: str) -> None:
    found = likeness(text, text)
    assert found.equal_form
    assert found.conflict == ""


@given(TEXTS, TEXTS)
def test_what_is_the_same_has_no_conflict_and_what_conflicts_is_not_the_same(first: str, second: str) -> None:
    found = likeness(first, second)
    assert not (found.equal_form and found.conflict)
    assert 0 <= found.distance <= 1
    assert 0 <= found.length_ratio <= 1


@given(st.lists(WORDS, min_size=1, max_size=10), st.integers(2, 99), st.integers(2, 99))
def test_another_number_is_another_question(words: list[str], first: int, second: int) -> None:
    one, other = (" ".join([*words, "cost", str(number), "items"]) for number in (first, second))
    assert likeness(one, other).equal_form == (first == second)


@pytest.mark.parametrize("piece", ["the-", "x_", "a.b.", "1,", '"', "(", "what is my ", "tell me a ", "/a"])
def test_long_and_odd_texts_are_read_in_a_moment(piece: str) -> None:
    text = piece * (20_000 // len(piece))
    assert read_question(text).features is not None
    assert refusal_of(read_question(text)) in ("", "time", "personal", "creative")

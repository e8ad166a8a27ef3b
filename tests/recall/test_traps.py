"""Known traps for semantic caches (`fow-cache`, as it ships): none may count as the same question.

Half of its pairs, by hash, were looked at while the rules were made. The shares below are loose on purpose:
what must never break is that no trap is the same question.
"""

from __future__ import annotations

from typing import Any

import pytest

from stockpot.recall.questions.question import Likeness, compare, read_question

data = pytest.importorskip("fow_cache.data")

Message = dict[str, str]


def compared(a: str, b: str, before: str = "", other_before: str = "") -> Likeness:
    return compare(read_question(a, before), read_question(b, other_before), 1.0)


def context(messages: list[Message]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1])


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


def test_no_trap_is_the_same_question_and_most_are_told_to_conflict() -> None:
    pairs: list[dict[str, Any]] = data.load_questions()
    traps = [pair for pair in pairs if not pair["same_answer"]]
    likenesses = [compared(pair["a"], pair["b"]) for pair in traps]
    assert len(traps) == 300
    assert not any(likeness.equal_form for likeness in likenesses)
    assert share([bool(likeness.conflict) for likeness in likenesses]) > 0.75


def test_most_repeats_are_the_same_question_and_few_conflict() -> None:
    pairs: list[dict[str, Any]] = data.load_questions()
    repeats = [compared(pair["a"], pair["b"]) for pair in pairs if pair["category"] == "near_repeat"]
    paraphrases = [compared(pair["a"], pair["b"]) for pair in pairs if pair["category"] == "paraphrase"]
    assert share([likeness.equal_form for likeness in repeats]) > 0.7
    assert share([bool(likeness.conflict) for likeness in repeats + paraphrases]) < 0.1


def test_no_trap_of_a_conversation_is_the_same_question() -> None:
    for pair in data.load_conversations():
        if not pair["same_answer"]:
            a, b = pair["a"], pair["b"]
            likeness = compared(a[-1]["content"], b[-1]["content"], context(a), context(b))
            assert not likeness.equal_form, pair["note"]

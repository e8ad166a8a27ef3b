"""The chat script: the same for everybody, shaped as asked."""

from __future__ import annotations

from stockpot.bench.workload import ChatShape, WordSource, write_script


def test_script_has_the_asked_shape() -> None:
    shape = ChatShape(sessions=3, turns=2, concurrency=2, system_words=40, user_words=5)
    script = write_script(shape)
    assert len(script.system_text.split()) == 40
    assert [len(turn) for turn in script.user_texts] == [3, 3]
    assert all(len(text.split()) == 5 for turn in script.user_texts for text in turn)
    assert shape.name == "S3 T2 C2"


def test_script_depends_on_the_seed_alone() -> None:
    shape = ChatShape(sessions=4, turns=3, concurrency=2)
    assert write_script(shape) == write_script(shape)
    other_seed = ChatShape(sessions=4, turns=3, concurrency=2, seed=8)
    assert write_script(other_seed).system_text != write_script(shape).system_text
    # How many requests run at a time decides nothing about their text.
    more_at_once = ChatShape(sessions=4, turns=3, concurrency=4)
    assert write_script(more_at_once).user_texts == write_script(shape).user_texts


def test_the_words_of_a_seed_are_fixed() -> None:
    # Figures of different days compare only if the text stays the same.
    assert WordSource(7).text(6) == "snow doctor show saddle jump teacher"


def test_no_two_messages_are_equal() -> None:
    script = write_script(ChatShape(sessions=24, turns=3, concurrency=8))
    texts = [text for turn in script.user_texts for text in turn]
    assert len(set(texts)) == len(texts)

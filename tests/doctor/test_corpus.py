"""On conversations that were broken on purpose, the doctor names the cause; on healthy ones it is silent."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.bench.doctor.breaking import BREAKS
from stockpot.bench.doctor.corpus import write_corpus
from stockpot.bench.doctor.run import DoctorPlan, examined, measure_doctor
from stockpot.doctor.text_causes import first_difference, text_cause


@pytest.mark.parametrize("held_out", [False, True])
def test_causes_are_named_right_and_healthy_ones_let_be(tmp_path: Path, held_out: bool) -> None:

    named = examined(write_corpus(tmp_path, seed=41, held_out=held_out))
    assert named.total.total() >= 300
    assert named.healthy >= 100
    assert named.share() >= 0.95, {cause: named.right[cause] for cause in BREAKS}
    assert named.placed.total() >= 0.95 * named.total.total()
    assert named.false_alarms == 0


def test_a_corpus_follows_from_its_seed(tmp_path: Path) -> None:
    one, other = (write_corpus(tmp_path / name, seed=3, each=2, healthy_count=6) for name in ("a", "b"))
    assert [file.name for file in one.files] == [file.name for file in other.files]
    assert [file.read_bytes() for file in one.files] == [file.read_bytes() for file in other.files]
    assert {label.cause for label in one.labels.values()} == {*BREAKS, ""}


def test_the_benchmark_at_its_quick_size(tmp_path: Path) -> None:
    result = measure_doctor(DoctorPlan.quick(), cache_dir=tmp_path)
    assert result.tables[0].title == "Causes named"
    million = result.figures["million"]
    assert million["requests"] == 5_000


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_first_difference_is_where_they_differ(one: str, other: str) -> None:
    at = first_difference(one, other)
    assert one[:at] == other[:at]
    assert one[at : at + 1] != other[at : at + 1] or one == other
    text_cause(one, other)  # whatever the texts are


@pytest.mark.parametrize(
    ("earlier", "later", "cause"),
    [
        ("Time: 2026-11-25T08:00:01Z x", "Time: 2026-11-25T08:00:09Z x", "timestamp"),
        ("Time: 10:59 PM hello", "Time: 11:02 PM hello", "timestamp"),
        ("epoch 1764060000 q", "epoch 1764060911 q", "timestamp"),
        ("Tuesday, November 24, 2026", "Wednesday, November 25, 2026", "date"),
        ("Today is Monday.", "Today is Tuesday.", "date"),
        ("id 550e8400-e29b-41d4-a716-446655440000 z", "id 650e8400-e29b-41d4-a716-446655440001 z", "uuid"),
        ("tok Xk29dLq0A q", "tok Zp17bMm9Q q", "uuid"),
        ("Turn 9 of", "Turn 10 of", "counter"),
        ('S: {"a":1,"b":[1]} end', 'S: {"b":[1],"a":1} end', "key_order"),
        ('{"a": 1}', '{"a":1}', "white_space"),
        ("hello  you", "hello you", "white_space"),
        ("caf\u00e9 x", "cafe\u0301 x", "unicode_form"),
        ("it's", "it\u2019s", "unicode_form"),
        ("user Ann is", "user Bob is", None),
        ("budget 90 left", "budget 80 left", None),
    ],
)
def test_what_two_versions_of_a_text_differ_in(earlier: str, later: str, cause: str | None) -> None:
    assert text_cause(earlier, later) == cause

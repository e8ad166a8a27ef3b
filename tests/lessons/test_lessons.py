"""Each lesson on the real model: the right way finds more in the cache; and what the command says."""

from __future__ import annotations

import json

import pytest
from tests.mock_upstream import MockUpstream
from typer.testing import CliRunner

from stockpot.cli.main import build
from stockpot.errors import ConfigurationError, ServerUnreachable
from stockpot.lessons.all_lessons import all_lessons, chosen
from stockpot.lessons.lesson import Lesson, Size, Stage, measured


@pytest.mark.parametrize("lesson", all_lessons(), ids=lambda lesson: lesson.name)
async def test_the_right_way_finds_more(lesson: Lesson) -> None:
    outcome = await measured(lesson, Stage(), Size.quick())
    assert len(outcome.wrong.answers) == len(outcome.right.answers) >= 3
    assert outcome.right.hit_ratio > 0.4
    assert outcome.wrong.hit_ratio < 0.2


def test_lessons_are_chosen_by_number_and_name() -> None:
    assert [each.number for each in chosen(())] == [1, 2, 3, 4]
    assert [each.number for each in chosen(("3", "stable_prefix", "3"))] == [3, 1]
    with pytest.raises(ConfigurationError, match="There is no lesson '5'"):
        chosen(("5",))


async def test_what_needs_its_own_server_refuses_another() -> None:
    stage = Stage("http://127.0.0.1:9")
    for lesson in all_lessons():
        error = ConfigurationError if lesson.own_server else ServerUnreachable
        with pytest.raises(error):
            await measured(lesson, stage, Size.quick())


def test_the_command_lists_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    listed = CliRunner().invoke(build(), ["lessons"])
    assert listed.exit_code == 0
    assert all(lesson.title.split()[0] in listed.output for lesson in all_lessons())
    ran = CliRunner().invoke(build(), ["lessons", "run", "1", "--quick", "--json"])
    assert ran.exit_code == 0, ran.output
    (found,) = json.loads(ran.output)
    assert found["right"]["hit_ratio"] > found["wrong"]["hit_ratio"]
    shown = CliRunner().invoke(build(), ["lessons", "run", "stable_prefix", "--quick"])
    assert "hit ratio" in shown.output
    checked = CliRunner().invoke(build(), ["lessons", "check"])
    assert checked.exit_code == 0, checked.output
    assert "model and library" in checked.output


async def test_a_server_elsewhere_is_measured_whether_it_tells_cached_tokens_or_not() -> None:
    async with MockUpstream() as mock:
        outcome = await measured(chosen(("1",))[0], Stage(mock.url), Size.quick())
    assert outcome.right.hit_ratio == outcome.wrong.hit_ratio == 0
    assert len(outcome.right.answers) == 3


def test_a_server_that_is_not_there_is_said_to_be_so() -> None:
    checked = CliRunner().invoke(build(), ["lessons", "check", "--base-url", "http://127.0.0.1:9"])
    assert checked.exit_code == 1
    assert "no   server" in checked.output

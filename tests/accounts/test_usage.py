"""What the ledger adds up to, against sums made by hand; tasks and their outcomes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.accounts.records import BLUE, EXACT, NOON, RED, SEMANTIC, finished, kept

from stockpot.accounts.database import Database, open_database
from stockpot.accounts.ledger import Ledger
from stockpot.accounts.outcomes import Outcomes
from stockpot.accounts.usage import DIMENSIONS, UsageQuery, dimensions_of, moment, plain, tasks, usage
from stockpot.clock import VirtualClock
from stockpot.events import Recalled
from stockpot.records import Cost, RequestRecord


def _written(database: Database, folder: Path, records: Sequence[RequestRecord]) -> None:
    with contextlib.closing(Ledger(database, journal_folder=folder)) as ledger:
        for record in records:
            ledger.observe_request(record)


def test_sums_are_those_of_the_requests(database: Database, tmp_path: Path) -> None:
    records = [finished(ttft_s=n / 100, at=NOON + n) for n in range(1, 21)]
    records += [finished(BLUE, cause="timeout", cost=Cost(7, "unknown"), ttft_s=None)]
    _written(database, tmp_path, records)
    red, blue = usage(database, UsageQuery(by=("team",)))
    assert (red.group, blue.group) == ({"team": "red"}, {"team": "blue"})
    assert (red.requests, red.failures, red.unpriced) == (20, 0, 0)
    assert (red.fresh_tokens, red.cached_tokens, red.written_tokens, red.output_tokens) == (
        800,
        1_200,
        100,
        200,
    )
    assert red.hit_share == pytest.approx(0.6)
    assert red.cost_nanousd == 20_000
    assert red.ttft_mean_s == pytest.approx(0.105)
    assert red.ttft_p95_s == pytest.approx(0.19)
    assert (blue.failures, blue.unpriced, blue.ttft_mean_s, blue.ttft_p95_s) == (1, 1, None, None)
    (total,) = usage(database, UsageQuery())
    assert (total.requests, total.cost_nanousd) == (21, 20_007)


def test_kept_answers_cost_nothing_and_say_what_they_saved(database: Database, tmp_path: Path) -> None:
    missed, passed = Recalled("miss", "not_kept"), Recalled("bypass", "sampled")
    records = [finished(recalled=missed), finished(recalled=passed), kept(EXACT), kept(EXACT), kept(SEMANTIC)]
    records += [kept(EXACT, shared=True), finished(BLUE)]
    _written(database, tmp_path, records)
    red, blue = usage(database, UsageQuery(by=("team",)))
    assert (red.requests, red.exact_hits, red.semantic_hits, red.recall_share) == (6, 2, 1, 0.75)
    assert (red.saved_prompt_tokens, red.saved_output_tokens) == (280, 40)
    assert (red.saved_nanousd, red.saved_s) == (2_500, 3.5)
    # What cost nothing has a price, and takes no part in what was cached of prompts.
    assert (red.cost_nanousd, red.unpriced, red.hit_share) == (2_000, 0, 0.6)
    assert (blue.recall_share, blue.exact_hits, blue.saved_nanousd, blue.saved_s) == (None, 0, 0, 0.0)
    assert plain(red)["saved_usd"] == 2.5e-6
    by_outcome = {row.group["recall"]: row.requests for row in usage(database, UsageQuery(by=("recall",)))}
    assert by_outcome == {"exact": 2, "semantic": 1, "miss": 1, "bypass": 1, "": 2}
    (row,) = usage(database, UsageQuery(only={"recall": "semantic"}))
    assert (row.group, row.requests, row.saved_output_tokens) == ({}, 1, 20)


def test_tags_days_and_conditions(database: Database, tmp_path: Path) -> None:
    records = [finished(), finished(BLUE), finished(at=NOON - 86_400, model="large")]
    _written(database, tmp_path, records)
    by_tag = {row.group["tag"]: row.requests for row in usage(database, UsageQuery(by=("tag",)))}
    assert by_tag == {"nightly": 2, "batch": 2, "": 1}
    by_day = {row.group["day"]: row.requests for row in usage(database, UsageQuery(by=("day",)))}
    assert by_day == {"2026-11-05": 2, "2026-11-04": 1}
    for only, count in (
        ({"team": "blue"}, 1),
        ({"tag": "nightly"}, 2),
        ({"tag": "nightly", "model": "large"}, 1),
        ({"day": "2026-11-04"}, 1),
        ({"cause": ""}, 3),
        ({"team": "green"}, 0),
    ):
        assert sum(row.requests for row in usage(database, UsageQuery(only=only))) == count
    assert [row.requests for row in usage(database, UsageQuery(since=NOON, until=NOON + 1))] == [2]
    assert usage(database, UsageQuery(since=NOON + 1)) == []
    for name in DIMENSIONS:
        assert sum(row.requests for row in usage(database, UsageQuery(by=(name,)))) >= 3


def test_cost_of_a_successful_task(database: Database, tmp_path: Path) -> None:
    records = [finished(task="a"), finished(task="a"), finished(task="b"), finished(task="c"), finished()]
    records += [finished(BLUE, task="a")]
    _written(database, tmp_path, records)
    outcomes = Outcomes(database, clock=VirtualClock(NOON))
    assert outcomes.say(RED, "a", "failure") is not None
    said = outcomes.say(RED, "a", "success", note="at last", value=0.9)
    assert said is not None
    assert said.requests == 2
    assert outcomes.say(RED, "b", "failure") is not None
    (red,) = tasks(database, UsageQuery(only={"team": "red"}))
    assert (red.tasks, red.succeeded, red.failed, red.requests) == (3, 1, 1, 4)
    assert (red.cost_nanousd, red.nanousd_per_success) == (4_000, 4_000)
    by_task = {row.group["task"]: row for row in tasks(database, UsageQuery(by=("team", "task")))}
    assert by_task["c"].nanousd_per_success is None
    assert {row.group["team"]: row.tasks for row in tasks(database, UsageQuery(by=("team",)))} == {
        "red": 3,
        "blue": 1,
    }
    assert [each.outcome for each in outcomes.of(RED, "a")] == ["failure", "success"]


def test_a_task_is_its_callers_own(database: Database, tmp_path: Path) -> None:
    _written(database, tmp_path, [finished(task="shared words"), finished(BLUE, task="shared words")])
    outcomes = Outcomes(database)
    assert outcomes.say(BLUE, "shared words", "success") is not None
    assert outcomes.of(RED, "shared words") == []
    assert outcomes.say(replace(RED, team="green"), "shared words", "success") is None
    assert outcomes.say(replace(RED, key_id="colleague"), "shared words", "failure") is not None
    assert outcomes.say(RED, "", "success") is None


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 10**12), st.floats(0, 100)), max_size=30))
def test_groups_add_up(tmp_path_factory: pytest.TempPathFactory, made: list[tuple[str, int, float]]) -> None:
    folder = tmp_path_factory.mktemp("usage")
    with contextlib.closing(open_database(f"sqlite:///{folder}/stockpot.db")) as database:
        records = [
            finished(model=model, cost=Cost(nanousd, "configured"), ttft_s=ttft_s)
            for model, nanousd, ttft_s in made
        ]
        _written(database, folder, records)
        rows = usage(database, UsageQuery(by=("model",)))
        for row in rows:
            ours = [each for each in made if each[0] == row.group["model"]]
            assert row.requests == len(ours)
            assert row.cost_nanousd == sum(each[1] for each in ours)
            rank = math.ceil(0.95 * len(ours) - 1e-9)
            assert row.ttft_p95_s == sorted(each[2] for each in ours)[rank - 1]
        assert sum(row.requests for row in rows) == len(made)


def test_rows_as_plain_values(database: Database, tmp_path: Path) -> None:
    _written(database, tmp_path, [finished(task="a")])
    (row,) = usage(database, UsageQuery(by=("team", "model")))
    figures = plain(row)
    assert list(figures)[:3] == ["team", "model", "requests"]
    assert figures["cost_usd"] == 1e-6
    (task,) = tasks(database, UsageQuery())
    assert plain(task)["usd_per_success"] is None


def test_times_as_people_write_them() -> None:
    for text, then in (
        *(("7d", NOON - 7 * 86_400), ("90min", NOON - 5_400), ("24h", NOON - 86_400), ("0s", NOON)),
        *(("2026-11-05", NOON - 43_200), ("2026-11-05T12:00", NOON), ("2026-11-05T13:00+01:00", NOON)),
    ):
        assert moment(text, NOON) == then
    for text in ("soon", "7y", "d", "-7d", "2026-13-01", "", "٧d"):
        with pytest.raises(ValueError, match="is no time"):
            moment(text, NOON)


def test_dimensions_as_people_write_them() -> None:
    assert dimensions_of("team, model") == ("team", "model")
    assert dimensions_of("") == ()
    for text in ("teams", "team,team", "at"):
        with pytest.raises(ValueError, match=r"nothing to group by|twice"):
            dimensions_of(text)

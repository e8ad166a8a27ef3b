"""`stockpot usage` as a person types it: over a ledger with requests in it, and without."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from tests.accounts.records import BLUE, EXACT, RED, finished, kept
from typer.testing import CliRunner

from stockpot.accounts.accounts import open_accounts
from stockpot.cli import usage
from stockpot.clock import SystemClock
from stockpot.records import Cost
from stockpot.settings import Settings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger with three requests, where the command looks for it."""
    now = time.time()
    with contextlib.closing(open_accounts(Settings(data_dir=tmp_path), clock=SystemClock())) as accounts:
        accounts.ledger.observe_request(finished(at=now - 60, task="t1"))
        accounts.ledger.observe_request(finished(at=now - 2 * 86_400, session="=1+1"))
        accounts.ledger.observe_request(finished(BLUE, at=now - 60, cost=Cost(0, "unknown")))
        accounts.ledger.flush()
        accounts.outcomes.say(RED, "t1", "success")
    monkeypatch.setenv("STOCKPOT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def _run(*arguments: str, exit_code: int = 0) -> str:
    app = typer.Typer()
    app.callback()(lambda: None)
    usage.register(app)
    result = CliRunner().invoke(app, ["usage", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def test_a_table_for_people(folder: Path) -> None:
    lines = _run("--by", "team,model").splitlines()
    assert lines[0].split()[:4] == ["team", "model", "requests", "failed"]
    assert "red" in lines[1]
    assert "$0.000002" in lines[1]
    assert "60.0%" in lines[1]
    assert "$0.000000*" in lines[2]
    assert "1 request used tokens whose price is not known" in lines[3]


def test_kept_answers_have_columns_where_there_are_any(folder: Path) -> None:
    assert "recalled" not in _run("--by", "team").splitlines()[0]
    with contextlib.closing(open_accounts(Settings(data_dir=folder), clock=SystemClock())) as accounts:
        accounts.ledger.observe_request(kept(EXACT, at=time.time() - 60))
    lines = _run("--by", "team").splitlines()
    assert lines[0].split()[-6:] == ["recalled", "saved", "tokens", "saved", "wait", "saved"]
    red = next(line for line in lines if line.split()[0] == "red")
    assert red.split()[-7:] == ["1", "0", "100.0%", "110", "1.5", "s", "$0.000001"]
    (row,) = csv.DictReader(io.StringIO(_run("--only", "recall=exact", "--format", "csv")))
    assert (row["requests"], row["cost_usd"], row["saved_usd"]) == ("1", "0.0", "1e-06")


def test_json_and_csv_for_programs(folder: Path) -> None:
    rows = json.loads(_run("--by", "team", "--format", "json"))
    assert [(row["team"], row["requests"], row["cost_usd"]) for row in rows] == [
        ("red", 2, 2e-6),
        ("blue", 1, 0),
    ]
    text = _run("--by", "session", "--format", "csv", "--since", "7d")
    sessions = [row["session"] for row in csv.DictReader(io.StringIO(text))]
    assert sorted(sessions) == ["", "'=1+1"]  # no formula for a spreadsheet to run


def test_time_and_conditions(folder: Path) -> None:
    for arguments, count in (
        (("--since", "1d"), 2),
        (("--until", "1d"), 1),
        (("--team", "red"), 2),
        (("--only", "team=red", "--since", "1h"), 1),
        (("--tag", "nightly"), 2),
    ):
        rows = json.loads(_run(*arguments, "--format", "json"))
        assert sum(row["requests"] for row in rows) == count


def test_tasks(folder: Path) -> None:
    lines = _run("--tasks", "--by", "team").splitlines()
    assert lines[0].endswith("cost per success ")
    assert lines[1].split() == ["red", "1", "1", "0", "0", "1", "$0.000001", "$0.000001"]
    (row,) = json.loads(_run("--tasks", "--format", "json"))
    assert row["usd_per_success"] == 1e-6


def test_nothing_is_said(folder: Path) -> None:
    assert "no such requests" in _run("--team", "green")
    text = _run("--team", "green", "--format", "csv", "--by", "team")
    assert text.startswith("team,requests,failures,")


@pytest.mark.parametrize(
    "arguments",
    [("--by", "soup"), ("--since", "soon"), ("--format", "xml"), ("--only", "team"), ("--only", "soup=1")],
)
def test_wrong_words_are_refused(folder: Path, arguments: tuple[str, str]) -> None:
    assert arguments[0] in _run(*arguments, exit_code=2)


def test_a_database_that_is_away_is_one_sentence(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STOCKPOT_")}
    environment["STOCKPOT_ACCOUNTS__DATABASE"] = "postgresql://me:hunter2@127.0.0.1:9/db"
    code = (
        "import typer\nfrom stockpot.cli import usage\nfrom stockpot.errors import StockpotError\n"
        "app = typer.Typer()\nusage.register(app)\n"
        "try:\n    app([])\n"
        "except StockpotError as error:\n    print(error)\n    raise SystemExit(error.exit_code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 69, result.stderr
    assert "cannot be used" in result.stdout
    assert "hunter2" not in result.stdout + result.stderr

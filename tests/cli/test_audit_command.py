"""`stockpot audit` as a person types it: the log listed, found whole, and found changed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stockpot.accounts.accounts import open_audit
from stockpot.accounts.database import database_url, open_database
from stockpot.cli import audit
from stockpot.clock import SystemClock
from stockpot.settings import Settings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of three lines, where the command looks for it."""
    settings = Settings(data_dir=tmp_path)
    with contextlib.closing(open_database(database_url(settings))) as database:
        log = open_audit(database, settings, clock=SystemClock())
        for n in range(3):
            log.append("admin", "keys.create", f"k{n}", {"name": "ci\x1b[31m"})
    monkeypatch.setenv("STOCKPOT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def _run(*arguments: str, exit_code: int = 0) -> str:
    app = typer.Typer()
    audit.register(app)
    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["audit", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def _changed(folder: Path, statement: str) -> None:
    opened = contextlib.closing(open_database(f"sqlite:///{folder}/stockpot.db"))
    with opened as database, database.writing() as connection:
        for each in ("DROP TRIGGER audit_no_update", "DROP TRIGGER audit_no_delete", statement):
            connection.exec_driver_sql(each)


def test_the_list_is_newest_first(folder: Path) -> None:
    lines = _run("list", "--limit", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["line", "3", "2"]
    assert "keys.create" in lines[1]
    assert "\x1b" not in lines[1]
    entries = json.loads(_run("list", "--json", "--actor", "admin", "--since", "1h"))
    assert [entry["seq"] for entry in entries] == [3, 2, 1]
    assert entries[0]["detail"] == {"name": "ci\x1b[31m"}
    assert "no such lines" in _run("list", "--action", "keys.revoke")
    _run("list", "--since", "soon", exit_code=2)


def test_a_whole_log_has_a_head_to_keep(folder: Path) -> None:
    output = _run("verify")
    assert "3 lines, each as it was written." in output
    head = output.split()[-1]
    assert head.startswith("3:")
    assert "3 lines" in _run("verify", "--head", head)
    _run("verify", "--head", "soup", exit_code=2)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE audit SET actor = 'x' WHERE seq = 2", "WRONG: line 2 was edited"),
        ("DELETE FROM audit WHERE seq = 2", "WRONG: line 2 was removed"),
        ("DELETE FROM audit WHERE seq = 3", "WRONG: line 3 was cut off at the end"),
    ],
)
def test_a_change_is_found_and_its_line_named(folder: Path, statement: str, words: str) -> None:
    _changed(folder, statement)
    assert words in _run("verify", exit_code=1)
    assert json.loads(_run("verify", "--json", exit_code=1))["problems"]


def test_without_an_anchor_it_says_what_it_cannot_see(folder: Path) -> None:
    (folder / "audit.anchor").unlink()
    assert "no anchor" in _run("verify")

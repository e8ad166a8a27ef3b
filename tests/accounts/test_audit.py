"""The audit log: a chain by several writers, and what `verify` finds of whatever is done to it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import delete, insert, update
from sqlalchemy.exc import DatabaseError

from stockpot.accounts.audit import START, AuditLog, Entry, Head
from stockpot.accounts.database import Database, open_database

LINES = 6


@pytest.fixture
def log(database: Database, tmp_path: Path) -> AuditLog:
    return AuditLog(database, anchor=tmp_path / "audit.anchor")


def _filled(log: AuditLog) -> list[Entry]:
    return [log.append("admin", "keys.create", f"k{n}", {"name": f"n{n}", "n": n}) for n in range(LINES)]


def _without_triggers(database: Database) -> None:
    """As somebody who means it would begin."""
    with database.writing() as connection:
        if database.is_sqlite:
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS audit_no_update")
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS audit_no_delete")
        else:
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS audit_append_only ON audit")


def _rewritten(database: Database, lines: Sequence[Entry]) -> None:
    """The table with these lines instead of what it has."""
    _without_triggers(database)
    with database.writing() as connection:
        connection.execute(delete(database.tables.audit))
        for line in lines:
            connection.execute(insert(database.tables.audit).values(asdict(line)))


def _chained(lines: Sequence[Entry]) -> list[Entry]:
    """The lines with hashes that fit: what a forger with time would write."""
    chained: list[Entry] = []
    for line in lines:
        previous = chained[-1].hash if chained else START
        line = replace(line, seq=len(chained) + 1, previous=previous)
        chained.append(replace(line, hash=line.reckoned()))
    return chained


def test_a_log_that_was_left_alone_is_whole(log: AuditLog) -> None:
    assert log.verify().problems == ()
    lines = _filled(log)
    verdict = log.verify()
    assert verdict.problems == ()
    assert verdict.head == verdict.anchored == Head(LINES, lines[-1].hash)
    assert log.verify(Head(3, lines[2].hash)).problems == ()
    assert log.entries() == lines[::-1]
    assert log.entries(action="keys.create", actor="admin", limit=2) == lines[:-3:-1]
    assert log.entries(actor="nobody") == []


def test_secrets_are_not_in_it(log: AuditLog) -> None:
    entry = log.append(
        "sk-sp-abc-verysecret",
        "keys.create",
        "k1",
        {"api_key": "hunter2", "note": "use sk-sp-abc-verysecret", "x": SecretStr("hunter2"), "tags": ("a",)},
    )
    line = str(asdict(entry))
    assert "verysecret" not in line
    assert "hunter2" not in line
    assert entry.detail == '{"api_key":"***","note":"use sk-***","tags":["a"],"x":"**********"}'
    assert log.verify().problems == ()


def test_the_database_itself_refuses_changes(log: AuditLog, database: Database) -> None:
    _filled(log)
    table = database.tables.audit
    for change in (update(table).values(actor="x"), delete(table)):
        with pytest.raises(DatabaseError), database.writing() as connection:
            connection.execute(change)
    assert log.verify().problems == ()


_WRITER = """
import pathlib, sys
from stockpot.accounts.audit import AuditLog
from stockpot.accounts.database import open_database
log = AuditLog(open_database(sys.argv[1]), anchor=pathlib.Path(sys.argv[2]))
for n in range(20):
    log.append(sys.argv[3], "test", str(n))
"""


def test_processes_append_to_one_chain(url: str, log: AuditLog, tmp_path: Path) -> None:
    anchor = str(tmp_path / "audit.anchor")
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, url, anchor, f"writer{n}"], stderr=subprocess.PIPE)
        for n in range(3)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors.decode()
        assert errors == b""
    verdict = log.verify()
    assert verdict.problems == ()
    assert verdict.head.lines == 60
    assert verdict.anchored == verdict.head


Change = Callable[[list[Entry]], list[Entry]]


def _with_other_actor(lines: list[Entry]) -> list[Entry]:
    return [*lines[:2], replace(lines[2], actor="x"), *lines[3:]]


def _without_third(lines: list[Entry]) -> list[Entry]:
    return [*lines[:2], *lines[3:]]


def _without_some(lines: list[Entry]) -> list[Entry]:
    return [*lines[:1], *lines[4:]]


def _without_last(lines: list[Entry]) -> list[Entry]:
    return lines[:-1]


def _emptied(lines: list[Entry]) -> list[Entry]:
    return []


def _with_one_before(lines: list[Entry]) -> list[Entry]:
    return [replace(lines[0], seq=0), *lines]


@pytest.mark.parametrize(
    ("change", "forged", "words"),
    [
        (_with_other_actor, False, "line 3 was edited"),
        (_with_other_actor, True, "line 6 is not the one"),
        (_without_third, False, "line 3 was removed"),
        (_without_third, True, "line 6 was cut off at the end"),
        (_without_some, False, "lines 2 to 4 were removed"),
        (_without_last, False, "line 6 was cut off at the end"),
        (_emptied, False, "lines 1 to 6 were cut off at the end"),
        (_with_one_before, False, "a line before line 1 was added"),
    ],
)
def test_each_change_is_found_and_named(
    log: AuditLog, database: Database, change: Change, forged: bool, words: str
) -> None:
    changed = change(_filled(log))
    _rewritten(database, _chained(changed) if forged else changed)
    assert any(words in problem for problem in log.verify().problems), log.verify().problems


def test_a_head_kept_elsewhere_finds_a_forger_who_has_the_anchor_too(
    log: AuditLog, database: Database, tmp_path: Path
) -> None:
    lines = _filled(log)
    kept = Head.parsed(str(Head(LINES, lines[-1].hash)))
    forged = _chained([replace(lines[0], actor="somebody else"), *lines[1:]])
    _rewritten(database, forged)
    (tmp_path / "audit.anchor").unlink()
    assert log.verify().problems == ()  # nothing to compare with
    assert log.verify().anchored is None
    assert any("the head that was kept" in problem for problem in log.verify(kept).problems)


def test_the_anchor_stays_as_witness_when_the_log_goes_on(log: AuditLog, database: Database) -> None:
    lines = _filled(log)
    _rewritten(database, lines[:3])
    for n in range(LINES):
        log.append("admin", "later", str(n))
    assert any("line 6 is not the one" in problem for problem in log.verify().problems)


@contextlib.contextmanager
def _fresh() -> Generator[tuple[Database, AuditLog]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(open_database(f"sqlite:///{folder}/audit.db")) as database,
    ):
        yield database, AuditLog(database, anchor=Path(folder) / "anchor")


_FIELDS = st.sampled_from(["at", "actor", "action", "target", "detail", "previous", "hash"])


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_done_is_found(data: st.DataObject) -> None:
    """Any edit, removal or swap of lines, with hashes left as they were or made to fit."""
    with _fresh() as (database, log):
        lines = _filled(log)
        changed: list[Any] = list(lines)
        place, other = data.draw(st.permutations(range(LINES)))[:2]
        match data.draw(st.sampled_from(["edit", "remove", "swap", "swap numbers", "duplicate"])):
            case "edit":
                name = data.draw(_FIELDS)
                value = 1.5 if name == "at" else data.draw(st.text(st.characters(codec="ascii"), max_size=5))
                changed[place] = replace(lines[place], **{name: value})
            case "remove":
                del changed[place]
            case "swap":
                changed[place] = replace(lines[other], seq=place + 1)
                changed[other] = replace(lines[place], seq=other + 1)
            case "swap numbers":
                changed[place] = replace(lines[other], seq=place + 1, previous=lines[place].previous)
                changed[place] = replace(changed[place], hash=changed[place].reckoned())
            case _:
                changed.append(replace(lines[place], seq=LINES + 1))
        if data.draw(st.booleans()):
            changed = _chained(changed)
        _rewritten(database, changed)
        # With hashes that fit, an edit of hashes is undone, and a line at the end is an append.
        harmless = changed[:LINES] == lines and changed == _chained(changed)
        assert bool(log.verify().problems) != harmless


def test_an_anchor_that_is_no_anchor_is_said(log: AuditLog, tmp_path: Path) -> None:
    _filled(log)
    (tmp_path / "audit.anchor").write_text("soup")
    assert any("cannot be read" in problem for problem in log.verify().problems)
    assert (tmp_path / "audit.anchor").read_text() == "soup"

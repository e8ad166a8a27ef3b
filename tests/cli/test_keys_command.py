"""`stockpot keys` as a person and as a program type it, over a real database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from stockpot.accounts.accounts import open_audit
from stockpot.accounts.database import database_url, open_database
from stockpot.cli import keys
from stockpot.clock import SystemClock
from stockpot.identity.key import digest_of, key_id_of
from stockpot.identity.key_admin import UnknownKey
from stockpot.settings import Settings


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STOCKPOT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return Settings()


def stockpot(*arguments: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    keys.register(app)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["keys", *arguments])


def listed() -> list[dict[str, Any]]:
    return json.loads(stockpot("list", "--json").stdout)


def test_the_life_of_a_key(settings: Settings, tmp_path: Path) -> None:
    assert "stockpot keys create" in stockpot("list").stdout
    options = ("--team", "search", "--tag", "a", "--tag", "b", "--model", "small", "--expires", "30d")
    limits = ("--requests-per-minute", "60", "--usd-per-day", "1.5")
    made = stockpot("create", "--name", "ci", *options, *limits)
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()  # alone, so that it can be piped
    key_id = key_id_of(key)
    assert key_id is not None
    assert "shown this once" in made.stderr
    (line,) = listed()
    assert (line["id"], line["team"], line["tags"], line["models"]) == (
        key_id,
        "search",
        ["a", "b"],
        ["small"],
    )
    assert line["limits"] == {"requests_per_minute": 60, "usd_per_day": 1.5}
    assert line["expires_at"] == pytest.approx(line["created_at"] + 30 * 86_400)
    table = stockpot("list").stdout
    assert all(word in table for word in (key_id, "ci", "search", "small", "until", "requests_per_minute 60"))

    rotated = stockpot("rotate", key_id, "--grace", "5m", "--json")
    new = json.loads(rotated.stdout)["key"]
    assert new != key
    assert key_id_of(new) == key_id
    assert f"{key_id} (ci) is revoked" in stockpot("revoke", key_id).stdout
    assert [each["state"] for each in listed()] == ["revoked"]

    database = open_database(database_url(settings))
    entries = open_audit(database, settings, clock=SystemClock()).entries()
    database.close()
    assert [entry.action for entry in reversed(entries)] == ["keys.create", "keys.rotate", "keys.revoke"]
    assert {entry.target for entry in entries} == {key_id}
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.is_file())
    assert digest_of(key).encode() in kept
    assert not any(secret[-43:].encode() in kept for secret in (key, new))


def test_wrong_use_is_told() -> None:
    assert stockpot("create").exit_code == 2
    assert stockpot("create", "--name", "a", "--expires", "soon").exit_code == 2
    assert stockpot("create", "--name", "a", "--concurrency", "-1").exit_code == 2
    unknown = stockpot("revoke", "nope")
    assert isinstance(unknown.exception, UnknownKey)
    assert unknown.exception.exit_code == 1

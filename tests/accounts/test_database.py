"""Opening a database: created, brought up to date, by several at once; and what is refused."""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from pydantic import SecretStr
from sqlalchemy.engine import make_url
from tests.accounts.records import EXACT, finished, kept
from tests.redis_server import free_port

from stockpot import accounts
from stockpot.accounts.database import Database, DatabaseUnavailable, database_url, open_database
from stockpot.accounts.ledger import Ledger
from stockpot.accounts.rows import COLUMNS, row_of
from stockpot.accounts.schema import LATEST_REVISION, metadata
from stockpot.accounts.usage import UsageQuery, usage
from stockpot.errors import ConfigurationError
from stockpot.settings import AccountSettings, Settings


def test_migrations_make_what_the_schema_says(database: Database) -> None:
    with database.reading() as connection:
        assert not compare_metadata(MigrationContext.configure(connection), metadata())
        revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    assert revision == LATEST_REVISION


def _of_the_first_version(url: str) -> Database:
    """A database as the version without recall left it."""
    database = Database(url)
    config = Config()
    config.set_main_option("script_location", str(Path(accounts.__file__).with_name("migrations")))
    with database.writing() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    return database


def test_an_older_database_keeps_its_rows(url: str, tmp_path: Path) -> None:
    old, waiting = row_of(finished(request_id="old")), row_of(finished(request_id="waiting"))
    assert len(old) == len(COLUMNS)
    with contextlib.closing(_of_the_first_version(url)) as database, database.writing() as connection:
        mark = "?" if database.is_sqlite else "%s"
        connection.exec_driver_sql(
            f"INSERT INTO requests ({', '.join(COLUMNS)}) VALUES ({', '.join(mark for _ in COLUMNS)})", old
        )
    # The database was away when that version ended.
    (tmp_path / "ledger-before.journal").write_text(json.dumps(waiting) + "\n")
    with contextlib.closing(open_database(url)) as database:
        with database.reading() as connection:
            assert not compare_metadata(MigrationContext.configure(connection), metadata())
        with contextlib.closing(Ledger(database, journal_folder=tmp_path)) as ledger:
            ledger.observe_request(kept(EXACT))
        (row,) = usage(database, UsageQuery())
        before, now = usage(database, UsageQuery(by=("recall",)))
    assert (row.requests, row.cost_nanousd, row.saved_nanousd) == (3, 2_000, 1_000)
    assert (before.group["recall"], before.requests, before.recall_share) == ("", 2, None)
    assert (now.group["recall"], now.requests, now.recall_share) == ("exact", 1, 1.0)


def test_processes_that_start_at_once_do_not_collide(url: str) -> None:
    code = (
        "import sys; from stockpot.accounts.database import open_database; open_database(sys.argv[1]).close()"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_a_database_of_a_newer_version_is_left_alone(database: Database, url: str) -> None:
    with database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="newer"):
        open_database(url)


def test_the_file_is_the_users_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    url = database_url(settings)
    open_database(url).close()
    path = tmp_path / "data" / "stockpot.db"
    assert make_url(url).database == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_settings_may_name_another() -> None:
    url = "postgresql+psycopg://me:pw@host/db"
    assert database_url(Settings(accounts=AccountSettings(database=SecretStr(url)))) == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("not a url", "no SQLAlchemy URL"),
        ("mysql://root@host/db", "not supported"),
        ("sqlite://", "names no file"),
        ("sqlite:////proc/nowhere/stockpot.db", "cannot be created"),
    ],
)
def test_what_cannot_be_used_is_said(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        open_database(url)


def test_a_missing_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r"stockpot\[postgres\]"):
        open_database("postgresql://me@127.0.0.1/db")


def test_a_server_that_is_away_is_said_without_its_password() -> None:
    url = f"postgresql://me:hunter2@127.0.0.1:{free_port()}/db"
    with pytest.raises(DatabaseUnavailable) as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.status == 503


def test_an_error_leaves_nothing_behind(database: Database) -> None:
    with contextlib.suppress(ZeroDivisionError), database.writing() as connection:
        connection.exec_driver_sql("INSERT INTO request_tags VALUES ('r', 't', 0)")
        raise ZeroDivisionError
    with database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM request_tags").scalar() == 0

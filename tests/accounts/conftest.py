"""A database for each test: SQLite in a folder of its own, and PostgreSQL where its programs are."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from tests.accounts.postgres_server import PostgresServer

from stockpot.accounts.database import Database, open_database


@pytest.fixture(scope="session")
def postgres() -> Generator[PostgresServer]:
    missing = [name for name in ("initdb", "postgres", "createdb") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"PostgreSQL is not installed: there is no {missing[0]}")
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'data' / 'stockpot.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.fresh()


@pytest.fixture
def database(url: str) -> Generator[Database]:
    with contextlib.closing(open_database(url)) as opened:
        yield opened

"""The SQL database of ledger, keys and audit log: SQLite, or PostgreSQL where several gateways share one."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from stockpot.accounts.schema import LATEST_REVISION, tables
from stockpot.errors import ConfigurationError, RequestError
from stockpot.settings import Settings

FILE_NAME = "stockpot.db"

_MIGRATIONS = Path(__file__).with_name("migrations")
_LOCK = 0x5350_4D49
"""Of PostgreSQL's advisory locks, the one whose holder migrates."""
_WRITES = "stockpot_writes"
_BUSY_S = 5
_CONNECT_S = 5


class DatabaseUnavailable(RequestError):
    """The database cannot be reached, or does not answer; trying again may help."""

    status = 503
    exit_code = 69
    code = "database_unavailable"


def database_url(settings: Settings) -> str:
    """Where these settings keep accounts: as they say, or SQLite in `data_dir`."""
    configured = settings.accounts.database
    if configured is not None:
        return configured.get_secret_value()
    return f"sqlite:///{settings.data_dir.expanduser().absolute() / FILE_NAME}"


def open_database(url: str) -> Database:
    """The database at a SQLAlchemy URL, created where it is not there, its tables brought up to date.

    Several processes may do so at once. Raises ConfigurationError for a URL that cannot be used and for a
    database a newer Stockpot wrote, DatabaseUnavailable for one that does not answer.
    """
    database = Database(url)
    try:
        database.migrate()
    except BaseException:
        database.close()
        raise
    return database


class Database:
    """Connections to one database. Thread-safe; every call may block, so none is made on the event loop.

    A transaction that writes is serialised with all others on SQLite from its beginning (BEGIN IMMEDIATE),
    so that what it reads stays true until it is committed; on PostgreSQL it takes the locks it needs itself.
    """

    def __init__(self, url: str) -> None:
        self.url = _parsed(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.tables = tables()
        self.shown_url = self.url.render_as_string(hide_password=True)
        self._engine = _sqlite(self.url) if self.is_sqlite else _postgresql(self.url)

    @contextmanager
    def reading(self) -> Generator[Connection]:
        """A transaction that only reads. Raises DatabaseUnavailable."""
        with self._mapped_errors(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Generator[Connection]:
        """A transaction, committed at the end, rolled back on an error. Raises DatabaseUnavailable."""
        engine = self._engine.execution_options(**{_WRITES: True})
        with self._mapped_errors(), engine.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Bring the tables up to date; one process at a time, the others find it done."""
        with self.reading() as connection:
            if _revision(connection) == LATEST_REVISION:
                return
        with self.writing() as connection:
            if not self.is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            if _revision(connection) != LATEST_REVISION:
                _upgrade(connection, self.shown_url)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _mapped_errors(self) -> Generator[None]:
        try:
            yield
        except (InterfaceError, OperationalError, PoolTimeout) as error:
            cause = getattr(error, "orig", None) or error
            reason = " ".join(str(cause).split())
            raise DatabaseUnavailable(
                f"The database {self.shown_url} cannot be used: {reason}. Check that it runs and that"
                " accounts.database is right.",
                retry_after_s=5,
            ) from error


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:  # its words hold the URL, and that may hold a password
        raise ConfigurationError(
            "accounts.database is no SQLAlchemy URL; write sqlite:////folder/file.db or"
            " postgresql+psycopg://user:password@host/database."
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise ConfigurationError(
            f"accounts.database begins with {parsed.drivername}, which is not supported; write sqlite:////..."
            " or postgresql+psycopg://...."
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "accounts.database names no file; write sqlite:// and an absolute path, as sqlite:////folder/file.db."
        )
    return parsed


def _sqlite(url: URL) -> Engine:
    path = Path(url.database or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)  # it holds digests of keys, and who asked for what
    except OSError as error:
        raise ConfigurationError(
            f"The database {path} cannot be created: {error.strerror}. Set accounts.database or data_dir to"
            " a place this user may write."
        ) from error
    engine = create_engine(url, connect_args={"timeout": _BUSY_S, "check_same_thread": False})

    def on_connect(connection: Any, _: object) -> None:
        # The driver's own idea of transactions begins none before DDL; SQLAlchemy's "begin" says when.
        connection.isolation_level = None
        _use_wal(connection)
        # In WAL mode a commit survives the end of the process without a sync; a checkpoint syncs.
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")

    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine


def _use_wal(connection: Any) -> None:
    """Readers and a writer beside each other. Changing the mode wants the file alone and does not wait, so
    of several processes that start at once all but one have to try again."""
    deadline_s = time.monotonic() + _BUSY_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        with contextlib.suppress(sqlite3.OperationalError):
            if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
                return  # a file system without shared memory: slower, and right
            continue
        if time.monotonic() > deadline_s:
            return  # the next connection tries
        time.sleep(0.02)


def _postgresql(url: URL) -> Engine:
    # A server that vanished without a word must not hold the ledger's writer for the kernel's quarter hour.
    bounds: dict[str, Any] = {"connect_timeout": _CONNECT_S, "tcp_user_timeout": 10_000}
    try:
        return create_engine(
            url,
            connect_args={name: value for name, value in bounds.items() if name not in url.query},
            pool_pre_ping=True,
            pool_size=4,
            max_overflow=8,
        )
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "accounts.database is a PostgreSQL URL, and its driver is not installed; install"
            " stockpot[postgres]."
        ) from error


def _revision(connection: Connection) -> str | None:
    """Which migration made the tables; None: there are none yet."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()


def _upgrade(connection: Connection, shown_url: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(
            f"The database {shown_url} cannot be brought up to date: {error}. Was it written by a newer"
            " Stockpot? Then use that, or another database."
        ) from error

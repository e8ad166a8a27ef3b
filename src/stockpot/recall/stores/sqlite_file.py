"""The SQLite file of the answers: opened by threads and processes together, replaced when it is damaged."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import sqlite3
import threading
from collections.abc import Generator
from pathlib import Path

from stockpot.recall.stores.backing import StoreLost

_LOG = logging.getLogger(__name__)

_BUSY_S = 2.0
"""For so long a thread waits for another process that writes."""
_PAGE_CACHE_KIB = 8192
_JOURNAL_BYTES_MAX = 16 * 2**20
VERSION = 1
"""Of the schema. It belongs in the file's name: two versions of Stockpot side by side have a file each."""

_SCHEMA = """
CREATE TABLE state (incarnation TEXT NOT NULL, head INTEGER NOT NULL, entries INTEGER NOT NULL,
                    size_bytes INTEGER NOT NULL);
CREATE TABLE entries (number INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB NOT NULL UNIQUE, tenant TEXT NOT NULL,
                      writer TEXT NOT NULL, model TEXT NOT NULL, created_at REAL NOT NULL,
                      expires_at REAL NOT NULL, used_at REAL NOT NULL, size_bytes INTEGER NOT NULL,
                      partitioned INTEGER NOT NULL, packed BLOB NOT NULL);
CREATE INDEX entries_tenant ON entries (tenant);
CREATE INDEX entries_writer ON entries (writer);
CREATE INDEX entries_model ON entries (model);
CREATE INDEX entries_expires ON entries (expires_at);
CREATE INDEX entries_used ON entries (used_at, number, size_bytes);
CREATE INDEX entries_partitioned ON entries (number) WHERE partitioned;
CREATE TABLE answers (number INTEGER PRIMARY KEY, answer BLOB NOT NULL);
CREATE TABLE tags (tag TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (tag, number)) WITHOUT ROWID;
CREATE INDEX tags_number ON tags (number);
CREATE TABLE invalidations (seq INTEGER PRIMARY KEY, packed BLOB NOT NULL);
CREATE TABLE observations (number INTEGER PRIMARY KEY AUTOINCREMENT, writer TEXT NOT NULL,
                           packed BLOB NOT NULL);
CREATE INDEX observations_writer ON observations (writer);
CREATE TRIGGER entry_came AFTER INSERT ON entries BEGIN
  UPDATE state SET entries = entries + 1, size_bytes = size_bytes + new.size_bytes;
END;
CREATE TRIGGER entry_went AFTER DELETE ON entries BEGIN
  UPDATE state SET entries = entries - 1, size_bytes = size_bytes - old.size_bytes;
  DELETE FROM answers WHERE number = old.number;
  DELETE FROM tags WHERE number = old.number;
END;
"""

_Held = tuple[sqlite3.Connection, tuple[int, int]]

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class SqliteFile:
    """Any thread: each has a connection of its own, for as long as the file at `path` is the one it opened.

    A file that was deleted is made anew, a damaged one moved aside (`.damaged`, the last one) first; other
    threads and processes see by the file's number that theirs is another, and open the new one. A lock file
    keeps two from doing so at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: set[sqlite3.Connection] = set()

    @contextlib.contextmanager
    def connection(self) -> Generator[sqlite3.Connection]:
        """For one piece of work, outside a transaction before and after. Raises StoreLost for whatever SQLite
        or the disk says, with a damaged file out of the way."""
        connection: sqlite3.Connection | None = None
        try:
            connection = self._current()
            yield connection
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.DatabaseError) and _code(error) in _DAMAGED:
                self._move_aside(error)
            raise StoreLost(f"{self.path} cannot be used ({error}).") from error
        finally:
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.rollback()  # does nothing where the work is committed

    def close(self) -> None:
        """All connections; no thread may be using one. Idempotent."""
        with self._lock:
            connections, self._open = self._open, set()
        for connection in connections:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _current(self) -> sqlite3.Connection:
        held = self._held()
        if held is not None:
            if self._number() == held[1]:
                return held[0]
            self._local.held = None
            self._let_go(held[0])
        with self._alone():
            self._make()
            self._local.tried = number = self._number()
            connection = self._connect()
        assert number is not None, "it has just been made"
        with self._lock:
            self._open.add(connection)
        self._local.held = (connection, number)
        return connection

    def _number(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        """No other thread or process opens or moves the file."""
        descriptor = os.open(self._beside(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make(self) -> None:
        if self._number() is None:
            for end in ("-wal", "-shm"):  # of a file that was deleted: they would be taken for the new one's
                self._beside(end).unlink(missing_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA cache_size = -{_PAGE_CACHE_KIB}")
            connection.execute(f"PRAGMA journal_size_limit = {_JOURNAL_BYTES_MAX}")
            self._bring_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _bring_up(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == VERSION:
            return
        # One transaction: a process that is killed here leaves an empty file, which is then brought up.
        connection.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} INSERT INTO state VALUES ('{secrets.token_hex(8)}', 0, 0, 0);"
            f" PRAGMA user_version = {VERSION}; COMMIT;"
        )

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        held, self._local.held = self._held(), None
        with contextlib.suppress(OSError), self._alone():
            if self._number() == self._local.tried:  # else another has done it
                for end in ("-wal", "-shm", ""):
                    with contextlib.suppress(FileNotFoundError):
                        self._beside(end).rename(self._beside(f".damaged{end}"))
                _LOG.error(
                    "recall: %s is damaged (%s); it was moved to %s and a new one is begun",
                    *(self.path, error, self._beside(".damaged")),
                )
        if held is not None:
            self._let_go(held[0])

    def _held(self) -> _Held | None:
        return getattr(self._local, "held", None)

    def _let_go(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            self._open.discard(connection)
        with contextlib.suppress(sqlite3.Error):
            connection.close()

    def _beside(self, end: str) -> Path:
        return self.path.with_name(self.path.name + end)


def _code(error: sqlite3.Error) -> int:
    """The primary code; errors of the module itself have none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF

"""The ledger: a row for every request, written by a thread of its own so that no answer waits for it.

Rows are written every half second, or sooner when many wait; SIGTERM (`close`) writes all. A process that is
killed (kill -9, a crash of the machine) loses at most the last second of rows. While the database is away
rows go to a journal on disk (`journal`) and from there into the database when it is back; a row that arrives
twice counts once.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, delete, select
from sqlalchemy.exc import SQLAlchemyError

from stockpot.accounts.database import Database, DatabaseUnavailable
from stockpot.accounts.journal import Journal
from stockpot.accounts.rows import DAY_S, LAYOUTS, Row, row_of, tag_rows
from stockpot.clock import Clock, SystemClock
from stockpot.records import RequestRecord

_LOG = logging.getLogger(__name__)

_GATHER_S = 0.4
"""How long rows are gathered, from the first on; with the time to write them, under a second."""
_BATCH_ROWS = 1_000
_VARIABLES_MAX = 20_000
"""Of one statement; SQLite takes 32,766 (its "Implementation Limits")."""
_IDLE_S = 5.0
_PRUNE_EVERY_S = 3_600.0
_PRUNE_ROWS = 2_000
_RETRY_S = 1.0
_RETRY_MAX_S = 15.0


@dataclass(frozen=True, slots=True)
class LedgerStats:
    """Rows since the start: brought to the database; put into the journal; lost for want of room, or because
    neither database nor disk took them. `waiting` are in memory now."""

    written: int
    journaled: int
    lost: int
    waiting: int
    database_up: bool


class Ledger:
    """A `records.RecordObserver`. `observe_request` is called on one thread (the event loop), the rest from
    anywhere; `close` once. `queue_limit` rows wait in memory at most, then new ones are lost, and counted."""

    def __init__(
        self,
        database: Database,
        *,
        journal_folder: Path,
        queue_limit: int = 50_000,
        keep_days: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._database = database
        self._journal = Journal(journal_folder)
        self._queue_limit = queue_limit
        self._keep_days = keep_days
        self._clock = clock or SystemClock()
        self._queue: deque[RequestRecord | threading.Event] = deque()
        self._wake, self._hurry = threading.Event(), threading.Event()
        self._closing = False
        self._written = self._journaled = self._lost = self._overflowed = 0
        self._retry_s = _RETRY_S
        self._up_again_s: float | None = None  # None: the database is up, as far as is known
        self._recovered = False
        self._prune_at_s = self._clock.monotonic()
        self._inserts = {len(columns): _Insertion(database, "requests", columns) for columns in LAYOUTS}
        self._insert_tags = _Insertion(database, "request_tags", ("request_id", "tag", "at"))
        self._thread = threading.Thread(target=self._run, name="stockpot-ledger", daemon=True)
        self._thread.start()

    def observe_request(self, record: RequestRecord) -> None:
        """Put a record where the writer finds it; a few hundred nanoseconds."""
        if len(self._queue) >= self._queue_limit:
            self._overflowed += 1
            return
        self._queue.append(record)
        if not self._wake.is_set():
            self._wake.set()
        if len(self._queue) >= _BATCH_ROWS and not self._hurry.is_set():
            self._hurry.set()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until all that was observed before is in the database (or the journal); False: not in time."""
        if self._closing:
            return not self._thread.is_alive()
        done = threading.Event()
        self._queue.append(done)
        self._wake.set()
        self._hurry.set()
        return done.wait(timeout_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """Write all that was observed, then stop. Idempotent."""
        self._closing = True
        self._wake.set()
        self._hurry.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _LOG.error(
                "ledger: %d rows are not written after %g s, and lost; is the database slow?",
                *(len(self._queue), timeout_s),
            )

    def stats(self) -> LedgerStats:
        return LedgerStats(
            self._written,
            self._journaled,
            self._lost + self._overflowed,
            len(self._queue),
            self._up_again_s is None,
        )

    def _run(self) -> None:
        """Gather and write, until closed and empty; then see to the journal and to old rows."""
        reported = 0
        while True:
            self._wake.wait(_IDLE_S)
            if self._wake.is_set() and not self._closing:
                self._hurry.wait(_GATHER_S)
            # Before the queue is looked at: what is put there afterwards sets them again.
            self._wake.clear()
            self._hurry.clear()
            closing = self._closing
            while self._queue:
                self._write_some()
            if reported < self._overflowed:
                _LOG.error(
                    "ledger: %d rows are lost: %d already waited (accounts.queue_limit); is it slow?",
                    *(self._overflowed - reported, self._queue_limit),
                )
                reported = self._overflowed
            self._guarded(self._recover)
            if closing:
                self._journal.close()
                return
            self._guarded(self._prune)

    def _guarded(self, work: Callable[[], None]) -> None:
        """The writer outlives whatever goes wrong beside its writing."""
        try:
            work()
        except DatabaseUnavailable as error:
            self._went_away(error)
        except Exception:  # noqa: BLE001 - a dead writer would lose every row from here on
            _LOG.exception("ledger: %s failed; it is tried again", work.__name__.strip("_"))

    def _write_some(self) -> None:
        """Up to a batch from the queue, into the database or the journal."""
        rows: list[Row] = []
        waiters: list[threading.Event] = []
        while self._queue and len(rows) < _BATCH_ROWS:
            each = self._queue.popleft()
            if isinstance(each, threading.Event):
                waiters.append(each)
                continue
            try:
                rows.append(row_of(each))
            except Exception:  # noqa: BLE001 - as above; the row names itself
                self._lost += 1
                _LOG.exception("ledger: the row of request %s cannot be made, and is lost", each.request_id)
        if rows:
            self._keep(rows)
        for waiter in waiters:
            waiter.set()

    def _keep(self, rows: Sequence[Row]) -> None:
        if self._may_try():
            try:
                self._written += self._store(rows)
            except DatabaseUnavailable as error:
                self._went_away(error)
            else:
                self._came_back()
                return
        try:
            self._journal.append(rows)
        except OSError as error:
            self._lost += len(rows)
            _LOG.error(
                "ledger: %d rows are lost: the database is away and the journal cannot be written (%s)",
                *(len(rows), error.strerror),
            )
        else:
            self._journaled += len(rows)

    def _store(self, rows: Sequence[Row]) -> int:
        """Rows into the database, all in one transaction; how many it took. One that cannot be stored must
        not keep the others out: then each has a transaction of its own. Raises DatabaseUnavailable."""
        try:
            with self._database.writing() as connection:
                self._insert_into(connection, rows)
        except DatabaseUnavailable:
            raise
        except (SQLAlchemyError, ValueError) as error:
            if len(rows) == 1:
                self._lost += 1
                _LOG.error(
                    "ledger: the row of request %s does not fit the database, and is lost: %s",
                    *(rows[0][0], getattr(error, "orig", error)),
                )
                return 0
            return sum(self._store([row]) for row in rows)
        return len(rows)

    def _insert_into(self, connection: Connection, rows: Sequence[Row]) -> None:
        for width, insertion in self._inserts.items():
            insertion.into(connection, [row for row in rows if len(row) == width])
        self._insert_tags.into(connection, [tag for row in rows for tag in tag_rows(row)])

    def _may_try(self) -> bool:
        return self._up_again_s is None or self._clock.monotonic() >= self._up_again_s

    def _went_away(self, error: DatabaseUnavailable) -> None:
        if self._up_again_s is None:
            _LOG.error("ledger: %s Rows go to a journal until it is back.", error)
        self._up_again_s = self._clock.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)

    def _came_back(self) -> None:
        if self._up_again_s is not None:
            _LOG.info("ledger: the database is back")
        self._up_again_s, self._retry_s = None, _RETRY_S

    def _recover(self) -> None:
        """Bring journals to the database: once at the start (others may have left some), then where there is
        something of ours. What is brought twice is stored once: rows have an identity."""
        if not self._may_try() or (self._recovered and self._journal.is_empty):
            return
        for file, path in self._journal.waiting():
            count = 0
            for rows in self._journal.rows(file):
                count += self._store(rows)
            self._journal.remove(path)
            self._written += count
            _LOG.info("ledger: %d rows of a journal are in the database now", count)
        self._came_back()
        self._recovered = True

    def _prune(self) -> None:
        """Forget rows older than `keep_days`, some at a time so that writers get between."""
        if self._keep_days is None or self._clock.monotonic() < self._prune_at_s or not self._may_try():
            return
        before = self._clock.wall() - self._keep_days * DAY_S
        tables = self._database.tables
        for table, name in (
            (tables.request_tags, "request_id"),
            (tables.requests, "id"),
            (tables.outcomes, "id"),
        ):
            identity = table.c[name]
            old = select(identity).where(table.c.at < before).limit(_PRUNE_ROWS)
            removed = 1
            while removed and not self._queue and not self._closing:
                with self._database.writing() as connection:
                    removed = connection.execute(delete(table).where(identity.in_(old))).rowcount
            if removed:
                return  # rows wait to be written; the rest goes next time
        self._prune_at_s = self._clock.monotonic() + _PRUNE_EVERY_S


class _Insertion:
    """An insertion in the driver's own words: through SQLAlchemy a row takes several times as long.

    SQLite is given many rows in one statement. It lets go of the interpreter for each statement, and to have
    it back beside a busy event loop takes up to the switch interval: row by row was slower than requests
    came.
    """

    def __init__(self, database: Database, table: str, columns: Sequence[str]) -> None:
        mark = "?" if database.is_sqlite else "%s"
        self._head = f"INSERT INTO {table} ({', '.join(columns)}) VALUES "
        self._row = f"({', '.join(mark for _ in columns)})"
        self._tail = " ON CONFLICT DO NOTHING"
        # A few sizes, so that the few statements are kept prepared: one of every size would fill memory.
        rows_max = _VARIABLES_MAX // len(columns) if database.is_sqlite else 0
        self._sizes = [size for size in (256, 64, 16, 4, 1) if size <= rows_max]

    def into(self, connection: Connection, rows: Sequence[Sequence[object]]) -> None:
        if not self._sizes:
            if rows:
                connection.exec_driver_sql(self._head + self._row + self._tail, [tuple(row) for row in rows])
            return
        start = 0
        while start < len(rows):
            size = next(size for size in self._sizes if size <= len(rows) - start)
            text = self._head + ", ".join([self._row] * size) + self._tail
            some = rows[start : start + size]
            connection.exec_driver_sql(text, tuple(itertools.chain.from_iterable(some)))
            start += size

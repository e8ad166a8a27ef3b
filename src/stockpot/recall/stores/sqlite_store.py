"""Answers in an SQLite file, for the processes of one machine."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from stockpot.errors import ConfigurationError
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.evidence.evidence import Observation
from stockpot.recall.stores.backing import (
    Backing,
    Batch,
    Behind,
    Changes,
    Page,
    Position,
    StoreLost,
    Written,
    forgets,
)
from stockpot.recall.stores.memory import id_bytes
from stockpot.recall.stores.packing import (
    Invalidation,
    NotPackable,
    pack_entry,
    pack_invalidation,
    pack_observation,
    unpack_entry,
    unpack_invalidation,
    unpack_observation,
)
from stockpot.recall.stores.sqlite_file import VERSION, SqliteFile

_READERS = 2
_READ_S = 1.0
"""A read that takes longer is a miss: the disk does not answer."""
_WRITE_S = 10.0
_REMOVE_S = 120.0
_EXPIRED_AT_ONCE = 1000
_EVICTED_AT_ONCE = 64
_KEPT_INVALIDATIONS = 10_000
_KEPT_OBSERVATIONS = 100_000

_T = TypeVar("_T")


class SqliteBacking(Backing):
    """In `folder`, which is made, as is the file, readable by its owner alone. Reads have threads of their
    own, which no write holds up (WAL); one thread writes. A commit survives the death of the process; what
    was invalidated also that of the machine."""

    name = "SQLite file"

    def __init__(self, folder: Path, *, capacity_bytes: int) -> None:
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._file = SqliteFile(folder / f"answers-{VERSION}.sqlite")
        self._origin = secrets.token_hex(8)
        self._is_closed = False
        self._readers = ThreadPoolExecutor(_READERS, "recall-read")
        self._writer = ThreadPoolExecutor(1, "recall-write")

    async def open(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self._folder / f".{self._origin}"
            probe.touch(mode=0o600)
            probe.unlink()
        except OSError as error:
            raise ConfigurationError(
                f"Answers cannot be kept in {self._folder} ({error}); give a data_dir that can be written, or"
                " turn recall off."
            ) from error
        await self._in(self._writer, _WRITE_S, self._nothing)

    async def close(self) -> None:
        self._is_closed = True
        await asyncio.to_thread(self._end)

    async def write(self, batch: Batch, position: Position, now: float) -> Written:
        return await self._in(self._writer, _WRITE_S, lambda: self._write(batch, position, now))

    async def read(self, id: bytes) -> tuple[Entry | None, bool]:
        return await self._in(self._readers, _READ_S, lambda: self._read(id))

    async def changes(self, since: Position) -> Changes:
        return await self._in(self._readers, _READ_S, lambda: self._changes(since))

    async def remove(self, selector: Selector) -> Sequence[Entry]:
        return await self._in(self._writer, _REMOVE_S, lambda: self._remove(selector))

    async def page(self, start: int | None, *, partitioned: bool, count: int) -> Page:
        return await self._in(self._readers, _WRITE_S, lambda: self._page(start, partitioned, count))

    async def existing(self, ids: Collection[bytes]) -> set[bytes]:
        return await self._in(self._readers, _WRITE_S, lambda: self._existing(ids))

    async def observations(self) -> tuple[Sequence[Observation], int]:
        return await self._in(self._readers, _REMOVE_S, self._observations)

    async def _in(self, pool: ThreadPoolExecutor, within_s: float, work: Callable[[], _T]) -> _T:
        if self._is_closed:
            raise StoreLost(f"{self._file.path} is closed.")
        try:
            async with asyncio.timeout(within_s):
                return await asyncio.get_running_loop().run_in_executor(pool, work)
        except TimeoutError as error:
            raise StoreLost(f"{self._file.path} was not ready within {within_s:g} s.") from error

    def _end(self) -> None:
        self._writer.shutdown()
        self._readers.shutdown()
        self._file.close()

    def _nothing(self) -> None:
        with self._file.connection():
            pass

    def _write(self, batch: Batch, position: Position, now: float) -> Written:
        lost = 0
        with self._file.connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            if _position(connection) != position:
                raise Behind
            for entry in batch.entries:
                try:
                    self._insert(connection, entry, batch.uses.get(entry.key[:16], now))
                except NotPackable:
                    lost += 1
            connection.executemany(
                "UPDATE entries SET used_at = max(used_at, ?) WHERE id = ?",
                [(at, id) for id, at in batch.uses.items()],
            )
            _note(connection, batch.observations)
            expired = connection.execute(
                "DELETE FROM entries WHERE number IN"
                " (SELECT number FROM entries WHERE expires_at <= ? LIMIT ?)",
                (now, _EXPIRED_AT_ONCE),
            ).rowcount
            evicted = self._make_room(connection)
            entries, size = connection.execute("SELECT entries, size_bytes FROM state").fetchone()
            position = _position(connection)
            connection.execute("COMMIT")
        return Written(position, entries, size, evicted=evicted, expired=expired, lost=lost)

    def _insert(self, connection: sqlite3.Connection, entry: Entry, used_at: float) -> None:
        packed, id = pack_entry(entry), entry.key[:16]
        if connection.execute("DELETE FROM entries WHERE id = ?", (id,)).rowcount:
            # Other processes may have the old one in memory.
            self._log(connection, Selector(id=entry.id, before=entry.created_at))
        number = connection.execute(
            "INSERT INTO entries (id, tenant, writer, model, created_at, expires_at, used_at, size_bytes,"
            " partitioned, packed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(id, entry.tenant, entry.writer, entry.model, entry.created_at, entry.expires_at, used_at),
                *(entry.size_bytes, bool(entry.partition), packed),
            ),
        ).lastrowid
        connection.execute("INSERT INTO answers VALUES (?, ?)", (number, entry.answer))
        connection.executemany("INSERT INTO tags VALUES (?, ?)", [(tag, number) for tag in entry.tags])

    def _make_room(self, connection: sqlite3.Connection) -> int:
        evicted = 0
        (size,) = connection.execute("SELECT size_bytes FROM state").fetchone()
        while size > self._capacity_bytes:
            rows = connection.execute(
                "SELECT number, size_bytes FROM entries ORDER BY used_at, number LIMIT ?", (_EVICTED_AT_ONCE,)
            ).fetchall()
            if not rows:
                break
            for number, freed in rows:
                connection.execute("DELETE FROM entries WHERE number = ?", (number,))
                evicted += 1
                size -= freed
                if size <= self._capacity_bytes:
                    break
        return evicted

    def _log(self, connection: sqlite3.Connection, selector: Selector) -> None:
        packed = pack_invalidation(Invalidation(self._origin, selector))
        connection.execute("UPDATE state SET head = head + 1")
        connection.execute("INSERT INTO invalidations SELECT head, ? FROM state", (packed,))
        connection.execute(
            "DELETE FROM invalidations WHERE seq <= (SELECT head FROM state) - ?", (_KEPT_INVALIDATIONS,)
        )

    def _read(self, id: bytes) -> tuple[Entry | None, bool]:
        with self._file.connection() as connection:
            row = connection.execute(
                "SELECT packed, answer FROM entries JOIN answers USING (number) WHERE id = ?", (id,)
            ).fetchone()
        entry = None if row is None else unpack_entry(*row)
        return entry, row is not None and entry is None

    def _changes(self, since: Position) -> Changes:
        with self._file.connection() as connection:
            connection.execute("BEGIN")  # one view of both tables
            position = _position(connection)
            if position == since:
                return Changes(position, ())
            rows = connection.execute(
                "SELECT packed FROM invalidations WHERE seq > ? ORDER BY seq", (since.seq,)
            ).fetchall()
        if position.incarnation != since.incarnation or len(rows) != position.seq - since.seq:
            return Changes(position, None)
        found = [unpack_invalidation(packed) for (packed,) in rows]
        return Changes(position, [each.selector for each in found if each.origin != self._origin])

    def _remove(self, selector: Selector) -> Sequence[Entry]:
        where, values = _where(selector)
        removed: list[Entry] = []
        with self._file.connection() as connection:
            connection.execute("PRAGMA synchronous = FULL")
            try:
                connection.execute("BEGIN IMMEDIATE")
                self._log(connection, selector)
                rows = connection.execute(f"SELECT packed FROM entries WHERE {where}", values)
                for (packed,) in rows:
                    entry = unpack_entry(packed)
                    if entry is not None:
                        removed.append(entry)
                connection.execute(f"DELETE FROM entries WHERE {where}", values)
                if selector.writer is not None:
                    _unlearn(connection, selector)
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.rollback()
                connection.execute("PRAGMA synchronous = NORMAL")
        return removed

    def _page(self, start: int | None, partitioned: bool, count: int) -> Page:
        which = "AND partitioned" if partitioned else ""
        with self._file.connection() as connection:
            rows = connection.execute(
                f"SELECT number, packed FROM entries WHERE number < ? {which} ORDER BY number DESC LIMIT ?",
                (2**62 if start is None else start, count),
            ).fetchall()
        entries = [entry for _, packed in rows if (entry := unpack_entry(packed)) is not None]
        return Page(entries, len(rows) - len(entries), rows[-1][0] if len(rows) == count else None)

    def _existing(self, ids: Collection[bytes]) -> set[bytes]:
        with self._file.connection() as connection:
            query = "SELECT 1 FROM entries WHERE id = ?"
            return {id for id in ids if connection.execute(query, (id,)).fetchone() is not None}

    def _observations(self) -> tuple[Sequence[Observation], int]:
        with self._file.connection() as connection:
            rows = connection.execute("SELECT packed FROM observations ORDER BY number").fetchall()
        found = [each for (packed,) in rows if (each := unpack_observation(packed)) is not None]
        return found, len(rows) - len(found)


def _position(connection: sqlite3.Connection) -> Position:
    incarnation, head = connection.execute("SELECT incarnation, head FROM state").fetchone()
    return Position(incarnation, head)


def _note(connection: sqlite3.Connection, observations: Sequence[Observation]) -> None:
    for observation in observations:
        try:
            row = (observation.writer, pack_observation(observation))
        except NotPackable:
            continue  # evidence about what could not be kept either
        connection.execute("INSERT INTO observations (writer, packed) VALUES (?, ?)", row)
    if observations:
        connection.execute(
            "DELETE FROM observations WHERE number <= (SELECT max(number) FROM observations) - ?",
            (_KEPT_OBSERVATIONS,),
        )


def _unlearn(connection: sqlite3.Connection, selector: Selector) -> None:
    rows = connection.execute("SELECT number, packed FROM observations WHERE writer = ?", (selector.writer,))
    gone = [
        (number,)
        for number, packed in rows.fetchall()
        if (observation := unpack_observation(packed)) is None or forgets(selector, observation)
    ]
    connection.executemany("DELETE FROM observations WHERE number = ?", gone)


def _where(selector: Selector) -> tuple[str, list[object]]:
    if selector.everything:
        return "1", []
    terms: list[tuple[str, object]] = []
    if selector.id is not None:
        terms.append(("id = ?", id_bytes(selector.id)))
    if selector.tag is not None:
        terms.append(("number IN (SELECT number FROM tags WHERE tag = ?)", selector.tag))
    for column in ("model", "tenant", "writer"):
        value = getattr(selector, column)
        if value is not None:
            terms.append((f"{column} = ?", value))
    if selector.before is not None:
        terms.append(("created_at < ?", selector.before))
    if not terms:  # it would fit all, which is what `everything` is for
        return "0", []
    return " AND ".join(term for term, _ in terms), [value for _, value in terms]

"""The invalidations a machine knows, in a file of its cache folder that all its processes share.

A line is a checksum, a space and JSON; lines are only appended, by whoever holds the lock, and flushed to the
disk. A line without its end was being written when a process died: nobody was told of it, it is cut off.
A whole line that does not verify was lost: what it said is unknown, so everything older than now counts as
invalidated. A file that has grown large is written anew with what still matters.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import msgspec
from blake3 import blake3

from stockpot.clock import Clock, SystemClock
from stockpot.kv.invalidation import (
    MAX_RECORDS,
    Invalidation,
    InvalidationLog,
    Kind,
    News,
    next_epoch,
    next_pending_epoch,
    settle,
)
from stockpot.models.publish import exclusive, staged

MAX_PENDING = 1000
_CHECKSUM_CHARACTERS = 16

_log = logging.getLogger(__name__)


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is written at once. `shared_position` is how far the shared log had been read when its records
    were written here; they stand in one line, so that neither is there without the other."""

    records: tuple[Invalidation, ...] = ()
    shared_position: str | None = None
    forgotten_before: int = 0


class LocalLog(InvalidationLog):
    """The log of one machine.

    `alone`: no shared log stands above it, its records are final. Otherwise those it makes are pending until
    `keep` brings the record of the same id that the shared log made of it. A file that cannot be written
    (disk full) loses nothing while the process lives: lines wait in memory and are written with the next.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock | None = None,
        alone: bool = True,
        max_records: int = MAX_RECORDS,
        max_file_bytes: int = 4 * 2**20,
    ) -> None:
        self._path = path
        self._clock = clock or SystemClock()
        self._alone = alone
        self._max_records = max_records
        self._max_file_bytes = max_file_bytes
        self._compact_at_bytes = max_file_bytes
        self._lock = threading.RLock()
        self._arrived: list[Invalidation] = []
        self._removed = 0  # records that stood in `_arrived` before: a position counts them as well
        self._seen: set[tuple[str, int]] = set()
        self._pending: dict[str, Invalidation] = {}
        self._latest = 0
        self._forgotten_before = 0
        self._shared_position = ""
        self._unwritten: list[_Line] = []
        self._file: FileIO | None = None
        self._read_bytes = 0
        self._damaged = False
        self._failing = False

    @property
    def latest(self) -> int:
        """The largest epoch known here."""
        with self._lock:
            return self._latest

    @property
    def shared_position(self) -> str:
        """How far the shared log was read, as last told to `keep`; "" for not at all."""
        with self._lock:
            return self._shared_position

    def append(
        self,
        kind: Kind,
        value: str = "",
        *,
        tokens: int = 0,
        tenant: str | None = None,
        by: str = "",
        reason: str = "",
        id: str = "",
    ) -> Invalidation:
        """See the seam. `id` continues a record whose delivery failed half way."""
        made: list[Invalidation] = []

        def record() -> _Line:
            subject = kind, value, tokens, tenant
            if not self._alone and len(self._pending) >= MAX_PENDING:
                subject = "all", "", 0, None  # too many to keep apart: say more than was asked, never less
            made[:] = [
                Invalidation(
                    self._next_epoch(),
                    subject[0],
                    subject[1],
                    tokens=subject[2],
                    tenant=subject[3],
                    by=by,
                    reason=reason,
                    at_s=self._clock.wall(),
                    id=id or secrets.token_hex(16),
                )
            ]
            return _Line(tuple(made))

        with self._lock:
            self._commit(record)
            return made[0]

    def keep(
        self,
        records: Iterable[Invalidation],
        *,
        shared_position: str | None = None,
        forgotten_before: int = 0,
    ) -> None:
        """Write down records of the shared log, up to where it was read, and what it says was lost."""
        given = tuple(records)

        def line() -> _Line:
            return _Line(
                tuple(record for record in given if (record.id, record.epoch) not in self._seen),
                None if shared_position == self._shared_position else shared_position,
                forgotten_before if forgotten_before > self._forgotten_before else 0,
            )

        with self._lock:
            if line() != _Line():
                self._commit(line)

    def since(self, position: int) -> News:
        with self._lock:
            try:
                self._refresh()
            except OSError as error:
                _log.warning("The invalidation log %s cannot be read: %s", self._path, error)
            if self._damaged or self._unwritten:
                self._commit(_Line)
            return News(
                tuple(self._arrived[max(0, position - self._removed) :]),
                self._removed + len(self._arrived),
                self._forgotten_before,
            )

    def pending(self) -> tuple[Invalidation, ...]:
        with self._lock:
            return tuple(self._pending.values())

    def shared(self) -> list[Invalidation]:
        """The records with a shared epoch that still matter, oldest first."""
        with self._lock:
            self._tidy()
            return sorted(
                (record for record in self._arrived if not record.pending), key=lambda record: record.epoch
            )

    def _next_epoch(self) -> int:
        if self._alone:
            return next_epoch(self._latest, self._clock.wall())
        return next_pending_epoch(self._latest)

    def _commit(self, make: Callable[[], _Line]) -> None:
        """Add a line that is made while the file is locked and what all other processes wrote is known."""
        failure: OSError | None = None
        with ExitStack() as held:
            try:
                held.enter_context(exclusive(self._path))
                self._refresh()
            except OSError as error:
                failure = error
            line = make()
            if line != _Line():
                self._take(line)
                self._unwritten.append(line)
            if failure is None:
                try:
                    self._write()
                except OSError as error:
                    failure = error
        if failure is not None and not self._failing:
            _log.warning("Invalidations are kept in memory until %s can be written: %s", self._path, failure)
        self._failing = failure is not None
        if len(self._unwritten) > self._max_records:
            self._unwritten = [self._state()]

    def _refresh(self) -> None:
        """Read what was written since the last time. What is no whole line yet is left for later."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            if self._arrived or self._forgotten_before:
                # Somebody cleared the folder: what the file said holds all the same.
                self._unwritten = [self._state()]
            self.close()
            return
        if self._file is not None and not os.path.samestat(os.fstat(self._file.fileno()), found):
            self.close()
        if self._file is None:
            # Held open, so that no other file can get its inode number: the check above relies on it.
            self._file = self._path.open("rb", buffering=0)
        self._file.seek(self._read_bytes)
        data = self._file.read()
        whole_bytes = data.rfind(b"\n") + 1
        self._read_bytes += whole_bytes
        for text in data[:whole_bytes].splitlines():
            line = _decode(text)
            if line is None:
                self._damaged = True
            else:
                self._take(line)

    def _write(self) -> None:
        """Append what is not written yet; the lock is held and everything before was read."""
        if self._damaged:
            _log.error(
                "Lines of %s do not verify: what they invalidated is unknown, so everything cached before "
                "now is not served any more. Check the disk.",
                self._path,
            )
            self._take(_Line(shared_position="", forgotten_before=self._next_epoch()))
        elif self._read_bytes <= self._compact_at_bytes:
            data = b"".join(_encode(line) for line in self._unwritten)
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.ftruncate(file, self._read_bytes)
                if os.pwrite(file, data, self._read_bytes) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file)
            finally:
                os.close(file)
            self._unwritten.clear()
            return
        self.close()
        with staged(self._path) as temporary:
            self._compact_at_bytes = max(
                self._max_file_bytes, 2 * temporary.write_bytes(_encode(self._state()))
            )
        self._unwritten.clear()
        self._damaged = False

    def _take(self, line: _Line) -> None:
        for record in line.records:
            if (record.id, record.epoch) in self._seen:
                continue
            self._seen.add((record.id, record.epoch))
            self._arrived.append(record)
            settle(self._pending, record)
            self._latest = max(self._latest, record.epoch)
        if line.shared_position is not None:
            self._shared_position = line.shared_position
        self._forgotten_before = max(self._forgotten_before, line.forgotten_before)
        self._latest = max(self._latest, self._forgotten_before)
        if len(self._arrived) > 2 * self._max_records + MAX_PENDING:
            self._tidy()

    def _tidy(self) -> None:
        """Keep in memory what still matters, in order of arrival: what was not asked for yet stays last."""
        newest: dict[object, Invalidation] = {}
        for record in self._arrived:
            known = newest.get(record.subject)
            if not record.pending and (known is None or known.epoch < record.epoch):
                newest[record.subject] = record
        whole = newest.get(("all", "", None))
        least = max(self._forgotten_before + 1, whole.epoch if whole else 0)
        by_age = sorted(record.epoch for record in newest.values() if record.epoch >= least)
        if len(by_age) > self._max_records:
            self._forgotten_before = by_age[-self._max_records - 1]
            least = self._forgotten_before + 1
        before = len(self._arrived)
        self._arrived = [
            record
            for record in self._arrived
            if record.id in self._pending or (record is newest.get(record.subject) and record.epoch >= least)
        ]
        self._removed += before - len(self._arrived)
        self._seen = {(record.id, record.epoch) for record in self._arrived}

    def _state(self) -> _Line:
        """All that still matters, as one line."""
        self._tidy()
        return _Line(tuple(self._arrived), self._shared_position, self._forgotten_before)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None
            self._read_bytes = 0


def _encode(line: _Line) -> bytes:
    if line == _Line():
        return b""
    text = msgspec.json.encode(line)
    return _checksum(text) + b" " + text + b"\n"


def _decode(text: bytes) -> _Line | None:
    checksum, _, content = text.partition(b" ")
    if checksum != _checksum(content):
        return None
    try:
        return msgspec.json.decode(content, type=_Line)
    except msgspec.MsgspecError:
        return None


def _checksum(content: bytes) -> bytes:
    return blake3(content).hexdigest()[:_CHECKSUM_CHARACTERS].encode()

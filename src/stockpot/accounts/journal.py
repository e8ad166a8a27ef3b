"""Rows that wait on disk while the database is away: one file of JSON lines for each process.

A process holds a lock on its file for as long as it lives, so whoever gets the lock on another's file knows
that its writer is gone, and takes its rows over.
"""

from __future__ import annotations

import fcntl
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from stockpot.accounts.rows import Row, is_whole

_LOG = logging.getLogger(__name__)
_PATTERN = "ledger-*.journal"
_MOST_AT_ONCE = 500


class Journal:
    """Rows in `folder`, appended and read back by one thread. Files are made when they are needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: BinaryIO | None = None
        self._path: Path | None = None

    @property
    def is_empty(self) -> bool:
        """Whether this process has no rows here."""
        return self._own is None

    def append(self, rows: Sequence[Row]) -> None:
        """Keep rows, past the end of this process. Raises OSError where the disk does not take them."""
        file = self._own or self._create()
        end = file.seek(0, os.SEEK_END)
        try:
            file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
            file.flush()
        except OSError:
            file.truncate(end)  # no half a line before the next
            raise

    def waiting(self) -> Iterator[tuple[BinaryIO, Path]]:
        """Files whose rows can be brought to the database now: this process's, and those of ended ones."""
        if self._own is not None and self._path is not None:
            yield self._own, self._path
        for path in sorted(self._folder.glob(_PATTERN)):
            if path == self._path:
                continue
            file = path.open("r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its process lives and sees to it
                file.close()
                continue
            try:
                yield file, path
            finally:
                file.close()

    def rows(self, file: BinaryIO) -> Iterator[list[Row]]:
        """The rows of a file, some at a time. A last line without its end was cut off by a crash."""
        file.seek(0)
        batch: list[Row] = []
        for line in file:
            row = self._row(line)
            if row is not None:
                batch.append(row)
            if len(batch) >= _MOST_AT_ONCE:
                yield batch
                batch = []
        if batch:
            yield batch

    def remove(self, path: Path) -> None:
        """The rows of a file are in the database."""
        path.unlink(missing_ok=True)
        if path == self._path and self._own is not None:
            self._own.close()
            self._own = self._path = None

    def close(self) -> None:
        """Leave what is there to whoever comes next."""
        if self._own is not None:
            self._own.close()
            self._own = self._path = None

    def _create(self) -> BinaryIO:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f"ledger-{uuid.uuid4().hex}.journal"
        # Locked before it has the name others look for: they would take it for a dead process's.
        hidden = path.with_suffix(".new")
        hidden.touch(mode=0o600)
        file = hidden.open("r+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        hidden.rename(path)
        self._own, self._path = file, path
        return file

    def _row(self, line: bytes) -> Row | None:
        try:
            row = msgspec.json.decode(line, type=tuple[Any, ...])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            row = ()
        if is_whole(row):
            return row
        _LOG.warning("ledger: a line of the journal is not whole and is left out (%d bytes)", len(line))
        return None

"""The audit log: who did what, in lines chained by hashes, so that a change of the past can be found.

    hash(n) = BLAKE3(hash(n-1) bytes, canonical JSON of [n, at, actor, action, target, detail])

An edited, removed or moved line breaks the chain. Whoever can write to the database could make a whole new
chain, or cut its end off: against that the head (number of lines, last hash) is kept in a second place as
well, the anchor, a small file beside the server, and `stockpot audit verify` prints it for a third.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
from blake3 import blake3
from sqlalchemy import Connection, insert, select

from stockpot.accounts.database import Database
from stockpot.clock import Clock, SystemClock

_LOG = logging.getLogger(__name__)

ANCHOR_NAME = "audit.anchor"
START = "0" * 64
"""What the first line follows."""

_LOCK = 0x5350_4155
"""Of PostgreSQL's advisory locks, the one whose holder appends."""
_SECRET_NAMES = re.compile(r"secret|password|token$|api_?key|authorization|^key$", re.IGNORECASE)
_SECRET_WORDS = re.compile(r"\bsk-[A-Za-z0-9_-]{8,}")
_MOST_PROBLEMS = 100
_PAGE_LINES = 1_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. `detail` is canonical JSON, an object."""

    seq: int
    at: float
    actor: str
    action: str
    target: str
    detail: str
    previous: str
    hash: str

    def reckoned(self) -> str:
        """The hash this line must have."""
        content = [self.seq, self.at, self.actor, self.action, self.target, self.detail]
        return blake3(bytes.fromhex(self.previous) + msgspec.json.encode(content)).hexdigest()


@dataclass(frozen=True, slots=True)
class Head:
    """How long the chain is, and its last hash. As text `LINES:HASH`."""

    lines: int = 0
    hash: str = START

    def __str__(self) -> str:
        return f"{self.lines}:{self.hash}"

    @staticmethod
    def parsed(text: str) -> Head:
        """Raises ValueError for what is no head."""
        lines, _, digest = text.strip().partition(":")
        if not re.fullmatch(r"[0-9]{1,18}", lines) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError("a head is written LINES:HASH, the hash as 64 hexadecimal digits")
        return Head(int(lines), digest)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found: the head as it is, what is wrong (each names its line), and whether there was an
    anchor to compare with."""

    head: Head
    problems: tuple[str, ...]
    anchored: Head | None


class AuditLog:
    """Appended to by several processes and threads, one line at a time. Calls may block."""

    def __init__(self, database: Database, *, anchor: Path, clock: Clock | None = None) -> None:
        self._database = database
        self._table = database.tables.audit
        self._anchor = anchor
        self._clock = clock or SystemClock()

    def append(self, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None) -> Entry:
        """Add a line. Values that look like secrets are masked. Raises DatabaseUnavailable, so what must not
        happen unseen is done after this."""
        actor, action, target = (_masked(text) for text in (actor, action, target))
        text = msgspec.json.encode(_without_secrets(detail or {}), order="deterministic").decode()
        with self._database.writing() as connection:
            if not self._database.is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            head = self._head(connection)
            at = self._clock.wall()
            entry = Entry(head.lines + 1, at, actor, action, target, text, head.hash, hash="")
            entry = replace(entry, hash=entry.reckoned())
            connection.execute(insert(self._table).values(asdict(entry)))
        self._move_anchor(Head(entry.seq, entry.hash))
        return entry

    def entries(
        self, *, limit: int = 50, actor: str | None = None, action: str | None = None, since: float = 0.0
    ) -> list[Entry]:
        """The last lines that fit, newest first."""
        columns = self._table.c
        wanted = select(self._table).where(columns.at >= since).order_by(columns.seq.desc()).limit(limit)
        if actor is not None:
            wanted = wanted.where(columns.actor == actor)
        if action is not None:
            wanted = wanted.where(columns.action == action)
        with self._database.reading() as connection:
            return [Entry(*row) for row in connection.execute(wanted)]

    def verify(self, kept: Head | None = None) -> Verdict:
        """Read the whole chain and compare it with itself, with the anchor, and with a head `kept`
        elsewhere."""
        problems: list[str] = []
        # Before the lines: one that is appended meanwhile must not look cut off.
        anchored = self._read_anchor(problems)
        marks = [(anchored, f"the anchor {self._anchor}"), (kept, "the head that was kept")]
        wanted = [(mark, whose) for mark, whose in marks if mark is not None and mark.lines > 0]
        with self._database.reading() as connection:
            last = Head()
            for entry in self._chain(connection):
                _compare(entry, last, problems)
                problems += (
                    f"line {entry.seq} is not the one {whose} names: it, or lines before it, were rewritten"
                    for mark, whose in wanted
                    if mark.lines == entry.seq and mark.hash != entry.hash
                )
                last = Head(entry.seq, entry.hash)
        problems += (
            f"{_lines(last.lines + 1, mark.lines)} cut off at the end: {whose} names line {mark.lines}"
            for mark, whose in wanted
            if mark.lines > last.lines
        )
        more = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        return Verdict(last, tuple(shown), anchored)

    def _chain(self, connection: Connection) -> Iterator[Entry]:
        """All lines in the order of their numbers, a page at a time."""
        after: int | None = None
        while True:
            page = select(self._table).order_by(self._table.c.seq).limit(_PAGE_LINES)
            rows = connection.execute(page if after is None else page.where(self._table.c.seq > after)).all()
            yield from (Entry(*row) for row in rows)
            if len(rows) < _PAGE_LINES:
                return
            after = rows[-1].seq

    def _head(self, connection: Connection) -> Head:
        columns = self._table.c
        row = connection.execute(
            select(columns.seq, columns.hash).order_by(columns.seq.desc()).limit(1)
        ).first()
        return Head() if row is None else Head(row.seq, row.hash)

    def _move_anchor(self, head: Head) -> None:
        """Write the new head down, unless what is there says that lines it knew are gone: then it is the only
        witness, and stays."""
        try:
            self._anchor.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.open(self._anchor, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                text = os.pread(file, 200, 0).decode("ascii", "replace")
                before = Head.parsed(text) if text else Head()
                if before.lines >= head.lines and before != head and self._holds(before):
                    return  # another process was quicker, with a later line
                if not self._holds(before):
                    _LOG.error(
                        "audit: the log lacks line %d as the anchor %s knows it; run 'stockpot audit verify'",
                        *(before.lines, self._anchor),
                    )
                    return
                # Always the same length, in one write: never half of one and half of another.
                os.pwrite(file, f"{head.lines:018d}:{head.hash}\n".encode(), 0)
                os.fsync(file)
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            _LOG.error("audit: the anchor %s cannot be moved to line %d: %s", self._anchor, head.lines, error)

    def _holds(self, head: Head) -> bool:
        """Whether the chain has this head as one of its lines."""
        if head.lines == 0:
            return True
        with self._database.reading() as connection:
            found = connection.execute(select(self._table.c.hash).where(self._table.c.seq == head.lines))
            return found.scalar() == head.hash

    def _read_anchor(self, problems: list[str]) -> Head | None:
        try:
            return Head.parsed(self._anchor.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            problems.append(f"the anchor {self._anchor} cannot be read: {error}")
            return None


def _compare(entry: Entry, last: Head, problems: list[str]) -> None:
    """What is wrong with a line, as it stands and behind `last`."""
    if not isinstance(entry.seq, int):  # pyright: ignore[reportUnnecessaryIsInstance] - SQLite stores anything
        problems.append(f"a line has the number {entry.seq!r}: it was edited")
        return
    if entry.seq != last.lines + 1:
        problems.append(f"{_lines(last.lines + 1, entry.seq - 1)} removed")
    elif entry.previous != last.hash:
        problems.append(f"line {entry.seq} does not follow line {last.lines}: one of them was rewritten")
    try:
        sound = entry.reckoned() == entry.hash
    except (TypeError, ValueError):  # `previous` is no hash
        sound = False
    if not sound:
        problems.append(f"line {entry.seq} was edited")


def _lines(first: int, last: int) -> str:
    if last < first:
        return f"a line before line {first} was added or"
    return f"line {first} was" if first == last else f"lines {first} to {last} were"


def _masked(text: str) -> str:
    """Without what looks like a key, and without NUL, which PostgreSQL has no place for."""
    return _SECRET_WORDS.sub("sk-***", text).replace("\0", "")


def _without_secrets(value: Any) -> Any:
    """Plain JSON, secrets masked by the names of their fields and by their looks."""
    if isinstance(value, str):
        return _masked(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        fields = cast(Mapping[object, Any], value)
        return {
            _masked(str(name)): "***" if _SECRET_NAMES.search(str(name)) else _without_secrets(each)
            for name, each in fields.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        items = cast("list[Any]", value)
        return [_without_secrets(each) for each in items]
    return _masked(str(value))

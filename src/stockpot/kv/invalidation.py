"""Invalidation: which blocks must not be served any more, told by epochs, so that being late loses nothing.

Every invalidation has an epoch larger than all before it, and every block carries the epoch of the last one
its computer had seen. A block is stale when an invalidation with a larger epoch matches it. So nothing has to
be found in order to be invalidated: a node drops what it can enumerate when a record reaches it, and checks
every block it reads from anywhere.

An epoch is a Unix time in milliseconds times `EPOCH_STEP`, or one step more than the last where the clock
went back. Between two steps lie the epochs of *pending* records: made by a node that could not reach the log
all nodes share. They lie below every shared epoch to come, so that a block stamped with one is never taken
for younger than an invalidation another node makes later, whatever the clocks say.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from stockpot.errors import StockpotError
from stockpot.kv.block import TOKEN_BYTES, TokenKey, content_hash
from stockpot.kv.tier import BlockHead

Kind = Literal["all", "tenant", "tag", "document", "model", "prefix"]

EPOCH_STEP = 1024
MAX_EPOCH = 2**52
"""No epoch is larger (the year 2109): a double holds it exactly, and a forged clock cannot exhaust them."""
MAX_RECORDS = 10_000
MAX_VALUE_CHARACTERS = 512
DOCUMENT_TAG = "document:"

_Subject = tuple[Kind, str, str | None]


class LogUnavailable(StockpotError):
    """The log that all nodes share cannot be reached, or refuses; try again later."""


@dataclass(frozen=True, slots=True)
class Invalidation:
    """One record: from `epoch` on, what was computed before and matches is not to be served.

    `value` is a tenant ("" for what all share), a tag, a document's name, a model's fingerprint or served
    name, or the content hash of a prefix in hexadecimal, with its length in `tokens`; "" for `all`. `tenant`
    restricts a tag, document or prefix to one tenant. `id` stays the same when a pending record gets its
    shared epoch. `by` and `reason` are for whoever asks later; `at_s` is Unix time. Raises ValueError.
    """

    epoch: int
    kind: Kind
    value: str = ""
    tokens: int = 0
    tenant: str | None = None
    by: str = ""
    reason: str = ""
    at_s: float = 0.0
    id: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.epoch <= MAX_EPOCH:
            raise ValueError(f"an epoch lies between 1 and {MAX_EPOCH}, not at {self.epoch}")
        if (self.kind == "prefix") != (self.tokens > 0):
            raise ValueError(f"a prefix has tokens, nothing else has; {self.kind} was given {self.tokens}")
        if self.tenant is not None and self.kind not in ("tag", "document", "prefix"):
            raise ValueError(f"an invalidation of kind {self.kind} cannot be restricted to a tenant")
        if (not self.value and self.kind != "tenant") != (self.kind == "all"):
            raise ValueError(f"an invalidation of kind {self.kind} cannot have the value {self.value!r}")
        if max(len(text) for text in (self.value, self.tenant or "", self.by, self.reason, self.id)) > (
            MAX_VALUE_CHARACTERS
        ):
            raise ValueError(f"no text of an invalidation may exceed {MAX_VALUE_CHARACTERS} characters")

    @property
    def pending(self) -> bool:
        """Whether other nodes do not know of it yet."""
        return self.epoch % EPOCH_STEP != 0

    @property
    def subject(self) -> _Subject:
        """What it is about: of two records with one subject the later one suffices."""
        return self.kind, self.value, self.tenant

    def matches(
        self, head: BlockHead, prompt: TokenKey | None = None, *, served_names: Collection[str] = ()
    ) -> bool:
        """Whether it speaks of this block, whatever their epochs.

        `prompt` holds the tokens from the sequence's start up to the block's end at least; without it a
        prefix matches only the block that ends exactly there. A block that ends before the prefix does is
        not matched: it may belong to others too.
        """
        match self.kind:
            case "all":
                about = True
            case "tenant":
                about = self.value == head.tenant
            case "tag":
                about = self.value in head.tags
            case "document":
                about = DOCUMENT_TAG + self.value in head.tags
            case "model":
                about = self.value == head.fingerprint or self.value in served_names
            case "prefix":
                about = head.content.hex() == self.value or (
                    prompt is not None and self.tokens <= _end(head) and self.begins(prompt)
                )
        return about and self.tenant in (None, head.tenant)

    def begins(self, prompt: TokenKey) -> bool:
        """Whether a prompt begins with the tokens of this prefix."""
        size = self.tokens * TOKEN_BYTES
        return size <= len(prompt) and content_hash(TokenKey(prompt[:size])).hex() == self.value


def next_epoch(last: int, wall_s: float) -> int:
    """The epoch of the next record that all nodes share."""
    return max((last // EPOCH_STEP + 1) * EPOCH_STEP, int(wall_s * 1000) * EPOCH_STEP)


def next_pending_epoch(last: int) -> int:
    """The epoch of the next record only this node has; where a step is used up, its last one again."""
    return min(last + 1, last | (EPOCH_STEP - 1))


def settle(pending: dict[str, Invalidation], record: Invalidation) -> None:
    """Bring the pending records, by id, up to date with one more record."""
    if not record.pending:
        pending.pop(record.id, None)
        return
    for old in list(pending.values()):
        if record.kind == "all" or old.subject == record.subject:
            del pending[old.id]
    pending[record.id] = record


class Invalidations:
    """All a node knows was invalidated, in memory. Any thread may use it.

    At most `max_records` are kept; where more must be forgotten, `forgotten_before` rises, and a block with
    a smaller epoch is stale because nobody can tell. `served_names` are those of the model whose blocks are
    asked about.
    """

    def __init__(self, *, served_names: Collection[str] = (), max_records: int = MAX_RECORDS) -> None:
        self._served_names = frozenset(served_names)
        self._max_records = max_records
        self._lock = threading.Lock()
        self._records: dict[_Subject, Invalidation] = {}
        self._pending: dict[str, Invalidation] = {}
        self._latest = 0
        self._forgotten: Invalidation | None = None
        # The prefixes that the prompt asked about last begins with: its blocks are asked about one by one.
        self._asked: tuple[TokenKey, tuple[Invalidation, ...]] | None = None

    def __len__(self) -> int:
        return len(self._records) + len(self._pending)

    @property
    def latest(self) -> int:
        """The epoch for a block whose computation begins now."""
        # The last epoch below a step is that of every pending record that finds no other: no block has it.
        return self._latest - (self._latest % EPOCH_STEP == EPOCH_STEP - 1)

    @property
    def forgotten_before(self) -> int:
        """Blocks with a smaller epoch are stale, whatever they are; 0 if nothing was forgotten."""
        return self._forgotten.epoch if self._forgotten else 0

    def add(self, record: Invalidation) -> bool:
        """Take a record in; False when what is known already says as much. The order does not matter."""
        with self._lock:
            if record.pending:
                # Kept whatever else is known: a shared record may have been made before it by the clock of
                # the shared log, and so leave out what others computed in between.
                if self._pending.get(record.id) == record:
                    return False
                settle(self._pending, record)
            else:
                settle(self._pending, record)
                whole = self._records.get(("all", "", None))
                known = self._records.get(record.subject)
                if max(old.epoch if old else 0 for old in (whole, known, self._forgotten)) >= record.epoch:
                    return False
                if record.kind == "all":
                    self._records = {
                        subject: old for subject, old in self._records.items() if old.epoch > record.epoch
                    }
                self._records[record.subject] = record
            self._latest = max(self._latest, record.epoch)
            self._asked = None
            if len(self._records) > self._max_records:
                self._forget_oldest()
            return True

    def forget(self, before: int) -> bool:
        """Records with epochs up to `before` may be unknown here; False if that says nothing new."""
        with self._lock:
            if before <= self.forgotten_before:
                return False
            self._forgotten = Invalidation(
                before, "all", by="stockpot", reason="older than the history of invalidations known here"
            )
            self._latest = max(self._latest, before)
            return True

    def stale(
        self, head: BlockHead, prompt: TokenKey | None = None, *, foreign: bool = True
    ) -> Invalidation | None:
        """The record that forbids to serve a block, or None; see `Invalidation.matches` for `prompt`.

        `foreign` says that the block may come from a node with another local log (read from Redis): such a
        node cannot know of this one's pending records, so these count whatever the block's epoch is.
        """
        if head.epoch >= self._latest and not (foreign and self._pending):
            return None
        with self._lock:
            for record in self._pending.values():
                if (foreign or record.epoch > head.epoch) and record.matches(
                    head, prompt, served_names=self._served_names
                ):
                    return record
            if self._forgotten and self._forgotten.epoch > head.epoch:
                return self._forgotten
            for record in self._about(head, prompt):
                if record.epoch > head.epoch:
                    return record
        return None

    def _about(self, head: BlockHead, prompt: TokenKey | None) -> Iterator[Invalidation]:
        """The shared records that match a block, found by what it is, not by going through them all."""
        subjects: list[_Subject] = [
            ("all", "", None),
            ("tenant", head.tenant, None),
            ("model", head.fingerprint, None),
        ]
        subjects.extend(("model", name, None) for name in self._served_names)
        for tenant in (None, head.tenant):
            subjects.append(("prefix", head.content.hex(), tenant))
            subjects.extend(("tag", tag, tenant) for tag in head.tags)
            subjects.extend(
                ("document", tag.removeprefix(DOCUMENT_TAG), tenant)
                for tag in head.tags
                if tag.startswith(DOCUMENT_TAG)
            )
        for subject in subjects:
            if record := self._records.get(subject):
                yield record
        if prompt is not None:
            end = _end(head)
            for record in self._prefixes_of(prompt):
                if record.tokens <= end and record.tenant in (None, head.tenant):
                    yield record

    def _prefixes_of(self, prompt: TokenKey) -> tuple[Invalidation, ...]:
        if self._asked is None or self._asked[0] != prompt:
            found: list[Invalidation] = []
            hashes: dict[int, str] = {}
            for record in self._records.values():
                size = record.tokens * TOKEN_BYTES
                if record.kind != "prefix" or size > len(prompt):
                    continue
                if size not in hashes:
                    hashes[size] = content_hash(TokenKey(prompt[:size])).hex()
                if hashes[size] == record.value:
                    found.append(record)
            self._asked = prompt, tuple(found)
        return self._asked[1]

    def _forget_oldest(self) -> None:
        """Forget a tenth at once, so that a full history does not sort itself at every record."""
        oldest = sorted(self._records.values(), key=lambda record: record.epoch)
        gone = oldest[: len(oldest) - self._max_records + self._max_records // 10]
        for record in gone:
            del self._records[record.subject]
        before = gone[-1].epoch
        if before > self.forgotten_before:
            self._forgotten = Invalidation(
                before, "all", by="stockpot", reason="older than the history of invalidations kept here"
            )


def _end(head: BlockHead) -> int:
    return head.start + len(head.tokens) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class News:
    """What a log has behind a position. `forgotten_before` is 0 for a log that never lost anything, else
    what `Invalidations.forget` is to be told."""

    records: tuple[Invalidation, ...]
    position: int
    forgotten_before: int = 0

    @property
    def complete(self) -> bool:
        return self.forgotten_before == 0


class InvalidationLog(ABC):
    """Where records are kept so that restarts and other processes find them. Any thread may use it."""

    @abstractmethod
    def append(
        self,
        kind: Kind,
        value: str = "",
        *,
        tokens: int = 0,
        tenant: str | None = None,
        by: str = "",
        reason: str = "",
    ) -> Invalidation:
        """Make and keep a record. It is `pending` when other nodes cannot be told yet; `sync` tells them.

        Raises ValueError for fields that do not fit together; see `Invalidation`.
        """

    @abstractmethod
    def since(self, position: int) -> News:
        """The records behind a position of this object, in order of arrival; 0 is before the first."""

    @abstractmethod
    def pending(self) -> tuple[Invalidation, ...]:
        """The records that other nodes do not know of yet."""

    def sync(self) -> None:  # noqa: B027  a log that is not shared among nodes has nobody to ask
        """Exchange records with the log all nodes share. Raises LogUnavailable."""

    def wait(self, wake: threading.Event, timeout_s: float) -> None:
        """Return when `wake` is set, there may be something new, or time is up."""
        wake.wait(timeout_s)

    def close(self) -> None:  # noqa: B027
        """Give back what the log holds open. Idempotent."""

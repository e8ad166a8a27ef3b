"""The seam below the stores: what keeps entries outside this process, and tells what others invalidated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from stockpot.errors import StockpotError
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.evidence.evidence import Observation


class StoreLost(StockpotError):
    """What keeps the entries did not do what it was asked."""


class Behind(Exception):
    """Something was invalidated since the position that was given: nothing was written. Look at the changes,
    and come again."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the log of invalidations. `incarnation` changes when all was lost and it began anew."""

    incarnation: str = ""
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """What others invalidated up to `position`, oldest first; None: more than is known."""

    position: Position
    selectors: Sequence[Selector] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What is written at once. `uses` are wall times, by the first 16 bytes of the key."""

    entries: Sequence[Entry] = ()
    uses: Mapping[bytes, float] = field(default_factory=dict[bytes, float])
    observations: Sequence[Observation] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """The figures after a batch; `lost` of its entries had no bytes."""

    position: Position
    entries: int
    size_bytes: int
    evicted: int = 0
    expired: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Entries without their answers, latest first. `next` is where the next page begins; None: this was the
    last."""

    entries: Sequence[Entry]
    unreadable: int
    next: int | None


class Backing(ABC):
    """On the event loop; nothing blocks it, and each call ends within a time of its own. All raise StoreLost.

    Invalidations have an order. A write that names an older position than the last one is refused (`Behind`):
    so what was made before an invalidation, by any process, never comes back after it.
    """

    name: str
    """For messages: which store it is."""

    @abstractmethod
    async def open(self) -> None:
        """Raises StockpotError where the operator must act, StoreLost where it may come by itself."""

    @abstractmethod
    async def close(self) -> None:
        """Idempotent."""

    @abstractmethod
    async def write(self, batch: Batch, position: Position, now: float) -> Written:
        """All of it or nothing; make room. Also without a batch: what has expired leaves. Raises Behind."""

    @abstractmethod
    async def read(self, id: bytes) -> tuple[Entry | None, bool]:
        """The entry, and whether there is one that cannot be read."""

    @abstractmethod
    async def changes(self, since: Position) -> Changes:
        """Invalidations by others (not those of this backing's own `remove` and `write`)."""

    @abstractmethod
    async def remove(self, selector: Selector) -> Sequence[Entry]:
        """Durable when this returns. Raises NotPackable."""

    @abstractmethod
    async def page(self, start: int | None, *, partitioned: bool, count: int) -> Page: ...

    @abstractmethod
    async def existing(self, ids: Collection[bytes]) -> set[bytes]: ...

    @abstractmethod
    async def observations(self) -> tuple[Sequence[Observation], int]:
        """Oldest first, and how many cannot be read."""


def forgets(selector: Selector, observation: Observation) -> bool:
    """Whether evidence goes with what is invalidated: what a writer caused, where the writer is named. The
    rest stays: it says nothing of the answers, and much of how questions compare."""
    return (
        selector.writer is not None
        and selector.writer == observation.writer
        and selector.id is None
        and selector.tag is None
        and selector.model is None
        and (selector.before is None or observation.at < selector.before)
    )

"""The seam to where answers and evidence are kept: the store of truth, which indexes are rebuilt from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass

from stockpot.recall.entry import Entry, Selector
from stockpot.recall.evidence.evidence import Observation


@dataclass(frozen=True, slots=True)
class StoreStats:
    """`lost`: entries that could not be written (a full disk, a server out of reach). `evicted` went for want
    of room, `expired` because their time was over. `unreadable`: entries and evidence of another version of
    Stockpot, left aside. `failures`: calls of the store that failed."""

    entries: int
    size_bytes: int
    evicted: int = 0
    expired: int = 0
    lost: int = 0
    unreadable: int = 0
    failures: int = 0
    reachable: bool = True


class AnswerStore(ABC):
    """Keeps entries by key, within bytes; the least recently used leave. On the event loop; nothing blocks
    it.

    A store that fails is a miss and is counted, never an error of a request: no method but `start` and
    `remove` raises for what the store behind it does. An entry past `expires_at` is never given.
    """

    @abstractmethod
    async def start(self) -> None:
        """Open it. Raises StockpotError where the operator must act (a folder that cannot be written)."""

    @abstractmethod
    async def close(self) -> None:
        """Write what waits to be written, let go. Idempotent."""

    @abstractmethod
    def put(self, entry: Entry) -> None:
        """Keep it. At once visible to `get` of this process; written soon (of what is older than a
        second nothing is lost, even on kill -9)."""

    @abstractmethod
    async def get(self, key: bytes) -> Entry | None:
        """The entry, and a use of it."""

    @abstractmethod
    async def by_id(self, id: str) -> Entry | None:
        """The entry of that `Entry.id`; no use of it."""

    @abstractmethod
    async def remove(self, selector: Selector) -> Sequence[Entry]:
        """Invalidate; what was removed (its `answer` may be empty). Durable when this returns; what other
        processes hold of it in memory they give for half a second more, at most. `Selector(writer=...)` takes
        the evidence along that the writer caused.

        Raises StockpotError where it could not be done: the operator must know."""

    @abstractmethod
    def entries(self, *, partitioned: bool = False, limit: int | None = None) -> AsyncIterator[Entry]:
        """All that can be given, latest first, `answer` left empty; `partitioned`: those with a partition.

        In pieces: the event loop goes on, and what is put meanwhile may be missing."""

    @abstractmethod
    async def existing(self, keys: Collection[bytes]) -> set[bytes]:
        """Which of these are there. All of them, where the store is out of reach: nobody should forget what
        it may well have."""

    @abstractmethod
    def learn(self, observation: Observation) -> None:
        """Keep one piece of evidence, soon. At most `Observation`s of the last 100,000 are kept."""

    @abstractmethod
    async def observations(self) -> Sequence[Observation]:
        """The evidence, oldest first: what the calibration is rebuilt from."""

    @abstractmethod
    async def flush(self) -> None:
        """Write what waits now, so that `stats` are those of this moment."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Figures as last known, without what waits to be written; cheap."""

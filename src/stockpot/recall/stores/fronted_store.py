"""What the stores share: memory in front, writes behind, and invalidations of other processes heeded.

    put --> memory, waiting --(at most 0.1 s later, many at once)--> backing
    get --> memory, waiting: given while the last look at the log of invalidations is at most 0.5 s old
              `-- else look at the log, then in memory again, then read the backing

So a hit from memory costs microseconds and what another process invalidated is given for half a second at
most; where the backing is out of reach, nothing is: what was invalidated meanwhile cannot be known.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence

from stockpot.clock import Clock
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.evidence.evidence import Observation
from stockpot.recall.stores.backing import Backing, Batch, Behind, Position, StoreLost, Written, forgets
from stockpot.recall.stores.backing_guard import BackingGuard
from stockpot.recall.stores.memory import MemoryFront, id_bytes
from stockpot.recall.stores.packing import NotPackable
from stockpot.recall.stores.store import AnswerStore, StoreStats

_LOG = logging.getLogger(__name__)

_CHECK_S = 0.5
"""For so long a look at the log of invalidations holds."""
_GATHER_S = 0.1
"""For so long puts are gathered: what a crash may lose, and what shares one transaction."""
_IDLE_S = 10.0
"""After so long without puts, uses are written, and what has expired leaves."""
_BATCH_ENTRIES = 128
_BATCH_BYTES = 4 * 2**20
_BATCH_OBSERVATIONS = 1024
_WAITING_ENTRIES = 10_000
_WAITING_BYTES = 64 * 2**20
_WAITING_USES = 10_000
_WAITING_OBSERVATIONS = 10_000
_PAGE = 500
_TRIES = 5
"""Times a write is made anew, a read repeated, because something was invalidated just then."""


class FrontedStore(AnswerStore):
    """An `AnswerStore` before a backing, which is its own from then on."""

    def __init__(
        self,
        backing: Backing,
        clock: Clock,
        *,
        capacity_bytes: int,
        memory_bytes: int,
    ) -> None:
        self._backing = backing
        self._clock = clock
        self._capacity_bytes = capacity_bytes
        self._memory = MemoryFront(min(memory_bytes, capacity_bytes))
        self._reads = BackingGuard(f"reading the {backing.name}", clock)
        self._writes = BackingGuard(f"writing the {backing.name}", clock)
        self._waiting: dict[bytes, Entry] = {}
        self._waiting_bytes = 0
        self._writing: dict[bytes, Entry] = {}
        self._uses: dict[bytes, float] = {}
        self._observations: deque[Observation] = deque()
        self._writing_observations: list[Observation] = []
        self._position = Position()
        self._checked_s: float | None = None
        self._checking: asyncio.Task[None] | None = None
        self._epoch = 0  # changes with each invalidation: what was read before it may not be kept after it
        self._turn = asyncio.Lock()  # writes and removals, one at a time
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None
        self._stats = StoreStats(0, 0)
        self._evicted = self._expired = self._lost = self._unreadable = 0

    async def start(self) -> None:
        try:
            await self._reads.call(self._backing.open)
            await self._check()
            await self.flush()
        except StoreLost as error:
            _LOG.warning(
                "recall starts without its %s; it is used as soon as it can (%s)", self._backing.name, error
            )
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        self._is_closing = True
        self._wake.set()
        self._hurry.set()
        await task
        await self.flush()
        if self._checking is not None:
            await asyncio.gather(self._checking, return_exceptions=True)
        await self._backing.close()

    def put(self, entry: Entry) -> None:
        id, size = entry.key[:16], entry.size_bytes
        full = len(self._waiting) >= _WAITING_ENTRIES or self._waiting_bytes + size > _WAITING_BYTES
        if size > self._capacity_bytes or full:
            self._lost += 1
            self._hurry.set()
            return
        self._unwait(id)
        self._waiting[id] = entry
        self._waiting_bytes += size
        self._memory.put(entry)
        self._use(id)
        self._wake.set()
        if len(self._waiting) >= _BATCH_ENTRIES or self._waiting_bytes >= _BATCH_BYTES:
            self._hurry.set()

    async def get(self, key: bytes) -> Entry | None:
        entry = await self._find(key[:16], use=True)
        if entry is None or entry.key != key:
            return None
        self._use(key[:16])
        return entry

    async def by_id(self, id: str) -> Entry | None:
        found = id_bytes(id)
        return None if found is None else await self._find(found, use=False)

    async def remove(self, selector: Selector) -> Sequence[Entry]:
        if selector == Selector():
            raise ValueError("a selector that selects nothing: give one of its fields, or `everything`")
        here = {
            entry.key: entry for entry in (*self._memory, *self._waiting.values()) if selector.fits(entry)
        }
        self._forget(selector)
        async with self._turn:  # after what is being written: that goes, too
            try:  # whatever has failed before: somebody waits for it
                removed = await self._backing.remove(selector)
            except NotPackable:
                removed = ()  # nor could anything be kept that fits
            except StoreLost as error:
                raise StoreLost(f"Not all may have been invalidated. {error} Invalidate again.") from error
            finally:
                self._forget(selector)  # a read may have brought it back meanwhile
        await self.flush()  # for the figures
        here |= {entry.key: entry for entry in removed}
        return tuple(here.values())

    async def entries(self, *, partitioned: bool = False, limit: int | None = None) -> AsyncIterator[Entry]:
        await self.flush()
        start: int | None = None
        left = limit
        while left is None or left > 0:
            count = _PAGE if left is None else min(_PAGE, left)
            try:
                page = await self._reads.call(
                    lambda: self._backing.page(start, partitioned=partitioned, count=count)  # noqa: B023 - at once
                )
            except StoreLost:
                return
            self._unreadable += page.unreadable
            now = self._clock.wall()
            for entry in page.entries:
                if entry.expires_at > now:
                    left = None if left is None else left - 1
                    yield entry
            if page.next is None:
                return
            start = page.next

    async def existing(self, keys: Collection[bytes]) -> set[bytes]:
        waiting = {*self._waiting, *self._writing}
        try:
            found = await self._reads.call(lambda: self._backing.existing({key[:16] for key in keys}))
        except StoreLost:
            return set(keys)
        return {key for key in keys if key[:16] in found or key[:16] in waiting}

    def learn(self, observation: Observation) -> None:
        if len(self._observations) >= _WAITING_OBSERVATIONS:
            return
        self._observations.append(observation)
        self._wake.set()
        if len(self._observations) >= _BATCH_OBSERVATIONS:
            self._hurry.set()

    async def observations(self) -> Sequence[Observation]:
        await self.flush()
        try:
            found, unreadable = await self._reads.call(self._backing.observations)
        except StoreLost:
            return ()
        self._unreadable += unreadable
        return found

    async def flush(self) -> None:
        """Write what waits; what cannot be written is lost, and counted."""
        async with self._turn:
            is_first = True
            while is_first or self._waiting or self._observations:
                is_first = False
                await self._write_some()

    def stats(self) -> StoreStats:
        return StoreStats(
            entries=self._stats.entries,
            size_bytes=self._stats.size_bytes,
            evicted=self._evicted,
            expired=self._expired,
            lost=self._lost,
            unreadable=self._unreadable,
            failures=self._reads.failures + self._writes.failures,
            reachable=self._reads.reachable and self._writes.reachable,
        )

    # Reading

    async def _find(self, id: bytes, *, use: bool) -> Entry | None:
        try:
            if not self._is_checked():
                await self._check()
            entry = self._here(id, use=use)
            if entry is None:
                entry = await self._read(id)
        except StoreLost:
            return None
        return entry if entry is not None and entry.expires_at > self._clock.wall() else None

    def _here(self, id: bytes, *, use: bool) -> Entry | None:
        entry = self._memory.get(id, use=use)
        if entry is None:
            entry = self._waiting.get(id) or self._writing.get(id)
        return entry

    async def _read(self, id: bytes) -> Entry | None:
        for _ in range(_TRIES):
            epoch = self._epoch
            entry, is_unreadable = await self._reads.call(lambda: self._backing.read(id))
            self._unreadable += is_unreadable
            if epoch != self._epoch:
                continue
            newer = self._here(id, use=True)  # put while this was read
            if newer is None and entry is not None:
                self._memory.put(entry)
            return newer or entry
        return None

    # Invalidations

    def _is_checked(self) -> bool:
        return self._checked_s is not None and self._clock.monotonic() - self._checked_s <= _CHECK_S

    async def _check(self) -> None:
        """Look at what others have invalidated; one look serves all who wait for it."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._look())
            self._checking.add_done_callback(_seen)
        await asyncio.shield(self._checking)

    async def _look(self) -> None:
        began_s = self._clock.monotonic()
        changes = await self._reads.call(lambda: self._backing.changes(self._position))
        is_same = changes.position.incarnation == self._position.incarnation
        self._position = changes.position
        self._checked_s = began_s
        for selector in changes.selectors or ():
            self._forget(selector)
        if changes.selectors is None:
            # The store began anew, or the log does not reach back. What waits goes into the new one; but of
            # a log with a gap it may be what was invalidated.
            self._epoch += 1
            self._memory.clear()
            if is_same:
                self._lost += len(self._waiting) + len(self._writing)
                self._waiting.clear()
                self._writing.clear()
                self._waiting_bytes = 0

    def _forget(self, selector: Selector) -> None:
        self._epoch += 1
        self._memory.drop_fitting(selector)
        for id in [id for id, entry in self._waiting.items() if selector.fits(entry)]:
            self._unwait(id)
        for id in [id for id, entry in self._writing.items() if selector.fits(entry)]:
            del self._writing[id]
        if selector.writer is not None:
            self._observations = deque(each for each in self._observations if not forgets(selector, each))
            self._writing_observations = [
                each for each in self._writing_observations if not forgets(selector, each)
            ]

    # Writing

    def _use(self, id: bytes) -> None:
        if len(self._uses) < _WAITING_USES or id in self._uses:
            self._uses[id] = self._clock.wall()

    def _unwait(self, id: bytes) -> None:
        entry = self._waiting.pop(id, None)
        if entry is not None:
            self._waiting_bytes -= entry.size_bytes

    async def _run(self) -> None:
        while not self._is_closing:
            try:
                async with asyncio.timeout(_IDLE_S):
                    await self._wake.wait()
                async with asyncio.timeout(_GATHER_S):
                    await self._hurry.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            self._hurry.clear()
            try:
                await self.flush()
            except Exception:  # noqa: BLE001  a fault of this program: what comes later is still written
                _LOG.exception("recall: answers could not be written")

    async def _write_some(self) -> None:
        size = 0
        while self._waiting and len(self._writing) < _BATCH_ENTRIES and size < _BATCH_BYTES:
            id = next(iter(self._waiting))
            self._writing[id] = self._waiting[id]
            size += self._waiting[id].size_bytes
            self._unwait(id)
        count = min(len(self._observations), _BATCH_OBSERVATIONS)
        self._writing_observations = [self._observations.popleft() for _ in range(count)]
        uses, self._uses = self._uses, {}
        try:
            written = await self._written(uses)
        except StoreLost:
            self._lost += len(self._writing)
        else:
            self._stats = StoreStats(written.entries, written.size_bytes)
            self._evicted += written.evicted
            self._expired += written.expired
            self._lost += written.lost
        finally:
            self._writing = {}
            self._writing_observations = []

    async def _written(self, uses: dict[bytes, float]) -> Written:
        for _ in range(_TRIES):
            batch = Batch(tuple(self._writing.values()), uses, tuple(self._writing_observations))
            position, now = self._position, self._clock.wall()
            try:
                written = await self._writes.call(lambda: self._backing.write(batch, position, now))  # noqa: B023
            except Behind:
                await self._check()  # takes out of `_writing` what must not be written
                continue
            if self._position == position:
                self._position = written.position
            return written
        raise StoreLost(f"{_TRIES} times in a row something was invalidated while it was written")


def _seen(task: asyncio.Task[None]) -> None:
    """Whoever waited has left: its failure was counted where it happened."""
    if not task.cancelled():
        task.exception()

"""The disk tier: blocks as files that outlive the process, shared by processes, bounded in bytes.

Each process has its own index of the folder, made at start from the heads of the files. What other processes
publish is found on the first miss of a whole block, and by a look at the folder, at most once a second, when
it has changed. Use is written to the modification times of the files, so that processes, and restarts, agree
on what was not used for longest.
"""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Literal

from stockpot.clock import Clock
from stockpot.kv.block import TOKEN_BYTES, BlockId, ContentHash
from stockpot.kv.disk_catalog import Catalog
from stockpot.kv.disk_folder import BlockFile, BlockFolder
from stockpot.kv.disk_index import LONGEST_PROMISE_S, Entry, slim
from stockpot.kv.envelope import Sealer
from stockpot.kv.tier import (
    Block,
    BlockHead,
    Departure,
    Location,
    Refusal,
    Refused,
    Tier,
    TierStats,
    Unkept,
    Wanted,
)

Verdict = Literal["ok"] | Refusal

LOW_WATER = 15 / 16
"""Eviction goes on to this part of the capacity, so that not every write evicts."""
LOOK_EVERY_S = 1.0
FULL_FOR_S = 10.0
"""How long nothing is evicted for a disk that stayed full after it: others fill it."""
SPARE_BYTES = 1 << 16
"""Evicted beyond the size of a block on a full disk: a file takes more room than its bytes."""
READ_AHEAD = 2
"""Files the kernel reads while one is verified. Measured: none is twice as slow, more gain nothing."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class DiskTier(Tier):
    """Blocks as files of one folder. Any thread may call any method; none waits long for another process."""

    name = "disk"

    def __init__(
        self,
        folder: Path,
        *,
        capacity_bytes: int,
        sealer: Sealer,
        clock: Clock,
        on_departure: Departure | None = None,
        max_blocks: int = 32_768,
    ) -> None:
        """Reads the heads of all files in `folder`, which is made where missing. `capacity_bytes` and
        `max_blocks` bound what all processes keep there, whatever its model; about 3 KB of memory a block.

        Raises ConfigurationError where there can be no folder.
        """
        self.capacity_bytes = capacity_bytes
        self.max_blocks = max_blocks
        self._sealer = sealer
        self._clock = clock
        self._on_departure = on_departure
        self._folder = BlockFolder(folder)
        self._catalog = Catalog(self._folder, sealer, clock)
        self._index = self._catalog.index
        self._next_look_s = self._full_until_s = float("-inf")
        self._count_lock = Lock()
        self._misses: Counter[str] = Counter()
        self._unkept: Counter[str] = Counter()
        self._evicted: Counter[str] = Counter()
        self._hits = self._read_bytes = self._written_bytes = 0
        self._folder.remove_orphans()
        self.refresh()
        if self._over(0, 0):
            try:
                with self._folder.exclusive():
                    evicted = self._make_room(0, 0)
                self._left(evicted, "capacity")
            except OSError as error:
                self._catalog.complain("be brought within its capacity", error)

    def locate(self, wanted: Sequence[Wanted]) -> list[Location]:
        now_s = self._clock.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_EVERY_S
            self.refresh()
        run: list[Location] = []
        for place in wanted:
            entry = self._catalog.whole(place.id)
            if entry is None:
                partly = self._catalog.beginning(place)
                return run if partly is None else [*run, partly]
            run.append(Location(place.id, place.start, entry.tokens, entry.size_bytes))
        return run

    def refresh(self) -> None:
        """Take up what other processes have changed; one cheap check where they have not."""
        self._left(self._catalog.refresh(), "elsewhere")

    def read(self, ids: Sequence[BlockId]) -> Generator[Block | Refused]:
        """As promised by `Tier`; ends after the first refusal. The kernel reads on while one is verified."""
        now_s = self._clock.wall()
        coming = iter(ids)
        opened: deque[BlockFile | Refused] = deque()
        try:
            while True:
                opened.extend(map(self._opened, islice(coming, READ_AHEAD + 1 - len(opened))))
                if not opened:
                    return
                block = self._taken(opened.popleft(), now_s)
                yield block
                if isinstance(block, Refused):
                    return
        finally:
            for file in opened:
                if isinstance(file, BlockFile):
                    file.close()

    def write(self, blocks: Sequence[Block]) -> list[Unkept | None]:
        # One time for all: of blocks of one use the deepest go first.
        now_s = self._clock.wall()
        results: list[Unkept | None] = [self._keep(block, now_s) for block in blocks]
        with self._count_lock:
            self._unkept.update(result for result in results if result is not None)
        return results

    def drop(self, ids: Sequence[BlockId]) -> int:
        known = (self._index.get(block_id) or self._catalog.whole(block_id) for block_id in ids)
        removed = self._catalog.remove([entry for entry in known if entry is not None])
        self._count(removed, "dropped")
        return len(removed)

    def drop_where(self, unwanted: Callable[[BlockHead], bool], cause: str) -> int:
        """As promised by `Tier`, with blocks of other models; without those sealed in another way."""
        self.refresh()
        entries = [entry for entry in self._index if entry.head is not None and unwanted(entry.head)]
        removed = self._catalog.remove(entries)
        self._left(removed, cause)
        return len(removed)

    def clear(self) -> int:
        """Remove every block, whoever wrote it, and what is in quarantine; how many blocks."""
        self.refresh()
        removed = self._catalog.remove(self._index)
        self._left(removed, "cleared")
        try:
            self._folder.empty_quarantine()
        except OSError as error:
            self._catalog.complain("be cleared of its quarantine", error)
        return len(removed)

    def heads(self) -> list[Entry]:
        """What is kept, of all models, as far as it can be read with our secret."""
        self.refresh()
        return [entry for entry in self._index if entry.head is not None]

    def other_owner(self, content: ContentHash) -> tuple[str, str] | None:
        """Fingerprint and tenant of a block that ends with the tokens this hash stands for, if any does."""
        entry = self._index.holding(content)
        return None if entry is None or entry.head is None else (entry.head.fingerprint, entry.head.tenant)

    def verify(self, *, quarantine: bool = False) -> Iterator[tuple[BlockId, Verdict]]:
        """Read every file, of any model, and tell whether it is what it should be. With `quarantine`, put
        aside what is not: never with another secret than the writer's, to which every file looks forged."""
        self.refresh()
        for entry in self._index:
            opened = self._opened(entry.id)
            if isinstance(opened, Refused):
                yield entry.id, opened.cause
                continue
            with opened as file:
                found = self._read(file, any_model=True)
                if isinstance(found, Refused) and quarantine:
                    self._put_aside(file, found)
            yield entry.id, found.cause if isinstance(found, Refused) else "ok"

    def stats(self) -> TierStats:
        with self._count_lock:
            return TierStats(
                name=self.name,
                capacity_bytes=self.capacity_bytes,
                used_bytes=self._index.used_bytes,
                blocks=len(self._index),
                hits=self._hits,
                misses=dict(self._misses),
                unkept=dict(self._unkept),
                evicted=dict(self._evicted),
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
            )

    def check_integrity(self) -> None:
        """Raise AssertionError if the index disagrees with itself."""
        self._index.check_integrity()

    # Reading.

    def _opened(self, block_id: BlockId) -> BlockFile | Refused:
        try:
            file = self._folder.open(block_id)
        except FileNotFoundError:
            if self._index.remove(block_id) is not None:
                self._left([block_id], "elsewhere")
            return Refused(block_id, "absent")
        except OSError as error:
            self._catalog.complain("be read", error)
            return Refused(block_id, "error", str(error))
        file.will_read()
        return file

    def _taken(self, opened: BlockFile | Refused, now_s: float) -> Block | Refused:
        if isinstance(opened, Refused):
            found: Block | Refused = opened
        else:
            with opened as file:
                found = self._read(file)
                if isinstance(found, Refused):
                    self._put_aside(file, found)
        with self._count_lock:
            if isinstance(found, Refused):
                self._misses[found.cause] += 1
            else:
                self._hits += 1
                self._read_bytes += len(found.data)
        if isinstance(found, Block) and (entry := self._catalog.whole(found.head.id)) is not None:
            self._catalog.use(entry, now_s, now_s)
        return found

    def _read(self, file: BlockFile, *, any_model: bool = False) -> Block | Refused:
        try:
            return file.read(self._sealer, any_model=any_model)
        except OSError as error:
            self._catalog.complain("be read", error)
            return Refused(file.id, "error", str(error))

    def _put_aside(self, file: BlockFile, refused: Refused) -> None:
        """Take a file that does not verify, or that the disk does not read, out of the way of a new one."""
        self._index.remove(file.id)
        self._left([file.id], "quarantined")
        try:
            self._folder.quarantine(file, refused.cause)
        except OSError as error:
            self._catalog.complain("put a damaged block into quarantine", error)

    # Writing.

    def _keep(self, block: Block, now_s: float) -> Unkept | None:
        head = block.head
        stamp_s = max(now_s, min(head.kept_until_s, now_s + LONGEST_PROMISE_S))
        there = self._catalog.whole(head.id) or self._longer(head)
        if there is not None and self._catalog.use(there, stamp_s, now_s, at_once=True):
            return None
        buffers = self._sealer.seal(block)
        try:
            return self._published(head, buffers, stamp_s, now_s)
        except TimeoutError as error:
            self._catalog.complain("be written to", error)
            return "timeout"
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._full_until_s = self._clock.monotonic() + FULL_FOR_S
                return "full"
            self._catalog.complain("be written to", error)
            return "error"

    def _longer(self, head: BlockHead) -> Entry | None:
        """A block that serves all of this one, and goes with every tag this one would go with."""
        entry = self._index.beginning_with(head.id)
        if entry is None or entry.head is None or not self._catalog.ours(entry):
            return None
        return entry if head.tags <= entry.head.tags else None

    def _published(
        self, head: BlockHead, buffers: Sequence[bytes], stamp_s: float, now_s: float
    ) -> Unkept | None:
        size_bytes = sum(map(len, buffers))
        if size_bytes > self.capacity_bytes or self.max_blocks < 1:
            return "full"
        shorter = [entry for _, alias in head.aliases if (entry := self._index.get(alias)) is not None]
        # A promise given for a beginning holds for the block that takes its place.
        stamp_s = max([stamp_s, *(entry.due_s(now_s) for entry in shorter)])
        entry = Entry(head.id, size_bytes, stamp_s, stamp_s, len(head.tokens) // TOKEN_BYTES, slim(head))
        try:
            kept = self._publish(entry, buffers)
        except OSError as error:
            if error.errno not in _NO_ROOM or not self._make_way(size_bytes + SPARE_BYTES, now_s):
                raise
            kept = self._publish(entry, buffers)
        if not kept:
            return "full"
        with self._count_lock:
            self._written_bytes += size_bytes
        self._left(self._catalog.remove(shorter), "replaced")
        return None

    def _publish(self, entry: Entry, buffers: Sequence[bytes]) -> bool:
        """Write a file; False if there is no room, evict what may be."""
        gone: list[BlockId] = []
        evicted: list[BlockId] = []
        try:
            with (
                self._folder.staged(entry.id, buffers, entry.stamp_s) as publish,
                self._folder.exclusive() as changed,
            ):
                if changed:
                    gone = self._catalog.look()
                evicted = self._make_room(entry.size_bytes, 1)
                if self._over(entry.size_bytes, 1):
                    return False
                was_current = self._catalog.is_current()
                publish()
                self._catalog.added(entry, was_current=was_current)
                return True
        finally:
            self._left(gone, "elsewhere")
            self._left(evicted, "capacity")

    def _make_room(self, more_bytes: int, more_blocks: int) -> list[BlockId]:
        """Evict down to the low water where so much more would not fit; which. Hold `exclusive` around it."""
        if not self._over(more_bytes, more_blocks):
            return []
        self._catalog.look(at_all=True)
        bytes_after, blocks_after = self._index.used_bytes + more_bytes, len(self._index) + more_blocks
        free_bytes = free_blocks = 0
        if bytes_after > self.capacity_bytes:
            free_bytes = bytes_after - int(self.capacity_bytes * LOW_WATER)
        if blocks_after > self.max_blocks:
            free_blocks = blocks_after - int(self.max_blocks * LOW_WATER)
        now_s = self._clock.wall()
        return self._catalog.remove(
            self._index.victims(now_s, free_bytes=free_bytes, free_blocks=free_blocks)
        )

    def _make_way(self, free_bytes: int, now_s: float) -> bool:
        """Evict for a disk that is full before we are; False if that is of no use."""
        if self._clock.monotonic() < self._full_until_s:
            return False
        victims = self._index.victims(now_s, free_bytes=free_bytes, free_blocks=0)
        evicted = self._catalog.remove(victims)
        self._left(evicted, "disk full")
        return bool(evicted)

    def _over(self, more_bytes: int, more_blocks: int) -> bool:
        return (
            self._index.used_bytes + more_bytes > self.capacity_bytes
            or len(self._index) + more_blocks > self.max_blocks
        )

    def _count(self, ids: Sequence[BlockId], cause: str) -> None:
        if ids:
            with self._count_lock:
                self._evicted[cause] += len(ids)

    def _left(self, ids: Sequence[BlockId], cause: str) -> None:
        """Count blocks that left, and tell whoever wants to know. No lock is held: it may call the tier."""
        self._count(ids, cause)
        if ids and self._on_departure is not None:
            self._on_departure(ids, cause)

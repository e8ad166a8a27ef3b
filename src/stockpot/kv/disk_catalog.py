"""One process's index of the disk folder, kept true to it while other processes change it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from threading import Lock

from stockpot.clock import Clock
from stockpot.kv.block import BlockId
from stockpot.kv.disk_folder import BlockFolder
from stockpot.kv.disk_index import DiskIndex, Entry, slim
from stockpot.kv.envelope import Sealer
from stockpot.kv.tier import Location, Refused, Wanted

_log = logging.getLogger(__name__)

STAMP_AFTER_S = 30.0
"""How far the use a file tells of may lag behind: not every read writes to the disk."""
COMPLAIN_EVERY_S = 60.0


class Catalog:
    """Entries of a folder, found in memory; and the few looks at the disk that keep them true.

    Any thread may call any method. No method raises OSError but `look`: where the disk fails, that is said in
    the log, once a minute, and nothing is found.
    """

    def __init__(self, folder: BlockFolder, sealer: Sealer, clock: Clock) -> None:
        self.index = DiskIndex()
        self._folder = folder
        self._sealer = sealer
        self._clock = clock
        self._looked_at_ns = -1
        self._look_lock = Lock()
        self._silent_until_s = float("-inf")

    # Finding.

    def whole(self, block_id: BlockId) -> Entry | None:
        """The block of this id, if it serves our model; one not known yet is looked for on the disk."""
        entry = self.index.get(block_id)
        return entry if self.ours(entry) else self._adopted(block_id)

    def beginning(self, place: Wanted) -> Location | None:
        """A block that serves the beginning of a place, the longest one; from memory."""
        for tokens, alias in ((place.tokens, place.id), *place.aliases):
            for entry in (self.index.get(alias), self.index.beginning_with(alias)):
                if entry is not None and self.ours(entry):
                    return Location(entry.id, place.start, tokens, entry.size_bytes)
        return None

    def ours(self, entry: Entry | None) -> bool:
        """Whether it can be read here and serves our model."""
        head = None if entry is None else entry.head
        return (
            head is not None
            and head.fingerprint == self._sealer.fingerprint
            and head.layout == self._sealer.layout
        )

    def _adopted(self, block_id: BlockId) -> Entry | None:
        """Take a file of the folder into the index, if it is there; given is it if it is ours."""
        try:
            with self._folder.open(block_id) as file:
                head = file.head(self._sealer)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.complain("be read", error)
            return None
        entry = Entry(block_id, file.size_bytes, file.modified_s, file.modified_s)
        if not isinstance(head, Refused):
            entry = Entry(
                block_id, file.size_bytes, file.modified_s, file.modified_s, head[1].tokens, slim(head[0])
            )
        self.index.put(entry)
        return entry if self.ours(entry) else None

    # Keeping true.

    def refresh(self) -> list[BlockId]:
        """Take up what other processes have changed, if the folder has; which blocks they have removed."""
        try:
            if self._folder.modified_ns() != self._looked_at_ns:
                return self.look()
        except OSError as error:
            self.complain("be listed", error)
        return []

    def look(self, *, at_all: bool = False) -> list[BlockId]:
        """Compare the index with the folder, by name or, `at_all`, by size and time as well; which blocks
        others have removed."""
        with self._look_lock:
            modified_ns = self._folder.modified_ns()
            # Taken before the listing: what is added to the index meanwhile is not taken for removed.
            before = self.index.ids()
            there: set[BlockId] = set()
            for block_id, listed in self._folder.blocks():
                there.add(block_id)
                entry = self.index.get(block_id)
                if entry is None:
                    self._adopted(block_id)
                elif at_all:
                    try:
                        facts = listed.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    self.index.update(
                        block_id,
                        stamp_s=max(entry.due_s(self._clock.wall()), facts.st_mtime),
                        filed_s=facts.st_mtime,
                        size_bytes=facts.st_size,
                    )
            gone = [block_id for block_id in before - there if self.index.remove(block_id) is not None]
            self._looked_at_ns = modified_ns
        return gone

    def is_current(self) -> bool:
        """Whether nobody has changed the folder since the last look."""
        return self._folder.modified_ns() == self._looked_at_ns

    def added(self, entry: Entry, *, was_current: bool) -> None:
        """Note a file that this process has published. If it did so holding `BlockFolder.exclusive` and was
        current just before, there is nothing new to look for."""
        self.index.put(entry)
        if was_current:
            self._looked_at_ns = self._folder.modified_ns()

    def use(self, entry: Entry, stamp_s: float, now_s: float, *, at_once: bool = False) -> bool:
        """Note a use, or a promise until `stamp_s`; False if the file is gone."""
        stamp_s = max(stamp_s, entry.due_s(now_s))
        filed_s = entry.filed_s
        if at_once or abs(stamp_s - filed_s) > STAMP_AFTER_S:
            try:
                self._folder.stamp(entry.id, stamp_s)
                filed_s = stamp_s
            except FileNotFoundError:
                self.index.remove(entry.id)
                return False
            except OSError as error:
                self.complain("note the use of a block", error)
        self.index.update(entry.id, stamp_s=stamp_s, filed_s=filed_s)
        return True

    def remove(self, entries: Iterable[Entry]) -> list[BlockId]:
        """Remove files and entries; which were there. What cannot be removed stays, and is said."""
        removed: list[BlockId] = []
        for entry in entries:
            try:
                self._folder.remove(entry.id)
            except OSError as error:
                self.complain("remove a block", error)
                continue
            if self.index.remove(entry.id) is not None:
                removed.append(entry.id)
        return removed

    def complain(self, what: str, error: OSError) -> None:
        """Log a failure of the disk, at most once a minute."""
        now_s = self._clock.monotonic()
        if now_s < self._silent_until_s:
            return
        self._silent_until_s = now_s + COMPLAIN_EVERY_S
        # An EIO is the hardware's; the rest are rights, mounts and limits.
        remedy = "the disk (dmesg, smartctl)" if error.errno == errno.EIO else "its rights and its mount"
        _log.warning(
            "The KV cache folder %s cannot %s: %s. Requests are served without; check %s, or turn the disk "
            "tier off.",
            self._folder.path,
            what,
            error,
            remedy,
        )

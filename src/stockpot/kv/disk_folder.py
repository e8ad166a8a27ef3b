"""The folder of the disk tier: one file a block, there whole or not at all, whoever else is at it.

    <block id in hex>.kv    an envelope; modification time: last use, or the end of a promise where later
    staging/                files being written, each locked by its writer; of a dead writer: removed at start
    quarantine/             the last files that did not verify
    lock                    held to publish and to evict; holds a token of who did so last

A file is written in `staging` and renamed, so a process killed at any instant leaves none or a whole one:
what is written is in the kernel's page cache, which outlives the process. A power cut may cut short or blank
a file that was renamed: nothing is flushed per block, and the envelope tells on reading.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stockpot.errors import ConfigurationError
from stockpot.kv.block import ID_BYTES, BlockId
from stockpot.kv.envelope import HEAD_AT, Measures, Sealer
from stockpot.kv.tier import Block, BlockHead, Refusal, Refused

BEGINNING_BYTES = 4096
"""Read at once from the start of a file: enough for the front of a block of some hundred tokens."""
QUARANTINE_FILES = 16
QUARANTINE_BYTES = 64 * 2**20
SUFFIX = ".kv"

_LOCK_TRIES = 1000
_LOCK_PAUSE_S = 0.002


@dataclass(frozen=True, slots=True)
class BlockFile:
    """A file of the folder, open for reading. Use as a context; reading raises OSError."""

    id: BlockId
    fd: int
    size_bytes: int
    modified_s: float
    inode: int

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def will_read(self) -> None:
        """Let the kernel read the file ahead, while this thread does something else."""
        os.posix_fadvise(self.fd, 0, self.size_bytes, os.POSIX_FADV_WILLNEED)

    def head(self, sealer: Sealer) -> tuple[BlockHead, Measures] | Refused:
        """Its head, verified, and its measures; nothing is read of its body."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)  # or the kernel reads on into the body
        beginning = os.pread(self.fd, BEGINNING_BYTES, 0)
        measures = self._measures(sealer, beginning)
        if isinstance(measures, Refused):
            return measures
        beginning = self._at_least(beginning, HEAD_AT + measures.head_bytes)
        head = sealer.head(self.id, measures, beginning)
        return head if isinstance(head, Refused) else (head, measures)

    def read(self, sealer: Sealer, *, any_model: bool = False) -> Block | Refused:
        """Its block, verified. The KV bytes go from the page cache into the object handed out, once."""
        beginning = os.pread(self.fd, BEGINNING_BYTES, 0)
        measures = self._measures(sealer, beginning)
        if isinstance(measures, Refused):
            return measures
        front = self._at_least(beginning, measures.data_at)[: measures.data_at]
        data = os.pread(self.fd, measures.data_bytes, measures.data_at)
        trailer = os.pread(self.fd, measures.size_bytes - measures.trailer_at, measures.trailer_at)
        return sealer.open_parts(self.id, front, data, trailer, any_model=any_model)

    def _measures(self, sealer: Sealer, beginning: bytes) -> Measures | Refused:
        measures = sealer.measure(self.id, beginning)
        if isinstance(measures, Measures) and measures.size_bytes != self.size_bytes:
            return Refused(
                self.id, "truncated", f"{self.size_bytes} bytes, its head says {measures.size_bytes}"
            )
        return measures

    def _at_least(self, beginning: bytes, size_bytes: int) -> bytes:
        if len(beginning) >= size_bytes:
            return beginning
        return beginning + os.pread(self.fd, size_bytes - len(beginning), len(beginning))


class BlockFolder:
    """Files by block id. Methods raise OSError; several threads and processes may use one folder."""

    def __init__(self, path: Path) -> None:
        """Makes the folder, for this user alone. Raises ConfigurationError where there can be none."""
        self.path = path
        self._staging = path / "staging"
        self._quarantine = path / "quarantine"
        self._turn = b""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.scandir(path).close()
        except OSError as error:
            raise ConfigurationError(
                f"the folder {path} for the KV cache cannot be used: {error.strerror}. "
                "Name another one, or turn the disk tier off."
            ) from error

    def file(self, block_id: BlockId) -> Path:
        return self.path / (block_id.hex() + SUFFIX)

    def open(self, block_id: BlockId) -> BlockFile:
        """Open a block's file; FileNotFoundError unless it is a regular file and no link."""
        # Without O_NONBLOCK a named pipe that somebody put there would hold the reader for ever.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(self.file(block_id), flags)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise FileNotFoundError(f"{self.file(block_id)} is a link") from error
            raise
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            os.close(fd)
            raise FileNotFoundError(f"{self.file(block_id)} is no regular file")
        return BlockFile(block_id, fd, facts.st_size, facts.st_mtime, facts.st_ino)

    def blocks(self) -> Iterator[tuple[BlockId, os.DirEntry[str]]]:
        """All block files, in no order."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                block_id = _id_of(entry.name)
                if block_id is not None and entry.is_file(follow_symlinks=False):
                    yield block_id, entry

    def modified_ns(self) -> int:
        """Changes when a file comes or goes."""
        return self.path.stat().st_mtime_ns

    def stamp(self, block_id: BlockId, stamp_s: float) -> None:
        """Set the modification time of a block's file."""
        os.utime(self.file(block_id), ns=(_ns(stamp_s), _ns(stamp_s)), follow_symlinks=False)

    def remove(self, block_id: BlockId) -> None:
        """Remove a block's file, or find it gone."""
        self.file(block_id).unlink(missing_ok=True)

    @contextmanager
    def staged(
        self, block_id: BlockId, buffers: Sequence[bytes], stamp_s: float
    ) -> Generator[Callable[[], object]]:
        """Write a file under a temporary name; what is given publishes it. Unpublished it goes away."""
        path, fd = self._temporary(block_id)
        try:
            _write_all(fd, buffers)
            os.utime(fd, ns=(_ns(stamp_s), _ns(stamp_s)))
            yield partial(path.replace, self.file(block_id))
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(fd)

    @contextmanager
    def exclusive(self) -> Generator[bool]:
        """Hold the right to publish and to evict, among all threads and processes; gives whether another
        process held it since.

        The lock goes with the process that holds it, however that ends. One that is stopped in between is
        waited for some seconds: TimeoutError.
        """
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(fd)
            changed = os.pread(fd, 8, 0) != self._turn
            # Before anything is changed: if this process is killed meanwhile, the others still take notice.
            self._turn = secrets.token_bytes(8)
            with suppress(OSError):  # on a full disk: everybody looks anew each time
                os.pwrite(fd, self._turn, 0)
            yield changed
        finally:
            os.close(fd)

    def quarantine(self, file: BlockFile, cause: Refusal) -> None:
        """Put a file aside for whoever wants to know what happened to it, and the oldest there away."""
        if self.file(file.id).lstat().st_ino != file.inode:
            return  # rewritten since
        self._quarantine.mkdir(mode=0o700, exist_ok=True)
        self.file(file.id).replace(self._quarantine / f"{file.id.hex()}.{cause}")
        kept_bytes = 0
        # The change time of a file is that of its renaming; the modification time is that of its last use.
        for place, (_, size_bytes, path) in enumerate(sorted(_facts(self._quarantine), reverse=True)):
            kept_bytes += size_bytes
            if place >= QUARANTINE_FILES or kept_bytes > QUARANTINE_BYTES:
                path.unlink(missing_ok=True)

    def empty_quarantine(self) -> None:
        for _, _, path in _facts(self._quarantine):
            path.unlink(missing_ok=True)

    def remove_orphans(self) -> int:
        """Remove what dead processes left in `staging`; how many files."""
        removed = 0
        for _, _, path in _facts(self._staging):
            with suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                    path.unlink()
                    removed += 1
                finally:
                    os.close(fd)
        return removed

    def _temporary(self, block_id: BlockId) -> tuple[Path, int]:
        """A new file, locked: `remove_orphans` of another process leaves it alone as long as we live."""
        self._staging.mkdir(mode=0o700, exist_ok=True)
        for _ in range(100):
            path = self._staging / f"{block_id.hex()}.{secrets.token_hex(8)}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return path, fd
            os.close(fd)  # taken for an orphan in the instant before it was locked
        raise OSError(f"{self._staging} loses every file made in it; stop what cleans it up")


def _id_of(name: str) -> BlockId | None:
    if len(name) != 2 * ID_BYTES + len(SUFFIX) or not name.endswith(SUFFIX):
        return None
    try:
        return BlockId(bytes.fromhex(name[: 2 * ID_BYTES]))
    except ValueError:
        return None


def _lock(fd: int) -> None:
    for _ in range(_LOCK_TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_LOCK_PAUSE_S)
    raise TimeoutError("another process holds the lock of the KV cache folder and does not go on")


def _write_all(fd: int, buffers: Sequence[bytes]) -> None:
    left = [memoryview(buffer) for buffer in buffers if buffer]
    while left:
        written = os.writev(fd, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


def _facts(folder: Path) -> list[tuple[int, int, Path]]:
    """Files of a folder that may be missing, as (change time, bytes, path)."""
    found: list[tuple[int, int, Path]] = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                found.append((facts.st_ctime_ns, facts.st_size, folder / entry.name))
    return found


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)

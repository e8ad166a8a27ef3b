"""How fast bytes move here without us, the floor of each tier: out of memory, off a disk, out of a Redis."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from stockpot.bench.redis_process import RedisProcess

_PIECE_BYTES = 2**20
_COPIES = 5
_PAGE_BYTES = 4096
_PIPELINE = 8


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes that were moved, and how long that took."""

    moved_bytes: int
    took_s: float

    def floor_s(self, size_bytes: int) -> float | None:
        """How long so many bytes take at least; None where nothing was moved."""
        return size_bytes * self.took_s / self.moved_bytes if self.moved_bytes and self.took_s else None


def memory_bandwidth(size_bytes: int) -> Bandwidth:
    """Copying so many bytes from one place to another; the best of a few times."""
    source, target = bytearray(size_bytes), bytearray(size_bytes)
    best_s = float("inf")
    for _ in range(_COPIES):
        begin_s = time.perf_counter()
        target[:] = source
        best_s = min(best_s, time.perf_counter() - begin_s)
    return Bandwidth(size_bytes, best_s)


def disk_bandwidth(folder: Path) -> Bandwidth:
    """Reading all files of a folder one after the other, into one buffer. For the disk's own speed,
    `drop_page_cache` first."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    moved = 0
    begin_s = time.perf_counter()
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                moved += count
    return Bandwidth(moved, time.perf_counter() - begin_s)


def redis_bandwidth(redis: RedisProcess) -> Bandwidth:
    """Getting all values of a Redis, a few in a pipeline, by a client that does nothing with them."""
    (keys,) = redis.ask((b"KEYS", b"*"))
    names = [key for key in keys if isinstance(key, bytes)] if isinstance(keys, list) else []
    sizes = redis.ask(*((b"STRLEN", name) for name in names))
    values = [(name, size) for name, size in zip(names, sizes, strict=True) if isinstance(size, int)]
    moved = 0
    begin_s = time.perf_counter()
    for first in range(0, len(values), _PIPELINE):
        some = values[first : first + _PIPELINE]
        replies = redis.ask(*((b"GET", name) for name, _ in some), size_bytes=sum(size for _, size in some))
        moved += sum(len(reply) for reply in replies if isinstance(reply, bytes))
    return Bandwidth(moved, time.perf_counter() - begin_s)


def drop_page_cache(folder: Path) -> float:
    """Take the files of a folder out of the kernel's page cache (posix_fadvise, after writing them out).

    Returns the share of their pages that stayed, by asking for some without waiting (preadv2 with
    RWF_NOWAIT); 1.0 where that cannot be told."""
    seen = stayed = 0
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, path.stat().st_size, 16 * _PAGE_BYTES):
                seen += 1
                stayed += _is_cached(file.fileno(), at)
    return stayed / seen if seen else 0.0


def _is_cached(fd: int, at: int) -> bool:
    try:
        os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # a file system that does not say
        return True
    return True


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.kv") if path.is_file())

"""Files appear in the cache whole or not at all, once, whoever else is at it.

A file is written under a temporary name in its own folder, flushed to the disk, then renamed. A process
that dies leaves a temporary file behind, which the next one that wants the same file removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from stockpot.errors import DownloadFailed
from stockpot.models.progress import Progress, silent

CHUNK_BYTES = 1 << 20
SPARE_BYTES = 256 * 2**20
"""What stays free on the disk beside any file written here."""


@contextmanager
def exclusive(target: Path, *, waiting: Progress = silent) -> Generator[None]:
    """Hold the right to make `target`, among all processes of this machine.

    The lock belongs to the open file, so it goes with the process however that ends. The `.lock` file
    stays: removing it would let two processes hold two different files of one name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock_path(target).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting(f"Waiting for another process that makes {target.name}", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def staged(target: Path) -> Generator[Path]:
    """A temporary path beside `target` that becomes `target` when the block ends without an error.

    Hold `exclusive(target)` around it: what a dead process left under the temporary name is removed.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        commit(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def commit(finished: Path, target: Path) -> None:
    """Rename `finished` to `target` so that no crash can leave a `target` with missing content."""
    with finished.open("rb") as file:
        os.fsync(file.fileno())
    finished.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def require_space(folder: Path, size_bytes: int, what: str) -> None:
    """Raise DownloadFailed unless `size_bytes` fit on the disk of `folder` with room to spare."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes + SPARE_BYTES:
        raise DownloadFailed(
            f"{what} needs {size_bytes / 1e6:,.0f} MB and {SPARE_BYTES / 1e6:,.0f} MB to spare, but {folder} "
            f"has {free / 1e6:,.0f} MB free. Make room, or name another folder with STOCKPOT_CACHE_DIR."
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_stream(
    source: IO[bytes], target: Path, *, description: str, total_bytes: int, progress: Progress
) -> str:
    """Write all of `source` to `target`; returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    done = 0
    with target.open("wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(description, done, total_bytes)
    return digest.hexdigest()


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")

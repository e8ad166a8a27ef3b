"""Memory pressure: how much the RAM tier may hold, so that the kernel never has to kill for memory.

Every limit this process stands under is read: its control group and all above it, of both versions, and the
machine itself. What is free below a limit is counted as the kernel reclaims before it kills: file pages that
were not used lately are free, swap is not. Sources: the kernel's admin guide, "Control Group v2" (memory) and
"Memory Resource Controller" of version 1; proc_pid_mountinfo(5); proc_meminfo(5).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stockpot.clock import Clock

RESERVE_PARTS = 20
RESERVE_LEAST_BYTES = 256 * 2**20
RESERVE_MOST_PARTS = 4
UNLIMITED_BYTES = 1 << 60
"""The kernel's "no limit" of version 1 is about 2^63; no machine has this much."""

GROW_S = 60.0
"""From nothing to the full capacity, when all memory is free again."""
SETTLE_S = 10.0
"""How long there has been no pressure before the capacity grows."""


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """One limit and how far it is; `source` says whose limit it is."""

    limit_bytes: int
    available_bytes: int
    source: str

    @property
    def reserve_bytes(self) -> int:
        """Less than this available is pressure: 5 % of the limit, at least 256 MiB, at most a quarter."""
        least = max(self.limit_bytes // RESERVE_PARTS, RESERVE_LEAST_BYTES)
        return min(least, self.limit_bytes // RESERVE_MOST_PARTS)

    @property
    def target_bytes(self) -> int:
        """What is to be available when pressure has been answered."""
        return self.reserve_bytes * 3 // 2


def read_memory(root: Path = Path("/")) -> MemoryReading:
    """The limit that is closest: the one with the least available beyond its reserve.

    `root` is where /proc and the control groups are looked for. Where neither can be read (macOS), the
    operating system is asked through psutil.
    """
    readings = [*_group_readings(root), *_machine_reading(root)]
    if not readings:
        import psutil

        memory = psutil.virtual_memory()
        return MemoryReading(memory.total, memory.available, "operating system")
    return min(readings, key=lambda reading: reading.available_bytes - reading.reserve_bytes)


def shrink_target(reading: MemoryReading, used_bytes: int) -> int | None:
    """How many of `used_bytes` the RAM tier should give back now, at least 1; None for nothing.

    It begins below the reserve and frees up to one and a half times the reserve, so that it does not begin
    again at once.
    """
    if reading.available_bytes >= reading.reserve_bytes or used_bytes <= 0:
        return None
    return min(used_bytes, max(1, reading.target_bytes - reading.available_bytes))


class PressureValve:
    """The capacity the RAM tier may have at the moment, between 0 and what is configured.

    It falls at once, and at any time promises no more than what is available beyond the reserve. It rises
    slowly, when there has been no pressure for a while, as far as would not bring the pressure back. Polled
    by one thread, about twice a second.
    """

    def __init__(
        self, capacity_bytes: int, clock: Clock, read: Callable[[], MemoryReading] = read_memory
    ) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"the capacity of the RAM tier cannot be {capacity_bytes} bytes")
        self._configured_bytes = capacity_bytes
        self._allowed_bytes = capacity_bytes
        self._clock = clock
        self._read = read
        self._polled_s = clock.monotonic()
        self._pressed_s = self._polled_s - SETTLE_S
        self._reading: MemoryReading | None = None

    @property
    def reading(self) -> MemoryReading | None:
        """What the last poll saw."""
        return self._reading

    @property
    def under_pressure(self) -> bool:
        """Whether the last poll found less than the reserve available."""
        return self._reading is not None and self._reading.available_bytes < self._reading.reserve_bytes

    def capacity(self, used_bytes: int) -> int:
        """Read the memory; the bytes allowed now to a tier that holds `used_bytes`.

        As the tier follows, what it frees must get back to the kernel before the next poll, see
        `return_freed_memory`: memory that stays missing is asked for again.
        """
        reading = self._reading = self._read()
        now_s = self._clock.monotonic()
        elapsed_s, self._polled_s = now_s - self._polled_s, now_s

        surplus = shrink_target(reading, used_bytes)
        if surplus is not None:
            allowed = min(self._allowed_bytes, used_bytes - surplus)
        else:
            allowed = min(self._allowed_bytes, used_bytes + reading.available_bytes - reading.reserve_bytes)
        if self.under_pressure:
            self._pressed_s = now_s
        elif now_s - self._pressed_s >= SETTLE_S:
            # Filled to this, the tier leaves the target available: more than the reserve, so it stays.
            ceiling = used_bytes + reading.available_bytes - reading.target_bytes
            step = int(self._configured_bytes * elapsed_s / GROW_S)
            allowed = max(allowed, min(ceiling, allowed + step))
        self._allowed_bytes = min(max(allowed, 0), self._configured_bytes)
        return self._allowed_bytes


def return_freed_memory() -> bool:
    """Have the C allocator give freed pages back to the kernel, which otherwise may not see them for long;
    whether any were. To call after the tier has shrunk, on a thread that may wait for milliseconds.

    False where the C library has no such call (macOS, musl).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(trim(ctypes.c_size_t(0))) if trim is not None else False


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy of control groups; `top` is the group that is seen at `point`."""

    version: int
    top: PurePosixPath
    point: PurePosixPath


def _group_readings(root: Path) -> Iterator[MemoryReading]:
    own = _own_groups(root)
    for mount in _mounts(root):
        group = own.get(mount.version)
        if group is None:
            continue
        for path in _up_to_top(mount, group):
            folder = root / path.relative_to("/")
            reading = _read_v2(folder, path) if mount.version == 2 else _read_v1(folder, path)
            if reading is not None:
                yield reading


def _own_groups(root: Path) -> dict[int, PurePosixPath]:
    """The group of this process, by version: `4:memory:/a/b` or `0::/a/b`."""
    groups: dict[int, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            groups[2] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            groups[1] = PurePosixPath(path)
    return groups


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        top, point = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
        if kind[0] == "cgroup2":
            yield _Mount(2, top, point)
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield _Mount(1, top, point)


def _up_to_top(mount: _Mount, group: PurePosixPath) -> Iterator[PurePosixPath]:
    """Where the group and those above it are mounted, innermost first.

    Of a group that is not below what is mounted (a container that sees its own group as the top, but reads
    the host's name for it) the top stands for itself.
    """
    inner = PurePosixPath()
    if group.is_relative_to(mount.top) and ".." not in group.parts:
        inner = group.relative_to(mount.top)
    for part in (inner, *inner.parents) if inner.parts else (inner,):
        yield mount.point / part


def _read_v2(folder: Path, path: PurePosixPath) -> MemoryReading | None:
    """memory.max kills, memory.high slows down to a crawl: the smaller counts."""
    limits = [
        limit
        for name in ("memory.max", "memory.high")
        if (limit := _number(folder / name)) is not None and limit < UNLIMITED_BYTES
    ]
    used = _number(folder / "memory.current")
    if not limits or used is None:
        return None
    return _below(min(limits), used - _stat(folder, "inactive_file"), f"cgroup v2 {path}")


def _read_v1(folder: Path, path: PurePosixPath) -> MemoryReading | None:
    limit = _number(folder / "memory.limit_in_bytes")
    used = _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= UNLIMITED_BYTES:
        return None
    return _below(limit, used - _stat(folder, "total_inactive_file"), f"cgroup v1 {path}")


def _below(limit: int, used: int, source: str) -> MemoryReading:
    return MemoryReading(limit, max(0, limit - max(0, used)), source)


def _machine_reading(root: Path) -> Iterator[MemoryReading]:
    values = {
        name: int(kibibytes.split()[0]) * 1024
        for line in _lines(root / "proc/meminfo")
        for name, _, kibibytes in (line.partition(":"),)
        if name in ("MemTotal", "MemAvailable")
    }
    if len(values) == 2:
        yield MemoryReading(values["MemTotal"], values["MemAvailable"], "/proc/meminfo")


def _stat(folder: Path, name: str) -> int:
    for line in _lines(folder / "memory.stat"):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    """A file's number; None for "max", or if it cannot be read."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    """A file that cannot be read has none: groups go, or are not ours to see."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)

"""This machine, as far as measurements on it depend on it: processor and memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
from blake3 import blake3

_UNLIMITED_BYTES = 1 << 60


def processor_name(root: Path = Path("/")) -> str:
    """What the processor calls itself, with a short hash of its instruction sets: virtual machines often
    give one name to processors that differ in what they can do."""
    name, flags = "", ""
    try:
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            match key.strip():
                case "model name" if not name:
                    name = value.strip()
                case "flags" | "Features" if not flags:
                    flags = " ".join(sorted(value.split()))
                case _:
                    pass
    except OSError:
        pass  # not Linux
    name = name or platform.processor() or platform.machine()
    return f"{name} ({blake3(flags.encode()).hexdigest()[:8]})" if flags else name


def usable_processors() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory this process can still take without swapping: the machine's, or its control group's where
    a container is limited to less."""
    return max(0, min(psutil.virtual_memory().available, _control_group_bytes(root)))


def _control_group_bytes(root: Path) -> int:
    """What the limits of this process's control groups leave, all levels of version 2 and version 1."""
    least = _UNLIMITED_BYTES
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the path may be the host's, so the mount itself is always looked at too.
        folder = base / group.lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            least = min(least, _left(level / limit, level / usage))
    return least


def _left(limit: Path, usage: Path) -> int:
    try:
        return int(limit.read_text()) - int(usage.read_text())
    except (OSError, ValueError):  # no such level, or "max"
        return _UNLIMITED_BYTES

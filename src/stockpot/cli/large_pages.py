"""Starting the server with memory in large pages, where Linux gives them to programs that ask."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb=1"
_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_large_pages() -> None:
    """Replace this process by itself, once, with malloc asking for transparent huge pages.

    Blocks that come back from disk or Redis land in memory that was not used before, and on virtual machines
    the first touch of a page of 4 KiB can cost more than reading what goes there: 24 MB from Redis took 32 to
    130 ms (some not within their timeout), with large pages 35 to 40 (AMD EPYC, 2 processors, Linux,
    2026-11-24). glibc 2.35 and newer read the setting when a program starts and at no other time. Does
    nothing where the kernel does not offer large pages on request, or where GLIBC_TUNABLES says something of
    malloc already.
    """
    if not sys.platform.startswith("linux") or not sys.orig_argv:
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or not _offered():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_TUNABLE}" if tunables else _TUNABLE
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _offered() -> bool:
    try:
        return "[madvise]" in _STATE.read_text(encoding="ascii")
    except OSError:
        return False

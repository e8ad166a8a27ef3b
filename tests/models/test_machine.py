"""What is read of a machine, from trees of files such as Linux shows."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from stockpot.models.machine import available_memory_bytes, processor_name, usable_processors

MIB = 2**20


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    "files",
    [
        # Version 2: the limit is the parent's.
        {
            "proc/self/cgroup": "0::/kitchen/pot\n",
            "sys/fs/cgroup/kitchen/pot/memory.max": "max\n",
            "sys/fs/cgroup/kitchen/memory.max": f"{64 * MIB}\n",
            "sys/fs/cgroup/kitchen/memory.current": f"{24 * MIB}\n",
        },
        # Version 2 in a container: the path is the host's, the mount is the group itself.
        {
            "proc/self/cgroup": "0::/host/path\n",
            "sys/fs/cgroup/memory.max": f"{64 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{24 * MIB}\n",
        },
        # Version 1.
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/kitchen\n",
            "sys/fs/cgroup/memory/kitchen/memory.limit_in_bytes": f"{64 * MIB}\n",
            "sys/fs/cgroup/memory/kitchen/memory.usage_in_bytes": f"{24 * MIB}\n",
        },
    ],
)
def test_a_control_group_limits_the_memory(tmp_path: Path, files: dict[str, str]) -> None:
    assert available_memory_bytes(_tree(tmp_path, files)) == 40 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(MIB),
        "sys/fs/cgroup/memory.current": str(2 * MIB),
    }
    assert available_memory_bytes(_tree(tmp_path, files)) == 0


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    assert 0 < available_memory_bytes(tmp_path) <= psutil.virtual_memory().total


def test_processors_that_differ_in_their_instructions_differ_in_name(tmp_path: Path) -> None:
    info = "processor: 0\nmodel name\t: Kettle 9000\nflags\t\t: fpu {}\nmodel name\t: Kettle 9000\n"
    plain = processor_name(_tree(tmp_path / "plain", {"proc/cpuinfo": info.format("avx2")}))
    wide = processor_name(_tree(tmp_path / "wide", {"proc/cpuinfo": info.format("avx2 avx512f")}))
    assert plain.startswith("Kettle 9000 (")
    assert wide.startswith("Kettle 9000 (")
    assert plain != wide


def test_there_is_always_a_name_and_a_processor(tmp_path: Path) -> None:
    assert processor_name(tmp_path)
    assert usable_processors() >= 1

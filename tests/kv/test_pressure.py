"""Memory pressure: limits read from trees laid out as the kernel shows them; the valve as a controller."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.clock import VirtualClock
from stockpot.kv.pressure import MemoryReading, PressureValve, read_memory, shrink_target

MIB = 2**20
GIB = 2**30
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V1_NO_LIMIT = 9223372036854771712


def lay_out(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def meminfo(total: int, available: int) -> str:
    return f"MemTotal: {total // 1024} kB\nMemFree: 4 kB\nMemAvailable: {available // 1024} kB"


def v2_group(path: str, maximum: object, high: object, current: int, inactive: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": maximum,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": current,
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\nactive_file 7",
    }


def v1_group(path: str, limit: int, usage: int, inactive: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}",
    }


def test_the_machine_counts_where_nothing_is_limited(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": "0::/user.slice/app",
        "proc/self/mountinfo": V2.format(top="/"),
        "proc/meminfo": meminfo(16 * GIB, 9 * GIB),
        **v2_group("/user.slice/app", "max", "max", 3 * GIB, 0),
        **v2_group("/user.slice", "max", "max", 5 * GIB, 0),
    }
    assert read_memory(lay_out(tmp_path, files)) == MemoryReading(16 * GIB, 9 * GIB, "/proc/meminfo")


def test_v2_the_tightest_group_counts_and_idle_file_pages_are_free(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": "0::/pod/container",
        "proc/self/mountinfo": V2.format(top="/"),
        "proc/meminfo": meminfo(64 * GIB, 50 * GIB),
        **v2_group("/pod/container", 8 * GIB, "max", 2 * GIB, GIB),
        **v2_group("/pod", 10 * GIB, 9 * GIB, 8 * GIB, GIB // 2),  # a neighbour in the pod
    }
    reading = read_memory(lay_out(tmp_path, files))
    assert reading == MemoryReading(9 * GIB, 3 * GIB // 2, "cgroup v2 /sys/fs/cgroup/pod")


def test_a_small_limit_with_room_does_not_hide_a_large_one_without(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": "0::/small",
        "proc/self/mountinfo": V2.format(top="/"),
        "proc/meminfo": meminfo(64 * GIB, 2 * GIB),  # below its reserve of 3.2 GiB
        **v2_group("/small", GIB, "max", 0, 0),
    }
    assert read_memory(lay_out(tmp_path, files)).source == "/proc/meminfo"


@pytest.mark.parametrize(
    ("own", "top"),
    [
        pytest.param("/", "/", id="own cgroup namespace"),
        pytest.param("/docker/abc", "/docker/abc", id="host's names, own group mounted"),
        pytest.param("/docker/abc", "/", id="host's names, own namespace mounted"),
        pytest.param("/../../elsewhere", "/", id="outside of the namespace"),
    ],
)
def test_v1_in_a_container(tmp_path: Path, own: str, top: str) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": f"9:name=systemd:/x\n4:cpu,memory:{own}\n0::/",
        "proc/self/mountinfo": V1.format(top=top),
        "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
        **v1_group("", 4 * GIB, 3 * GIB, GIB // 2),
    }
    reading = read_memory(lay_out(tmp_path, files))
    assert (reading.limit_bytes, reading.available_bytes) == (4 * GIB, 3 * GIB // 2)
    assert reading.source.startswith("cgroup v1 /sys/fs/cgroup/memory")


def test_v1_nested_groups_and_its_number_for_no_limit(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": "4:memory:/a/b",
        "proc/self/mountinfo": V1.format(top="/"),
        **v1_group("/a/b", V1_NO_LIMIT, GIB, 0),
        **v1_group("/a", 2 * GIB, 3 * GIB, 0),  # over its limit, just before somebody is killed
        **v1_group("", V1_NO_LIMIT, 5 * GIB, 0),
    }
    reading = read_memory(lay_out(tmp_path, files))
    assert reading == MemoryReading(2 * GIB, 0, "cgroup v1 /sys/fs/cgroup/memory/a")


def test_both_versions_at_once_and_a_mount_point_with_a_space(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": "4:memory:/\n0::/",
        "proc/self/mountinfo": "1 0 0:1 / /my\\040groups rw - cgroup2 none rw\n" + V1.format(top="/"),
        **v1_group("", 4 * GIB, GIB, 0),
        "my groups/memory.max": 2 * GIB,
        "my groups/memory.current": GIB,
    }
    reading = read_memory(lay_out(tmp_path, files))
    assert reading == MemoryReading(2 * GIB, GIB, "cgroup v2 /my groups")


def test_without_proc_the_operating_system_is_asked(tmp_path: Path) -> None:
    reading = read_memory(tmp_path)
    assert (reading.limit_bytes, reading.source) == (psutil.virtual_memory().total, "operating system")


def test_this_machine_can_be_read() -> None:
    reading = read_memory()
    assert 0 <= reading.available_bytes <= reading.limit_bytes


def test_the_reserve_is_a_part_of_the_limit_within_bounds() -> None:
    assert MemoryReading(100 * GIB, 0, "").reserve_bytes == 5 * GIB
    assert MemoryReading(2 * GIB, 0, "").reserve_bytes == 256 * MIB
    assert MemoryReading(400 * MIB, 0, "").reserve_bytes == 100 * MIB


READINGS = st.integers(0, 2**42).flatmap(
    lambda limit: st.builds(MemoryReading, st.just(limit), st.integers(0, limit), st.just("drawn"))
)
BYTES = st.integers(0, 2**42)


@given(reading=READINGS, used=BYTES)
def test_shrinking_asks_for_something_that_is_there_and_is_enough(reading: MemoryReading, used: int) -> None:
    give_back = shrink_target(reading, used)
    if give_back is None:
        assert used == 0 or reading.available_bytes >= reading.reserve_bytes
        return
    assert 1 <= give_back <= used
    after = MemoryReading(reading.limit_bytes, reading.available_bytes + give_back, "after")
    assert give_back == used or shrink_target(after, used - give_back) is None


@given(reading=READINGS, used=BYTES, capacity=BYTES, polls=st.lists(st.floats(0, 100), max_size=40))
def test_a_reading_that_does_not_change_never_makes_the_capacity_swing(
    reading: MemoryReading, used: int, capacity: int, polls: list[float]
) -> None:
    clock = VirtualClock()
    valve = PressureValve(capacity, clock, lambda: reading)
    seen = [valve.capacity(used)]
    for wait_s in polls:
        clock.advance(wait_s)
        seen.append(valve.capacity(used))
    assert all(0 <= allowed <= capacity for allowed in seen)
    assert seen == sorted(seen)
    if valve.under_pressure:
        assert len(set(seen)) == 1
        assert seen[0] < used or used == 0


class Host:
    """A machine on which others take what they want as far as it is there, and a RAM tier that fills what it
    may and evicts what it must."""

    def __init__(self, limit: int, capacity: int) -> None:
        self.limit = limit
        self.wanted_by_others = 0
        self.tier = 0
        self.clock = VirtualClock()
        self.valve = PressureValve(capacity, self.clock, self.read)

    def read(self) -> MemoryReading:
        return MemoryReading(self.limit, max(0, self.limit - self.wanted_by_others - self.tier), "host")

    def run(self, seconds: float, *, filling: int) -> int:
        """Poll twice a second while `filling` bytes a second arrive; how often the tier had to shrink."""
        shrunk = 0
        for _ in range(int(seconds * 2)):
            self.clock.advance(0.5)
            allowed = self.valve.capacity(self.tier)
            shrunk += allowed < self.tier
            self.tier = min(allowed, self.tier + filling // 2)
        return shrunk


@given(
    others=st.lists(st.integers(0, 15 * GIB), min_size=1, max_size=5),
    capacity=st.integers(0, 20 * GIB),
    filling=st.integers(0, GIB),
)
def test_the_tier_makes_room_and_then_comes_to_rest(others: list[int], capacity: int, filling: int) -> None:
    host = Host(16 * GIB, capacity)
    for wanted in others:
        host.wanted_by_others = wanted
        # 15 GiB at 1.2 GiB, the target, a poll: no reading says more than that nothing is left.
        host.run(10, filling=filling)
        reading = host.read()
        assert reading.available_bytes >= reading.reserve_bytes or host.tier == 0
        assert host.run(300, filling=filling) == 0, "what was let in had to go again"
    rest = host.valve.capacity(host.tier)
    assert host.run(60, filling=0) == 0
    assert host.valve.capacity(host.tier) == rest


def test_the_capacity_returns_slowly_when_the_pressure_has_gone() -> None:
    host = Host(16 * GIB, 8 * GIB)
    host.run(60, filling=GIB)
    assert host.tier == 8 * GIB

    host.wanted_by_others = 12 * GIB
    host.run(5, filling=GIB)
    shrunk = host.tier
    assert 2 * GIB < shrunk < 4 * GIB

    host.wanted_by_others = 0
    host.run(5, filling=GIB)
    assert host.tier == shrunk
    host.run(10, filling=GIB)
    assert shrunk < host.tier < 6 * GIB
    host.run(60, filling=GIB)
    assert host.tier == 8 * GIB


FILLER = """
import collections, sys, time
from stockpot.clock import SystemClock
from stockpot.kv.pressure import PressureValve, read_memory, return_freed_memory
BLOCK = 2 * 2**20
valve = PressureValve(10 * 2**30, SystemClock())
print(read_memory().source, flush=True)
blocks = collections.deque()
for _ in range(400):  # 800 MiB under a limit of 400
    blocks.append(b"x" * BLOCK)
    allowed = valve.capacity(len(blocks) * BLOCK)
    while len(blocks) * BLOCK > allowed:
        blocks.popleft()
    if valve.under_pressure:
        return_freed_memory()
print(len(blocks), flush=True)
"""


@pytest.fixture
def limited_group() -> Generator[Path]:
    """A memory group of version 1 with a limit of 400 MiB, where this user may make one."""
    group = Path("/sys/fs/cgroup/memory") / f"stockpot-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory group of version 1 can be made here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(400 * MIB))
        yield group
    except PermissionError as error:
        pytest.skip(f"no memory group of version 1 can be limited here: {error}")
    finally:
        group.rmdir()


def test_a_tier_that_obeys_the_valve_outlives_a_real_limit(limited_group: Path) -> None:
    enter = f"open({str(limited_group / 'cgroup.procs')!r}, 'w').write('0')\n"
    done = subprocess.run(
        [sys.executable, "-c", enter + FILLER], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"killed, or failed: {done.returncode} {done.stderr}"
    source, kept = done.stdout.split("\n")[:2]
    assert source == f"cgroup v1 {limited_group}"
    assert 0 < int(kept) < 200

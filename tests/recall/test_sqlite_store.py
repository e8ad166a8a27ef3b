"""The SQLite store when things go wrong: processes that die, disks that are full, files that are damaged."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from tests.recall.kept import START_S, key_of, make_entry, make_observation

from stockpot.clock import Clock, SystemClock, VirtualClock
from stockpot.errors import ConfigurationError, StockpotError
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.stores.open_store import open_store
from stockpot.recall.stores.store import AnswerStore
from stockpot.settings_recall import RecallSettings

pytestmark = pytest.mark.anyio

FILE = "answers-1.sqlite"

CHILD = """
import asyncio, resource, signal, sys, time
from pathlib import Path
from stockpot.clock import SystemClock
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.stores.open_store import open_store
from stockpot.settings_recall import RecallSettings

def entry(number, size):
    key = number.to_bytes(16, "little") + bytes([1]) * 16
    return Entry(key=key, scope="acme", tenant="acme", writer="k1", model="large", created_at=time.time(),
                 expires_at=time.time() + 3600, answer=key * size, prompt_tokens=1, completion_tokens=1,
                 cost_nanousd=1, duration_s=1.0, tags=frozenset({"faq"}))

def say(*words):
    print(*words, flush=True)

async def main(folder):
    store = open_store(RecallSettings(memory_bytes=0), Path(folder), SystemClock())
    await store.start()
    {work}

asyncio.run(main(sys.argv[1]))
"""

PUTS_FOR_EVER = """
    for number in range(500):
        store.put(entry(number, 50))
    await asyncio.sleep(1)
    say("a second old")
    for number in range(500, 10**9):
        store.put(entry(number, 50))
        if number % 50 == 0:
            await asyncio.sleep(0.002)
        if number == 3000:
            say("3000")
"""

REMOVES = """
    say(len(await store.remove(Selector(tag="faq"))))
    await store.close()
"""

FILLS_THE_DISK = """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, 3 * 2**20))
    for number in range(400):
        store.put(entry(number, 1000))
        if number % 10 == 9:
            await asyncio.sleep(0.02)
    found = [await store.get(entry(number, 1).key) for number in range(400)]
    listed = [each async for each in store.entries()]
    stats = store.stats()
    given = sum(each is not None for each in found)
    say(stats.lost > 0, stats.lost + len(listed) == 400, given >= len(listed))
    await store.close()
"""


@contextlib.contextmanager
def child(folder: Path, work: str) -> Generator[subprocess.Popen[str]]:
    """Another process on the same file."""
    command = [sys.executable, "-W", "error", "-c", CHILD.replace("{work}", work.strip()), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def opened(folder: Path, clock: Clock, **other: Any) -> AnswerStore:
    return open_store(RecallSettings(**other), folder, clock)


async def listed(store: AnswerStore) -> list[Entry]:
    return [entry async for entry in store.entries()]


async def test_what_was_written_survives_kill_9_and_nothing_is_torn(tmp_path: Path) -> None:
    with child(tmp_path, PUTS_FOR_EVER) as process:
        assert said(process) == "a second old"
        assert said(process) == "3000"
        process.kill()
    store = opened(tmp_path, SystemClock())
    await store.start()
    keys = [entry.key for entry in reversed(await listed(store))]
    assert len(keys) >= 500
    assert keys == [key_of(number) for number in range(len(keys))]  # whole batches, in order
    for key in keys:
        entry = await store.get(key)
        assert entry is not None and entry.answer == key * 50
    stats = store.stats()
    assert (stats.entries, stats.failures, stats.unreadable) == (len(keys), 0, 0)
    await store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        sums = "SELECT count(*), sum(size_bytes), (SELECT size_bytes FROM state) FROM entries"
        count, size, total = connection.execute(sums).fetchone()
        assert (count, size) == (len(keys), total)


async def test_another_process_invalidates_and_this_one_sees_it(tmp_path: Path) -> None:
    clock = SystemClock()
    store = opened(tmp_path, clock)
    await store.start()
    for number in range(300):
        store.put(make_entry(number, clock.wall(), tags=frozenset({"faq"} if number % 2 else {})))
    await listed(store)
    with child(tmp_path, REMOVES) as process:
        assert await asyncio.to_thread(said, process) == "150"
    await asyncio.sleep(0.6)
    assert [await store.get(key_of(number)) is None for number in range(300)] == [False, True] * 150
    await store.close()


def test_a_full_disk_loses_entries_and_no_requests(tmp_path: Path) -> None:
    with child(tmp_path, FILLS_THE_DISK) as process:
        assert said(process) == "True True True"
        assert process.wait(30) == 0


async def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "recall"
    store = opened(folder, VirtualClock(START_S))
    await store.start()
    store.put(make_entry(1))
    await listed(store)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert (folder / (FILE + "-wal")).exists()
    await store.close()


async def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = opened(tmp_path / "file" / "recall", VirtualClock(START_S))
    with pytest.raises(ConfigurationError, match="data_dir"):
        await store.start()


async def test_a_file_that_is_deleted_is_made_anew_and_memory_forgets(tmp_path: Path) -> None:
    clock = VirtualClock(START_S)
    store, other = opened(tmp_path, clock), opened(tmp_path, clock)
    await store.start()
    await other.start()
    store.put(make_entry(1))
    await listed(store)
    assert await other.get(key_of(1)) is not None
    (tmp_path / FILE).unlink()
    clock.advance(1)
    assert await store.get(key_of(1)) is None
    assert await other.get(key_of(1)) is None
    store.put(make_entry(2))
    await listed(store)
    clock.advance(1)
    assert await other.get(key_of(2)) is not None
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert (store.stats().lost, other.stats().lost) == (0, 0)
    await store.close()
    await other.close()


async def test_a_damaged_file_is_moved_aside_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all " * 1000)
    clock = VirtualClock(START_S)
    store = opened(tmp_path, clock)
    await store.start()
    store.put(make_entry(1))
    await listed(store)
    clock.advance(1)
    assert await store.get(key_of(1)) is not None
    assert (tmp_path / f"{FILE}.damaged").read_bytes().startswith(b"no database")
    assert "is damaged" in caplog.text
    await store.close()


async def test_a_file_that_is_damaged_at_work_is_a_miss_and_replaced(tmp_path: Path) -> None:
    clock = VirtualClock(START_S)
    store = opened(tmp_path, clock, memory_bytes=0)
    await store.start()
    for number in range(500):
        store.put(make_entry(number, answer=bytes(4000)))
    await listed(store)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / FILE).open("r+b") as file:  # the same file, its pages overwritten
        size = (tmp_path / FILE).stat().st_size
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    found = [await store.get(key_of(number)) for number in range(500)]
    for _ in range(4):  # whoever notices first
        store.put(make_entry(1000))
        await listed(store)
        clock.advance(20)
    assert None in found
    assert store.stats().failures > 0
    assert [entry.key for entry in await listed(store)] == [key_of(1000)]
    assert await store.get(key_of(1000)) is not None
    assert (tmp_path / f"{FILE}.damaged").exists()
    await store.close()


async def test_a_locked_file_loses_what_is_put_and_tells_who_invalidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stockpot.recall.stores.sqlite_file._BUSY_S", 0.05)
    clock = VirtualClock(START_S)
    store = opened(tmp_path, clock, memory_bytes=0)
    await store.start()
    store.put(make_entry(1))
    await listed(store)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.put(make_entry(2))
        await listed(store)
        assert store.stats().lost == 1
        assert not store.stats().reachable or store.stats().failures == 1
        assert await store.get(key_of(1)) is not None  # who reads does not wait for who writes
        with pytest.raises(StockpotError, match="locked"):
            await store.remove(Selector(id=make_entry(1).id))
        other.execute("ROLLBACK")
    clock.advance(30)
    assert len(await store.remove(Selector(id=make_entry(1).id))) == 1
    assert await store.get(key_of(1)) is None
    await store.close()


async def test_rows_of_another_version_are_left_aside_and_counted(tmp_path: Path) -> None:
    clock = VirtualClock(START_S)
    store = opened(tmp_path, clock, memory_bytes=0)
    await store.start()
    for number in (1, 2):
        store.put(make_entry(number))
        store.learn(make_observation(number, clock))
    await listed(store)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection, connection:
        connection.execute("UPDATE entries SET packed = x'80' WHERE id = ?", (key_of(1)[:16],))
        connection.execute("UPDATE observations SET packed = x'c1' WHERE number = 1")
    assert await store.get(key_of(1)) is None
    assert [entry.key for entry in await listed(store)] == [key_of(2)]
    assert [each.entry for each in await store.observations()] == [key_of(2)]
    assert store.stats().unreadable == 3
    assert [entry.key for entry in await store.remove(Selector(model="large"))] == [key_of(2)]
    assert store.stats().entries == 0
    await store.close()


async def test_only_the_last_evidence_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stockpot.recall.stores.sqlite_store._KEPT_OBSERVATIONS", 100)
    clock = VirtualClock(START_S)
    store = opened(tmp_path, clock)
    await store.start()
    for number in range(250):
        store.learn(make_observation(number, clock))
    assert [each.entry for each in await store.observations()] == [key_of(n) for n in range(150, 250)]
    await store.close()

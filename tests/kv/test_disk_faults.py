"""The disk tier when things go wrong: killed writers, full and broken disks, flipped bits, crowds."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from stockpot.clock import SystemClock, VirtualClock
from stockpot.kv.block import BlockId, TokenKey, block_id, content_hash, root_id, token_key
from stockpot.kv.disk import DiskTier
from stockpot.kv.disk_folder import QUARANTINE_FILES, BlockFolder
from stockpot.kv.envelope import Sealer, Sealing
from stockpot.kv.tier import REFUSED_BY_CHECK, Block, BlockHead, Refused, Wanted

SEALER = Sealer(Sealing(b"a secret of the kitchen"), fingerprint="model", layout="layout")
ROOT = root_id(fingerprint="model", layout="layout")


def block(number: int, data_bytes: int = 3000) -> Block:
    """A block whose data tells its tokens."""
    key = token_key(np.arange(8, dtype=np.int32) + number * 10)
    return Block(
        BlockHead(
            id=block_id(ROOT, key),
            parent=ROOT,
            start=0,
            tokens=key,
            content=content_hash(key),
            fingerprint="model",
            layout="layout",
        ),
        data_of(key, data_bytes),
    )


def data_of(key: TokenKey, data_bytes: int) -> bytes:
    return (bytes(key) * (data_bytes // len(key) + 1))[:data_bytes]


def is_right(served: Block) -> bool:
    return served.data == data_of(served.head.tokens, len(served.data))


def open_tier(folder: Path, capacity_bytes: int = 1 << 30, *, clock: VirtualClock | None = None) -> DiskTier:
    return DiskTier(folder, capacity_bytes=capacity_bytes, sealer=SEALER, clock=clock or SystemClock())


def is_located(tier: DiskTier, wanted: BlockId) -> bool:
    return bool(tier.locate([Wanted(wanted, 0, 8)]))


# Run in processes of their own: `python -c` of this module's text, with the folder and a seed.
WRITE_FOR_EVER = """
tier, number = open_tier(Path(sys.argv[1]), 4_000_000), random.Random(int(sys.argv[2]))
print("writing", flush=True)
while True:
    tier.write([block(number.randrange(10**6), number.randrange(1, 600_000)) for _ in range(4)])
"""
CROWD = """
tier, number = open_tier(Path(sys.argv[1]), 2_000_000), random.Random(int(sys.argv[2]))
until = time.monotonic() + 3
served = 0
while time.monotonic() < until:
    some = [block(number.randrange(60), number.randrange(1, 200_000)) for _ in range(4)]
    assert tier.write(some) == [None] * 4, "not kept"
    for one in some:
        if is_located(tier, one.head.id):
            for found in tier.read([one.head.id]):
                assert is_right(found) if isinstance(found, Block) else found.cause == "absent", found
                served += isinstance(found, Block)
tier.check_integrity()
print(served, dict(tier.stats().misses))
"""


def process(script: str, folder: Path, seed: int) -> subprocess.Popen[str]:
    source = Path(__file__).read_text(encoding="utf-8") + script
    command = [sys.executable, "-c", source, str(folder), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_writer_killed_at_any_instant_leaves_whole_blocks_or_none(tmp_path: Path) -> None:
    moment = random.Random(1)
    seen = 0
    orphans = 0
    for seed in range(50):
        with process(WRITE_FOR_EVER, tmp_path, seed) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            # Where in a write this falls is left to chance: that is the test.
            time.sleep(moment.uniform(0, 0.04))
            writer.send_signal(signal.SIGKILL)
        orphans += len(list((tmp_path / "staging").iterdir()))
        tier = open_tier(tmp_path, 4_000_000)
        assert list((tmp_path / "staging").iterdir()) == []
        verdicts = dict(tier.verify())
        assert set(verdicts.values()) <= {"ok"}
        for entry in tier.heads():
            (found,) = tier.read([entry.id])
            assert isinstance(found, Block)
            assert is_right(found)
            seen += 1
        assert tier.stats().used_bytes <= 4_000_000
    assert seen > 50
    assert orphans > 0, "no kill fell into a write: the test tests nothing"


def test_files_being_written_by_the_living_are_left_alone(tmp_path: Path) -> None:
    folder, written = BlockFolder(tmp_path), block(1)
    with folder.staged(written.head.id, SEALER.seal(written), 0.0) as publish:
        assert BlockFolder(tmp_path).remove_orphans() == 0
        publish()
    (tmp_path / "staging" / "left.by-the-dead").write_bytes(b"half")
    tier = open_tier(tmp_path)
    assert list((tmp_path / "staging").iterdir()) == []
    assert list(tier.read([written.head.id])) == [written]


def test_a_thousand_damaged_blocks_are_all_caught(tmp_path: Path) -> None:
    tier, harm = open_tier(tmp_path), random.Random(7)
    blocks = [block(number) for number in range(1000)]
    assert tier.write(blocks) == [None] * 1000
    for written in blocks:
        path = tmp_path / f"{written.head.id.hex()}.kv"
        envelope = bytearray(path.read_bytes())
        match harm.randrange(4):
            case 0:
                envelope[harm.randrange(len(envelope))] ^= 1 << harm.randrange(8)
            case 1:
                del envelope[harm.randrange(len(envelope)) :]
            case 2:
                at = harm.randrange(len(envelope))
                envelope[at : at + 512] = bytes(len(envelope[at : at + 512]))  # as a power cut leaves it
                envelope[-1] ^= 1  # zeros may have stood there before
            case _:
                other = block(harm.randrange(1000, 2000))
                envelope[:] = b"".join(SEALER.seal(other))
        path.write_bytes(envelope)
    restarted = open_tier(tmp_path)
    assert all(verdict in REFUSED_BY_CHECK for _, verdict in restarted.verify())
    for reader in (tier, restarted):
        for written in blocks:
            (found,) = reader.read([written.head.id])
            assert isinstance(found, Refused)
            assert found.cause in REFUSED_BY_CHECK or found.cause == "absent"
    assert sum(tier.stats().misses.values()) == 1000
    assert tier.stats().evicted["quarantined"] == 1000
    assert list(tmp_path.glob("*.kv")) == []
    assert len(list((tmp_path / "quarantine").iterdir())) == QUARANTINE_FILES
    assert tier.write(blocks[:2]) == [None, None], "what was damaged is written anew"
    assert list(tier.read([b.head.id for b in blocks[:2]])) == blocks[:2]


def test_files_that_change_places_are_refused(tmp_path: Path) -> None:
    tier, one, two = open_tier(tmp_path), block(1), block(2)
    tier.write([one, two])
    first, second = (tmp_path / f"{b.head.id.hex()}.kv" for b in (one, two))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    for swapped in (one, two):
        (found,) = tier.read([swapped.head.id])
        assert isinstance(found, Refused)
        assert found.cause == "id"
    assert {path.suffix for path in (tmp_path / "quarantine").iterdir()} == {".id"}


def test_two_processes_evict_and_write_one_folder(tmp_path: Path) -> None:
    crowd = [process(CROWD, tmp_path, seed) for seed in range(2)]
    largest_bytes = 0
    while any(one.poll() is None for one in crowd):
        # Staged files are in flight: at most one of each process.
        sizes = [size_of(path) for path in tmp_path.glob("*.kv")]
        largest_bytes = max(largest_bytes, sum(sizes))
        time.sleep(0.005)
    for one in crowd:
        out, err = one.communicate()
        assert one.returncode == 0, err
        assert int(out.split()[0]) > 10, out
    # The listing above is no snapshot: a file may be counted that was gone before another came.
    assert 0 < largest_bytes <= 2_000_000 + 3 * 200_000
    tier = open_tier(tmp_path, 2_000_000)
    assert tier.stats().used_bytes <= 2_000_000
    assert set(dict(tier.verify()).values()) == {"ok"}


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_evicts_then_refuses_and_leaves_nothing_half(small_disk: Path) -> None:
    clock = VirtualClock(1.7e9)
    greedy = False
    with (small_disk / "a log of others").open("wb", buffering=0) as log:

        def fill(_: Sequence[BlockId], cause: str) -> None:
            if greedy:
                log.write(bytes(2**21))  # as much of it as there is room for

        tier = DiskTier(small_disk, capacity_bytes=1 << 30, sealer=SEALER, clock=clock, on_departure=fill)
        for number in range(40):
            assert tier.write([block(number, 150_000)]) == [None], "the capacity is larger than the disk"
            clock.advance(1)
        assert is_located(tier, block(39).head.id)
        assert tier.stats().evicted["disk full"] > 0
        # Others take what we free: as evicting does not help, it ends.
        greedy, before = True, tier.stats().blocks
        assert tier.write([block(100 + n, 300_000) for n in range(5)]) == ["full"] * 5
        left = tier.stats().blocks
        assert 0 < left < before
        clock.advance(1)
        assert tier.write([block(100, 300_000)]) == ["full"]
        assert tier.stats().blocks == left
        assert tier.stats().unkept == {"full": 6}
        assert list((small_disk / "staging").iterdir()) == []
        assert set(dict(tier.verify()).values()) == {"ok"}
        greedy = False
        log.truncate(0)
    clock.advance(60)
    assert tier.write([block(200, 150_000)]) == [None], "it recovers"


def test_a_read_only_folder_is_read(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_tier(small_disk).write([block(1)])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with caplog.at_level(logging.WARNING):
        tier = open_tier(small_disk)
        assert is_located(tier, block(1).head.id)
        assert list(tier.read([block(1).head.id])) == [block(1)]
        assert tier.write([block(2), block(3)]) == ["error", "error"]
        assert tier.write([block(1)]) == [None], "what is there is there"
        assert tier.drop([block(1).head.id]) == 0, "what cannot be removed is not said to be"
    assert caplog.text.count("cannot") == 1, "said once a minute"
    assert str(small_disk) in caplog.text


def test_a_folder_that_goes_away_is_misses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = VirtualClock(1.7e9)
    tier = open_tier(tmp_path / "kv", clock=clock)
    tier.write([block(1)])
    (tmp_path / "kv").rename(tmp_path / "gone")
    clock.advance(5)
    assert tier.write([block(2)]) == ["error"]
    assert list(tier.read([block(1).head.id])) == [Refused(block(1).head.id, "absent")]
    assert not is_located(tier, block(1).head.id)
    assert tier.drop_where(lambda _: True, "invalidated") == 0
    (tmp_path / "gone").rename(tmp_path / "kv")
    assert is_located(tier, block(1).head.id)
    assert "turn the disk tier off" in caplog.text


def test_a_process_that_stops_in_its_turn_does_not_stop_others(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    tier.write([block(1)])
    with BlockFolder(tmp_path).exclusive():
        assert tier.write([block(2)]) == ["timeout"]
        assert list(tier.read([block(1).head.id])) == [block(1)]
        assert tier.drop([block(1).head.id]) == 1, "to forget needs no turn"
    assert tier.write([block(2)]) == [None]


def test_threads_read_write_and_drop_at_once(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 300_000)
    failures: list[str] = []
    done = threading.Event()

    def read() -> None:
        number = random.Random(2)
        while not done.is_set():
            wanted = block(number.randrange(40)).head.id
            if is_located(tier, wanted):
                for found in tier.read([wanted]):
                    if not (is_right(found) if isinstance(found, Block) else found.cause == "absent"):
                        failures.append(repr(found))

    def administrate() -> None:
        while not done.is_set():
            tier.drop_where(lambda head: head.id[0] < 8, "invalidated")
            for _, verdict in tier.verify():
                if verdict not in ("ok", "absent"):
                    failures.append(verdict)
            tier.stats()

    threads = [threading.Thread(target=read), threading.Thread(target=administrate)]
    for thread in threads:
        thread.start()
    number = random.Random(3)
    for _ in range(300):
        some = [block(number.randrange(40), number.randrange(1, 30_000)) for _ in range(3)]
        failures.extend(unkept for unkept in tier.write(some) if unkept is not None)
    done.set()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    tier.check_integrity()
    tier.refresh()
    assert tier.stats().used_bytes == sum(map(size_of, tmp_path.glob("*.kv")))

"""Invalidations against a model that knows what really happened when; the log's file against crashes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from stockpot.clock import VirtualClock
from stockpot.kv.block import BlockId, TokenKey, content_hash, token_key
from stockpot.kv.invalidation import (
    EPOCH_STEP,
    Invalidation,
    InvalidationLog,
    Invalidations,
    Kind,
    LogUnavailable,
    News,
    next_epoch,
    next_pending_epoch,
)
from stockpot.kv.invalidation_follower import Follower
from stockpot.kv.invalidation_log import LocalLog
from stockpot.kv.tier import BlockHead

BLOCK = 2
WAIT_S = 30
"""A deadline for what must happen at all, not a measure of how fast."""


def key_of(tokens: Sequence[int]) -> TokenKey:
    return token_key(np.array(tokens, np.int32))


def head_of(
    tokens: Sequence[int] = (1, 2),
    *,
    tenant: str = "",
    tags: frozenset[str] = frozenset(),
    epoch: int = 0,
    fingerprint: str = "weights",
) -> BlockHead:
    """The last block of the sequence of these tokens."""
    start = (len(tokens) - 1) // BLOCK * BLOCK
    return BlockHead(
        id=BlockId(b"i" * 32),
        parent=BlockId(b"p" * 32),
        start=start,
        tokens=key_of(tokens[start:]),
        content=content_hash(key_of(tokens)),
        fingerprint=fingerprint,
        layout="layout",
        tenant=tenant,
        tags=tags,
        epoch=epoch,
    )


def prefix(tokens: Sequence[int], epoch: int = EPOCH_STEP, tenant: str | None = None) -> Invalidation:
    return Invalidation(epoch, "prefix", content_hash(key_of(tokens)).hex(), len(tokens), tenant, id="p")


TENANTS = st.sampled_from(["", "a", "b"])
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
TAGS = st.frozensets(st.sampled_from(["x", "y", "document:d"]))


@st.composite
def subjects(draw: st.DrawFn) -> Invalidation:
    """What may be invalidated, with an epoch to be replaced."""
    kind: Kind = draw(st.sampled_from(["all", "tenant", "tag", "document", "model", "prefix"]))
    tenant = draw(st.none() | TENANTS)
    match kind:
        case "all":
            return Invalidation(1, kind)
        case "tenant":
            return Invalidation(1, kind, draw(TENANTS))
        case "tag":
            return Invalidation(1, kind, draw(st.sampled_from(["x", "z"])), tenant=tenant)
        case "document":
            return Invalidation(1, kind, draw(st.sampled_from(["d", "x"])), tenant=tenant)
        case "model":
            return Invalidation(1, kind, draw(st.sampled_from(["weights", "name", "other"])))
        case "prefix":
            return prefix(draw(TOKENS), 1, tenant)


@dataclass(frozen=True)
class Written:
    """A block, by whom and when it was computed."""

    head: BlockHead
    prompt: TokenKey
    node: int
    time: int


@dataclass
class Node:
    view: Invalidations
    known: dict[str, tuple[Invalidation, int]]
    """Records by id, with the time they were made."""
    to_come: list[tuple[Invalidation, int]]
    undelivered: list[tuple[Invalidation, int]]


class NodesMachine(RuleBasedStateMachine):
    """Two nodes that hear of each other's records late and in any order, may be cut off, and read each
    other's blocks. The clock of the shared log jumps as it likes."""

    max_records = 1000

    def __init__(self) -> None:
        super().__init__()
        self.times = itertools.count()
        self.last = 0
        self.nodes = [
            Node(Invalidations(served_names={"name"}, max_records=self.max_records), {}, [], [])
            for _ in range(2)
        ]
        self.blocks: list[Written] = []

    @rule(node=st.integers(0, 1), tokens=TOKENS, tenant=TENANTS, tags=TAGS)
    def write(self, node: int, tokens: list[int], tenant: str, tags: frozenset[str]) -> None:
        head = head_of(tokens, tenant=tenant, tags=tags, epoch=self.nodes[node].view.latest)
        self.blocks.append(Written(head, key_of(tokens), node, next(self.times)))

    @rule(node=st.integers(0, 1), subject=subjects(), wall_s=st.floats(0, 10))
    def invalidate(self, node: int, subject: Invalidation, wall_s: float) -> None:
        time = next(self.times)
        self.share(node, replace(subject, id=str(time)), time, wall_s)

    @rule(node=st.integers(0, 1), subject=subjects())
    def invalidate_cut_off(self, node: int, subject: Invalidation) -> None:
        time, here = next(self.times), self.nodes[node]
        latest = max([here.view.latest, *(record.epoch for record, _ in here.known.values())])
        record = replace(subject, epoch=next_pending_epoch(latest), id=str(time))
        assert record.pending
        here.view.add(record)
        here.known[record.id] = record, time
        here.undelivered.append((record, time))

    @rule(node=st.integers(0, 1), wall_s=st.floats(0, 10))
    def reconnect(self, node: int, wall_s: float) -> None:
        here = self.nodes[node]
        for record, time in here.undelivered:
            self.share(node, record, time, wall_s)
        here.undelivered.clear()

    @rule(node=st.integers(0, 1), which=st.integers(0, 9))
    @precondition(lambda self: any(node.to_come for node in self.nodes))
    def hear(self, node: int, which: int) -> None:
        here = self.nodes[node]
        if here.to_come:
            record, time = here.to_come.pop(which % len(here.to_come))
            here.view.add(record)
            here.known[record.id] = record, time

    @rule(node=st.integers(0, 1))
    def read(self, node: int) -> None:
        here = self.nodes[node]
        for block in self.blocks:
            foreign = block.node != node
            found = here.view.stale(block.head, block.prompt, foreign=foreign)
            matching = [
                (record, time)
                for record, time in here.known.values()
                if record.matches(block.head, block.prompt, served_names={"name"})
            ]
            if any(time > block.time for _, time in matching):
                assert found is not None
            if block.head.epoch < here.view.forgotten_before:
                assert found is not None
            elif found is not None:
                assert any(
                    record.epoch > block.head.epoch or (record.pending and foreign) for record, _ in matching
                )
                assert found.matches(block.head, block.prompt, served_names={"name"})

    def share(self, node: int, record: Invalidation, time: int, wall_s: float) -> None:
        self.last = next_epoch(max(self.last, self.nodes[node].view.latest), wall_s)
        record = replace(record, epoch=self.last)
        for each in self.nodes:
            each.to_come.append((record, time))
        self.hear_own(node)

    def hear_own(self, node: int) -> None:
        here = self.nodes[node]
        record, time = here.to_come.pop()
        here.view.add(record)
        here.known[record.id] = record, time


class ForgetfulMachine(NodesMachine):
    max_records = 3


TestNodes = NodesMachine.TestCase
TestForgetful = ForgetfulMachine.TestCase


def test_a_prefix_reaches_every_block_behind_its_end_and_none_before() -> None:
    record = prefix([1, 2, 3])
    view = Invalidations()
    assert view.add(record)
    whole = key_of([1, 2, 3, 4, 5])
    assert view.stale(head_of([1, 2]), whole) is None
    assert view.stale(head_of([1, 2, 3, 4]), whole) == record
    assert view.stale(head_of([1, 2, 3, 4, 5]), whole) == record
    assert view.stale(head_of([1, 2, 4, 4]), key_of([1, 2, 4, 4])) is None
    # Without the prompt only the block that ends there is known to be meant.
    assert view.stale(head_of([1, 2, 3])) == record
    assert view.stale(head_of([1, 2, 3, 4])) is None


def test_a_tenants_prefix_leaves_the_others_alone() -> None:
    view = Invalidations()
    view.add(prefix([1, 2], tenant="a"))
    assert view.stale(head_of([1, 2], tenant="a"), key_of([1, 2])) is not None
    assert view.stale(head_of([1, 2], tenant="b"), key_of([1, 2])) is None


def test_all_makes_what_came_before_needless() -> None:
    view = Invalidations()
    for n in range(1, 6):
        view.add(Invalidation(n * EPOCH_STEP, "tag", str(n)))
    assert view.add(Invalidation(5 * EPOCH_STEP, "all"))
    assert len(view) == 1
    assert not view.add(Invalidation(3 * EPOCH_STEP, "tag", "late"))
    assert view.stale(head_of(epoch=4 * EPOCH_STEP)) is not None
    assert view.stale(head_of(epoch=5 * EPOCH_STEP)) is None


def test_the_view_is_bounded_and_says_what_it_forgot() -> None:
    view = Invalidations(max_records=100)
    for n in range(1, 1001):
        view.add(Invalidation(n * EPOCH_STEP, "tag", str(n)))
        assert len(view) <= 100
    assert 900 * EPOCH_STEP <= view.forgotten_before <= 920 * EPOCH_STEP
    assert view.stale(head_of(epoch=view.forgotten_before)) is None
    assert view.stale(head_of(epoch=view.forgotten_before - 1)) is not None


def test_used_up_pending_epochs_still_invalidate() -> None:
    view, last = Invalidations(), 7 * EPOCH_STEP
    for n in range(2 * EPOCH_STEP):
        last = next_pending_epoch(last)
        assert last < 8 * EPOCH_STEP
        view.add(Invalidation(last, "tag", "x", id=str(n)))
        stamped = head_of(tags=frozenset({"x"}), epoch=view.latest)
        view.add(Invalidation(next_pending_epoch(last), "tag", "x", id="after"))
        assert view.stale(stamped, foreign=False) is not None


@pytest.mark.parametrize(
    ("kind", "value", "tokens", "tenant"),
    [
        ("all", "x", 0, None),
        ("all", "", 0, "a"),
        ("tag", "", 0, None),
        ("prefix", "ab", 0, None),
        ("tag", "x", 3, None),
        ("model", "m", 0, "a"),
        ("tag", "x" * 513, 0, None),
    ],
)
def test_fields_that_do_not_fit_are_refused(kind: Kind, value: str, tokens: int, tenant: str | None) -> None:
    with pytest.raises(ValueError, match=r"epoch|prefix|kind|character"):
        Invalidation(EPOCH_STEP, kind, value, tokens, tenant)


# The log in a file


def texts(news: News) -> list[str]:
    return [record.value for record in news.records]


def test_processes_see_each_others_records(tmp_path: Path) -> None:
    one, two = LocalLog(tmp_path / "log"), LocalLog(tmp_path / "log")
    first, second = one.append("tag", "1"), two.append("tag", "2", by="me", reason="why")
    assert first.epoch < second.epoch
    assert one.since(0).records == two.since(0).records == (first, second)
    assert one.since(1).records == (second,)
    assert one.since(2) == News((), 2)
    one.close()
    two.close()


def test_epochs_rise_when_the_clock_goes_back(tmp_path: Path) -> None:
    clock = VirtualClock(1000.0)
    log = LocalLog(tmp_path / "log", clock=clock)
    first = log.append("all")
    clock.now_s = 10.0
    second = log.append("all")
    assert first.epoch == 1_000_000 * EPOCH_STEP
    assert second.epoch == first.epoch + EPOCH_STEP
    log.close()
    again = LocalLog(tmp_path / "log", clock=clock)
    assert again.append("all").epoch > second.epoch
    again.close()


@given(cut_bytes=st.integers(1, 60))
def test_a_torn_line_is_cut_off_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, cut_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "log"
    log = LocalLog(path)
    log.append("tag", "1")
    log.append("tag", "torn")
    log.close()
    path.write_bytes(path.read_bytes()[:-cut_bytes])
    for value in ("2", "3"):
        log = LocalLog(path)
        log.append("tag", value)
        log.close()
    log = LocalLog(path)
    news = log.since(0)
    assert texts(news) == ["1", "2", "3"]
    assert news.complete
    log.close()


@pytest.mark.parametrize("alone", [True, False])
def test_a_damaged_line_makes_everything_older_stale(tmp_path: Path, alone: bool) -> None:
    path = tmp_path / "log"
    log = LocalLog(path, alone=alone)
    records = [log.append("tag", value) for value in ("1", "2", "3")]
    log.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    log = LocalLog(path, alone=alone)
    view = Invalidations()
    assert not log.since(0).complete
    assert view.forget(log.since(0).forgotten_before)
    assert view.stale(head_of(epoch=records[1].epoch - 1)) is not None
    assert view.stale(head_of(epoch=view.latest)) is None
    log.close()
    # The file was written anew: reading it again loses nothing more.
    again = LocalLog(path, alone=alone)
    assert again.since(0).forgotten_before == view.forgotten_before
    assert {"1", "3"} >= set(texts(again.since(0)))
    again.close()


def test_a_large_file_is_written_anew_while_others_read_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    one = LocalLog(path, max_file_bytes=5000)
    two = LocalLog(path, max_file_bytes=5000)
    read: list[str] = []
    position = 0
    for n in range(300):
        one.append("tag", f"tag {n % 7}", reason=str(n))
        if n % 10 == 0:
            news = two.since(position)
            position = news.position
            read += [record.reason for record in news.records]
    read += [record.reason for record in two.since(position).records]
    # Whoever was late may be spared what was said again later.
    assert {str(n) for n in range(293, 300)} <= set(read)
    assert two.since(0).complete
    assert path.stat().st_size < 12_000
    one.close()
    two.close()
    fresh = LocalLog(path)
    latest = {record.value: record.reason for record in fresh.since(0).records}
    assert latest == {f"tag {n % 7}": str(n) for n in range(293, 300)}
    fresh.close()


def test_a_log_is_bounded(tmp_path: Path) -> None:
    log = LocalLog(tmp_path / "log", max_records=20, max_file_bytes=8000)
    records = [log.append("tag", str(n)) for n in range(1200)]
    log.close()
    fresh = LocalLog(tmp_path / "log", max_records=20)
    news = fresh.since(0)
    assert len(news.records) < 1100
    missing = {record.epoch for record in records} - {record.epoch for record in news.records}
    assert news.forgotten_before == max(missing)
    fresh.close()


def test_what_cannot_be_written_holds_and_is_written_later(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.mkdir()  # a folder in its place: opening it to write fails, even for root
    log = LocalLog(path)
    log.append("tag", "1")
    assert texts(log.since(0)) == ["1"]
    path.rmdir()
    log.append("tag", "2")
    log.close()
    fresh = LocalLog(path)
    assert texts(fresh.since(0)) == ["1", "2"]
    fresh.close()


def test_a_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LocalLog(path)
    log.append("tag", "1")
    path.unlink()
    log.append("tag", "2")
    log.close()
    fresh = LocalLog(path)
    assert texts(fresh.since(0)) == ["1", "2"]
    fresh.close()


def test_pending_records_are_settled_by_id(tmp_path: Path) -> None:
    log = LocalLog(tmp_path / "log", alone=False)
    log.append("tag", "x")
    record = log.append("tag", "x")
    assert log.pending() == (record,), "of two about the same the later is enough"
    shared = replace(record, epoch=next_epoch(record.epoch, 0))
    log.keep([shared], shared_position="a:1")
    log.keep([shared], shared_position="a:1")
    log.close()
    fresh = LocalLog(tmp_path / "log", alone=False)
    news = fresh.since(0)
    assert fresh.pending() == ()
    assert fresh.shared_position == "a:1"
    assert [each.epoch for each in news.records].count(shared.epoch) == 1
    view = Invalidations()
    for each in news.records:
        view.add(each)
    # Computed by another node after the shared record: nothing pending speaks against it any more.
    assert view.stale(head_of(tags=frozenset({"x"}), epoch=shared.epoch)) is None
    fresh.close()


def test_too_many_pending_records_become_one_that_covers_them(tmp_path: Path) -> None:
    log = LocalLog(tmp_path / "log", alone=False)
    for n in range(1001):
        log.append("tag", str(n))
    assert [record.kind for record in log.pending()] == ["all"]
    log.close()


APPENDER = """
import sys
from pathlib import Path
from stockpot.kv.invalidation_log import LocalLog
log = LocalLog(Path(sys.argv[1]), max_file_bytes=int(sys.argv[3]))
print("ready", flush=True)
sys.stdin.readline()
for n in range(100):
    print(log.append("tag", f"{sys.argv[2]} {n}").epoch)
log.close()
"""


@pytest.mark.parametrize("max_file_bytes", [2**20, 10_000])
def test_processes_append_at_once(tmp_path: Path, max_file_bytes: int) -> None:
    path = tmp_path / "log"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDER, str(path), name, str(max_file_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    epochs: list[list[int]] = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        epochs.append([int(line) for line in out.split()])
    assert all(own == sorted(own) for own in epochs)
    log = LocalLog(path)
    records = log.since(0).records
    assert {record.value for record in records} == {
        f"{who} {n}" for who in ("one", "two") for n in range(100)
    }
    assert [record.epoch for record in records] == sorted({*epochs[0], *epochs[1]})
    assert len(records) == 200
    log.close()


# The follower


class Told:
    """What a store was told, and a way to wait for it."""

    def __init__(self) -> None:
        self.records: list[Invalidation] = []
        self.gaps = 0
        self._changed = threading.Condition()

    def on_records(self, records: Sequence[Invalidation]) -> None:
        with self._changed:
            self.records += records
            self._changed.notify_all()

    def on_gap(self) -> None:
        with self._changed:
            self.gaps += 1
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S)


def test_followers_of_one_file(tmp_path: Path) -> None:
    logs = [LocalLog(tmp_path / "log") for _ in range(2)]
    told = [Told(), Told()]
    views = [Invalidations(), Invalidations()]
    followers = [
        Follower(log, view, on_records=each.on_records, on_gap=each.on_gap, poll_s=0.05)
        for log, view, each in zip(logs, views, told, strict=True)
    ]
    followers[0].append("tag", "before the start")
    for follower in followers:
        follower.start()
        follower.start()
        assert follower.wait_caught_up(WAIT_S)
    record = followers[0].append("tag", "x")
    assert not record.pending
    assert views[0].latest == record.epoch, "in force when append returns"
    for each in told:
        each.wait(lambda each=each: record in each.records)
        assert each.gaps == 0
    assert views[1].latest == record.epoch
    for follower in followers:
        assert follower.connected
        follower.close()
        follower.close()
    for log in logs:
        log.close()


class FailingLog(LocalLog):
    """A log whose shared part does not answer until it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, alone=False)
        self.failing = True

    def sync(self) -> None:
        if self.failing:
            raise LogUnavailable("Not yet.")


def test_a_follower_goes_on_locally_and_says_that_it_is_cut_off(tmp_path: Path) -> None:
    log = FailingLog(tmp_path / "log")
    told, view = Told(), Invalidations()

    def broken(records: Sequence[Invalidation]) -> None:
        told.on_records(records)
        raise RuntimeError("a store that cannot drop blocks must not stop the follower")

    follower = Follower(log, view, on_records=broken, on_gap=told.on_gap, poll_s=0.01)
    follower.start()
    record = follower.append("all")
    assert record.pending
    told.wait(lambda: record in told.records)
    assert not follower.connected
    assert not follower.wait_caught_up(0)
    log.failing = False
    assert follower.wait_caught_up(WAIT_S)
    assert follower.connected
    follower.close()
    log.close()


def test_every_log_can_be_appended_to_and_read(tmp_path: Path) -> None:
    log: InvalidationLog = LocalLog(tmp_path / "log")
    with pytest.raises(ValueError, match="kind tag"):
        log.append("tag", "")
    assert log.since(0).records == ()
    log.close()

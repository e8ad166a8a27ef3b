"""Nodes that share invalidations through a real Redis: together, away, cut off, lied to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.kv.test_invalidation import WAIT_S, Told, head_of
from tests.redis_server import RedisServer

from stockpot.errors import ConfigurationError
from stockpot.kv.invalidation import EPOCH_STEP, Invalidation, Invalidations, LogUnavailable
from stockpot.kv.invalidation_follower import Follower
from stockpot.kv.invalidation_log import LocalLog
from stockpot.kv.invalidation_redis import RedisLog, SharedLog
from stockpot.kv.redis_connection import RedisOptions

SECRET = b"a secret of all nodes"


@dataclass
class Node:
    """A node with a cache folder of its own."""

    log: SharedLog
    remote: RedisLog
    view: Invalidations
    told: Told
    follower: Follower

    def stop(self) -> None:
        self.follower.close()
        self.log.close()

    def wait_for(self, record: Invalidation) -> None:
        self.told.wait(lambda: any(each.id == record.id and not each.pending for each in self.told.records))


MakeNode = Callable[..., Node]


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[MakeNode]:
    made: list[Node] = []

    def make(
        server: RedisServer,
        name: str,
        *,
        secret: bytes = SECRET,
        max_records: int = 10_000,
        poll_s: float = 0.1,
        start: bool = True,
    ) -> Node:
        remote = RedisLog(RedisOptions(server.url), secret=secret, max_records=max_records)
        log = SharedLog(LocalLog(tmp_path / name, alone=False), remote)
        view, told = Invalidations(), Told()
        follower = Follower(log, view, on_records=told.on_records, on_gap=told.on_gap, poll_s=poll_s)
        node = Node(log, remote, view, told, follower)
        made.append(node)
        if start:
            follower.start()
            assert follower.wait_caught_up(WAIT_S)
        return node

    yield make
    for node in made:
        node.stop()


def test_a_record_reaches_the_other_node(redis_server: RedisServer, make_node: MakeNode) -> None:
    one, two = make_node(redis_server, "one"), make_node(redis_server, "two")
    record = one.follower.append("tag", "x", by="admin", reason="wrong")
    assert not record.pending
    two.wait_for(record)
    assert two.told.records == [record]
    assert two.view.stale(head_of(tags=frozenset({"x"}), epoch=record.epoch - 1)) == record
    back = two.follower.append("tenant", "a")
    one.wait_for(back)
    assert back.epoch > record.epoch
    assert one.view.latest == two.view.latest == back.epoch


def test_publishing_alone_is_enough_to_be_heard(redis_server: RedisServer, make_node: MakeNode) -> None:
    """Nobody polls here: the deadline below is shorter than their interval."""
    one = make_node(redis_server, "one", poll_s=1000)
    two = make_node(redis_server, "two", poll_s=1000)
    for _ in range(3):
        two.wait_for(one.follower.append("all"))


def test_a_node_that_was_away_catches_up(redis_server: RedisServer, make_node: MakeNode) -> None:
    one, two = make_node(redis_server, "one"), make_node(redis_server, "two")
    two.wait_for(one.follower.append("tag", "heard"))
    two.stop()
    records = [one.follower.append("tag", str(n)) for n in range(1200)]
    again = make_node(redis_server, "two")
    again.wait_for(records[-1])
    assert [each for each in again.told.records if each in records] == records
    assert again.told.gaps == 0
    assert again.view.stale(head_of(tags=frozenset({"7"}), epoch=records[0].epoch)) == records[7]


def test_a_node_that_was_away_for_too_long_trusts_nothing_older(
    redis_server: RedisServer, make_node: MakeNode
) -> None:
    one = make_node(redis_server, "one", max_records=10)
    two = make_node(redis_server, "two", max_records=10)
    two.wait_for(one.follower.append("tag", "heard"))
    two.stop()
    records = [one.follower.append("tag", str(n)) for n in range(30)]
    again = make_node(redis_server, "two", max_records=10)
    again.told.wait(lambda: again.told.gaps == 1)
    # Invalidated by a record that is nowhere any more.
    assert again.view.stale(head_of(tags=frozenset({"3"}), epoch=records[2].epoch)) is not None
    assert again.view.stale(head_of(epoch=again.view.latest)) is None
    again.stop()
    third = make_node(redis_server, "two", max_records=10)
    assert third.view.stale(head_of(tags=frozenset({"3"}), epoch=records[2].epoch)) is not None
    assert third.told.gaps == 0, "known since the last time"


def test_a_redis_restarted_empty_gets_everything_back(own_redis: RedisServer, make_node: MakeNode) -> None:
    one, two = make_node(own_redis, "one"), make_node(own_redis, "two")
    heard = one.follower.append("tag", "heard")
    two.wait_for(heard)
    two.stop()
    missed = one.follower.append("tag", "missed")
    one.follower.close()
    own_redis.restart_empty()
    # The one that was away comes first, and invalidates: the other one's record gets in later, though older.
    again = make_node(own_redis, "two")
    later = again.follower.append("tag", "later")
    assert later.epoch > heard.epoch
    back = make_node(own_redis, "one")
    again.wait_for(missed)
    back.wait_for(later)
    assert again.told.gaps == back.told.gaps == 0
    assert again.view.stale(head_of(tags=frozenset({"missed"}), epoch=heard.epoch)) == missed


def test_nodes_notice_that_redis_was_emptied_under_them(
    redis_server: RedisServer, make_node: MakeNode
) -> None:
    one, two = make_node(redis_server, "one"), make_node(redis_server, "two")
    two.wait_for(one.follower.append("tag", "1"))
    redis_server.ask(b"FLUSHALL")
    record = one.follower.append("tag", "2")
    two.wait_for(record)
    fresh = make_node(redis_server, "fresh")
    fresh.told.wait(lambda: {each.value for each in fresh.told.records} == {"1", "2"})


def test_a_redis_that_went_back_in_time_is_read_again(redis_server: RedisServer, make_node: MakeNode) -> None:
    one, two = make_node(redis_server, "one"), make_node(redis_server, "two")
    for n in range(5):
        two.wait_for(one.follower.append("tag", str(n)))
    one.stop()
    two.stop()
    redis_server.ask(b"HSET", b"stockpot:i:facts", b"sequence", b"2")
    for key in (b"stockpot:i:order", b"stockpot:i:records"):
        redis_server.ask(b"DEL", key)
    again = make_node(redis_server, "one")
    fresh = make_node(redis_server, "fresh")
    fresh.told.wait(lambda: {each.value for each in fresh.told.records} == {str(n) for n in range(5)})
    assert again.told.gaps == 0


def test_without_redis_a_record_is_pending_and_delivered_later(
    own_redis: RedisServer, make_node: MakeNode
) -> None:
    one, two = make_node(own_redis, "one"), make_node(own_redis, "two")
    two.wait_for(one.follower.append("tag", "before"))
    own_redis.stop()
    record = one.follower.append("tag", "x")
    assert record.pending
    block = head_of(tags=frozenset({"x"}), epoch=record.epoch - 1)
    assert one.view.stale(block) == record
    # Computed here afterwards it may be served here; of another node's block nobody can tell.
    after = head_of(tags=frozenset({"x"}), epoch=one.view.latest)
    assert one.view.stale(after, foreign=False) is None
    assert one.view.stale(after) == record
    # Even across a restart without Redis.
    one.stop()
    alone = make_node(own_redis, "one", start=False)
    alone.follower.start()
    assert alone.view.stale(block) == record
    assert not alone.follower.connected
    assert alone.log.pending() == (record,)
    own_redis.start()
    two.wait_for(record)
    alone.wait_for(record)
    assert alone.log.pending() == ()
    shared = two.told.records[-1]
    assert shared.epoch > record.epoch
    assert alone.view.stale(replace(after, epoch=shared.epoch)) is None
    assert alone.follower.connected


def test_a_paused_redis_delays_nothing_for_long(own_redis: RedisServer, make_node: MakeNode) -> None:
    node = make_node(own_redis, "one")
    own_redis.pause()
    try:
        assert node.follower.append("tag", "x").pending
        node.stop()
    finally:
        own_redis.resume()
    other = make_node(own_redis, "two")
    again = make_node(own_redis, "one")
    other.told.wait(lambda: any(each.value == "x" for each in other.told.records))
    assert again.log.pending() == ()


def test_forged_records_are_counted_and_ignored(redis_server: RedisServer, make_node: MakeNode) -> None:
    node = make_node(redis_server, "one", start=False)
    genuine = node.log.append("tag", "genuine")
    liar = make_node(redis_server, "liar", secret=b"another secret", start=False)
    liar.log.append("all")
    order, records = b"stockpot:i:order", b"stockpot:i:records"
    stored = redis_server.ask(b"HVALS", records)
    assert isinstance(stored, list)
    payload = next(each for each in stored if isinstance(each, bytes) and b"genuine" in each)
    later = payload.replace(str(genuine.epoch).encode(), str(genuine.epoch + EPOCH_STEP).encode())
    for forgery in (later, payload[:-9], b"", b"9 9", b"x" * 20_000):
        number = redis_server.ask(b"HINCRBY", b"stockpot:i:facts", b"sequence", b"1")
        assert isinstance(number, int)
        redis_server.ask(b"HSET", records, b"%d" % number, forgery)
        redis_server.ask(b"ZADD", order, b"%d" % number, b"%d" % number)
    # One that jumps the queue is not believed to be there.
    redis_server.ask(b"ZADD", order, b"1000", b"1000")
    honest = make_node(redis_server, "two")
    honest.wait_for(genuine)
    assert honest.told.records == [genuine]
    assert honest.remote.forged == 6
    assert honest.view.latest == genuine.epoch


def test_a_forged_clock_cannot_use_up_the_epochs(redis_server: RedisServer, make_node: MakeNode) -> None:
    node = make_node(redis_server, "one")
    before = node.follower.append("all")
    for word in (b"9" * 300, b"nan", b"-inf", b"text", b"4503599627370496"):
        redis_server.ask(b"HSET", b"stockpot:i:facts", b"epoch", word)
        after = node.follower.append("all")
        assert not after.pending
        assert before.epoch < after.epoch < before.epoch + 3_600_000 * EPOCH_STEP
        before = after


def test_a_redis_that_answers_nonsense_is_a_redis_that_is_down(
    redis_server: RedisServer, make_node: MakeNode
) -> None:
    node = make_node(redis_server, "one")
    redis_server.ask(b"DEL", b"stockpot:i:facts")
    redis_server.ask(b"SET", b"stockpot:i:facts", b"not a hash")
    record = node.follower.append("all")
    assert record.pending
    with pytest.raises(LogUnavailable, match="WRONGTYPE"):
        node.log.sync()
    redis_server.ask(b"DEL", b"stockpot:i:facts")
    node.wait_for(record)


def test_a_shared_log_needs_a_secret() -> None:
    with pytest.raises(ConfigurationError, match="secret"):
        RedisLog(RedisOptions(), secret=b"")

"""What a failing Redis costs: misses with the right cause, never an exception, and soon no time at all."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.kv.conftest import MakeTier, chain, wanted
from tests.redis_server import RedisServer, SlowProxy, end

from stockpot.kv.breaker import BreakerLimits
from stockpot.kv.redis_connection import RedisOptions
from stockpot.kv.redis_tier import RedisTier
from stockpot.kv.tier import Block, Refused

QUICK = BreakerLimits(failures_in_row=3, first_open_s=0.05, longest_open_s=0.2)
NEVER = BreakerLimits(failures_in_row=1_000_000, window=1_000_000)
WAIT_S = 0.05
"""The tier's own timeout in tests in which the server does not answer in time."""
LONG_S = 30.0


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def misses(tier: RedisTier, blocks: list[Block]) -> tuple[str, str]:
    """All three calls; the causes given by read and write. Locate must find nothing."""
    assert tier.locate(wanted(blocks)) == []
    (refused,) = tier.read([each.head.id for each in blocks])
    assert isinstance(refused, Refused)
    assert tier.drop([blocks[0].head.id]) == 0
    (unkept, *_) = tier.write(blocks)
    return refused.cause, str(unkept)


def serves(tier: RedisTier, blocks: list[Block]) -> bool:
    """Write, if need be, and read."""
    return set(tier.write(blocks)) <= {None, "claimed"} and (
        list(tier.read([each.head.id for each in blocks])) == blocks
    )


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[SlowProxy]:
    made = SlowProxy(redis_server.port)
    yield made
    made.close()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URL of something that takes connections and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    end(listener)


def test_stopped_and_started_again(own_redis: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(own_redis, breaker=QUICK)
    blocks = chain(2)
    assert serves(tier, blocks)
    own_redis.stop()
    assert misses(tier, blocks) == ("error", "down")  # locate, read and drop were three failures
    assert misses(tier, blocks) == ("down", "down")
    assert tier.stats().state in ("open", "half-open")
    own_redis.start()
    eventually(lambda: tier.stats().state == "up")
    assert serves(tier, blocks)
    assert set(tier.stats().misses) == {"error", "down"}
    assert tier.stats().unkept["down"] == 4


def test_restarted_empty_without_a_call_between(own_redis: RedisServer, make_tier: MakeTier) -> None:
    """Stale connections are made anew without a failure being seen."""
    tier = make_tier(own_redis)
    blocks = chain(2)
    assert serves(tier, blocks)
    own_redis.restart_empty()
    assert tier.locate(wanted(blocks)) == []
    assert serves(tier, blocks)
    assert tier.stats().misses == {"absent": 1}
    assert tier.stats().state == "up"


def test_paused(own_redis: RedisServer, make_tier: MakeTier) -> None:
    blocks = chain(2)
    make_tier(own_redis).write(blocks)
    tier = make_tier(own_redis, timeout_s=WAIT_S, breaker=QUICK)
    eventually(lambda: len(tier.locate(wanted(blocks))) == 2)
    own_redis.pause()
    try:
        assert misses(tier, blocks)[0] in ("timeout", "down")
        eventually(lambda: tier.stats().state == "open")
        assert tier.locate(wanted(blocks)) == []
        assert tier.stats().misses["timeout"] >= 1
        # It stays open while probes fail, and no caller makes one.
        time.sleep(3 * QUICK.longest_open_s)
        assert tier.stats().state != "up"
    finally:
        own_redis.resume()
    eventually(lambda: tier.stats().state == "up")
    eventually(lambda: len(tier.locate(wanted(blocks))) == 2)


def test_paused_in_the_middle_of_a_read(own_redis: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(own_redis, timeout_s=1.0, max_in_flight_bytes=2**20, breaker=NEVER)
    blocks = chain(4, size_bytes=900_000)
    assert tier.write(blocks) == [None] * 4
    outcomes: list[Block | Refused] = []
    for outcome in tier.read([each.head.id for each in blocks]):
        outcomes.append(outcome)
        own_redis.pause()
    own_redis.resume()
    assert outcomes[0] == blocks[0]
    last = outcomes[-1]
    assert isinstance(last, Refused)
    assert (last.id, last.cause) == (blocks[len(outcomes) - 1].head.id, "timeout")
    assert serves(tier, blocks)


def test_a_black_hole_costs_a_few_timeouts_and_then_nothing(black_hole: str, make_tier: MakeTier) -> None:
    never_again = BreakerLimits(first_open_s=LONG_S, longest_open_s=LONG_S)
    tier = make_tier(RedisOptions(black_hole), timeout_s=WAIT_S, breaker=never_again)
    blocks = chain(1)
    for _ in range(1000):
        tier.locate(wanted(blocks))
    assert tier.stats().misses == {"timeout": 3, "down": 997}
    assert tier.stats().state == "open"


def test_nobody_there(black_hole: str, make_tier: MakeTier) -> None:
    tier = make_tier(RedisOptions("redis://127.0.0.1:1/0"), breaker=NEVER)
    assert misses(tier, chain(1)) == ("error", "error")


def test_slow_answers_are_misses_and_do_no_harm(
    redis_server: RedisServer, proxy: SlowProxy, make_tier: MakeTier
) -> None:
    blocks = chain(2)
    make_tier(redis_server).write(blocks)
    tier = make_tier(RedisOptions(proxy.url), timeout_s=0.5, breaker=QUICK)
    eventually(lambda: len(tier.locate(wanted(blocks))) == 2)
    proxy.delay_s = 1.5
    assert tier.locate(wanted(blocks)) == []
    assert tier.stats().misses["timeout"] >= 1
    proxy.delay_s = 0.0
    eventually(lambda: len(tier.locate(wanted(blocks))) == 2)
    assert list(tier.read([each.head.id for each in blocks])) == blocks


def test_dripping_bytes_are_progress_and_still_end(
    redis_server: RedisServer, proxy: SlowProxy, make_tier: MakeTier
) -> None:
    """Each wait is short; all together would take half an hour."""
    (block,) = chain(1, size_bytes=200_000)
    make_tier(redis_server).write([block])
    tier = make_tier(RedisOptions(proxy.url), timeout_s=0.5, breaker=NEVER)
    reading = iter(tier.read([block.head.id]))
    proxy.piece_bytes, proxy.delay_s = 64, 0.01
    outcome = next(reading)
    assert isinstance(outcome, Refused)
    assert outcome.cause == "timeout"


def test_a_server_that_takes_no_bytes_ends_a_write(black_hole: str, make_tier: MakeTier) -> None:
    tier = make_tier(RedisOptions(black_hole), timeout_s=WAIT_S, breaker=NEVER)
    assert tier.write(chain(2, size_bytes=10_000_000)) == ["timeout"] * 2


def test_not_redis(make_tier: MakeTier) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        for _ in range(4):
            client, _ = listener.accept()
            with client:
                client.recv(65_536)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    tier = make_tier(RedisOptions(url), breaker=NEVER)
    assert misses(tier, chain(1)) == ("error", "error")
    thread.join()
    listener.close()


@pytest.mark.parametrize(
    "answer", [b"$99999999\r\n", b"*3\r\n$1\r\na\r\n", b"$x\r\n", b"*-1\r\n", b":7\r\n", b"\r\n"]
)
def test_answers_that_make_no_sense(make_tier: MakeTier, answer: bytes) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(65_536)
            client.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    tier = make_tier(RedisOptions(url), breaker=NEVER)
    assert tier.locate(wanted(chain(1))) == []
    assert tier.stats().misses == {"error": 1}
    thread.join()
    listener.close()


def test_wrong_password_says_what_to_do_once_and_no_secret(
    own_redis: RedisServer, make_tier: MakeTier, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.ask(b"CONFIG", b"SET", b"requirepass", b"right")
    caplog.set_level(logging.WARNING)
    for options in (RedisOptions(own_redis.url), RedisOptions(own_redis.url, password="wrong word")):
        tier = make_tier(options, breaker=NEVER)
        for _ in range(3):
            assert misses(tier, chain(1)) == ("error", "error")
    assert len(caplog.records) == 2
    assert "set cache.redis.password" in caplog.text
    assert "check cache.redis.username and password" in caplog.text
    assert "wrong word" not in caplog.text


def test_a_full_server_refuses_writes_and_still_serves(
    own_redis: RedisServer, make_tier: MakeTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier = make_tier(own_redis)
    kept, *late = chain(3, size_bytes=100_000)
    assert serves(tier, [kept])
    own_redis.ask(b"CONFIG", b"SET", b"maxmemory", b"1mb")
    assert tier.write(late) == ["full", "full"]
    assert list(tier.read([kept.head.id])) == [kept]
    assert tier.stats().state == "up"
    assert "maxmemory" in caplog.text
    own_redis.ask(b"CONFIG", b"SET", b"maxmemory", b"0")
    assert serves(tier, late)


def test_full_in_the_middle_of_a_block_leaves_no_half_of_it(
    own_redis: RedisServer, make_tier: MakeTier
) -> None:
    tier = make_tier(own_redis, max_value_bytes=65_536)
    own_redis.ask(b"CONFIG", b"SET", b"maxmemory", b"8mb")
    blocks = chain(12, size_bytes=2_000_000)
    outcomes = tier.write(blocks)
    assert outcomes[0] is None
    assert outcomes[-1] == "full"
    kept = [each for each, outcome in zip(blocks, outcomes, strict=True) if outcome is None]
    assert list(tier.read([each.head.id for each in kept])) == kept
    named = {key.split(b":")[2] for key in own_redis.all_keys("*:b:*")}
    assert named == {each.head.id.hex().encode() for each in kept}


def test_a_replica_refuses_writes(
    own_redis: RedisServer, make_tier: MakeTier, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.ask(b"REPLICAOF", b"127.0.0.1", b"1")
    tier = make_tier(own_redis)
    assert tier.write(chain(2)) == ["error"] * 2
    assert "name the primary" in caplog.text


def test_close_ends_the_probe_and_may_be_repeated(black_hole: str, make_tier: MakeTier) -> None:
    tier = make_tier(RedisOptions(black_hole), timeout_s=WAIT_S, breaker=QUICK)
    for _ in range(4):
        tier.locate(wanted(chain(1)))
    tier.close()
    tier.close()
    assert not [each for each in threading.enumerate() if each.name == "stockpot-redis-probe"]

"""The Redis tier against a real server: what one node writes another reads, and nothing else gets in."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kv.conftest import MakeTier, chain, wanted
from tests.redis_server import RedisServer, make_certificates

from stockpot.clock import SystemClock
from stockpot.errors import ConfigurationError
from stockpot.kv.block import BlockId, aliases, block_id, token_key, tokens_of
from stockpot.kv.redis_connection import RedisOptions, open_client, open_connection
from stockpot.kv.redis_directory import Entry, Keys, decode_entry
from stockpot.kv.redis_writing import cut
from stockpot.kv.resp import RedisFailure
from stockpot.kv.tier import REFUSED_BY_CHECK, Block, Location, Refusal, Refused, Wanted


def causes(outcomes: list[Block | Refused]) -> list[str]:
    return [each.cause if isinstance(each, Refused) else "served" for each in outcomes]


def entry_of(server: RedisServer, block: BlockId) -> Entry:
    entry = decode_entry(server.ask(b"GET", f"stockpot:a:{block.hex()}".encode()), largest_bytes=2**30)
    assert entry is not None
    return entry


def test_what_one_node_writes_another_reads(redis_server: RedisServer, make_tier: MakeTier) -> None:
    one, two = make_tier(redis_server), make_tier(redis_server)
    blocks = chain(8)
    assert one.write(blocks) == [None] * 8
    run = two.locate(wanted(blocks))
    assert [(each.id, each.start, each.tokens) for each in run] == [
        (each.head.id, each.head.start, 256) for each in blocks
    ]
    assert list(two.read([each.id for each in run])) == blocks
    assert two.stats().hits == 8
    assert two.stats().read_bytes == one.stats().written_bytes == sum(each.size_bytes for each in run)
    assert one.stats().blocks == 8
    assert one.stats().used_bytes > 0
    assert two.stats().misses == {}


def test_locate_finds_the_run_up_to_the_first_gap(redis_server: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server)
    blocks = chain(5)
    tier.write([*blocks[:3], blocks[4]])
    assert [each.id for each in tier.locate(wanted(blocks))] == [each.head.id for each in blocks[:3]]
    assert tier.stats().misses == {"absent": 1}
    assert tier.locate([]) == []
    assert list(tier.read([])) == []
    assert tier.write([]) == []


def test_more_places_than_fit_a_call(redis_server: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server)
    blocks = chain(150, tokens=8, size_bytes=10)
    assert tier.write(blocks) == [None] * 150
    assert len(tier.locate(wanted(blocks))) == 150


def test_a_prompt_that_departs_within_a_block_finds_it(
    redis_server: RedisServer, make_tier: MakeTier
) -> None:
    tier = make_tier(redis_server)
    first, second = chain(2)
    tier.write([first, second])
    tokens = tokens_of(second.head.tokens).copy()
    tokens[100:] += 1
    key = token_key(tokens)
    place = Wanted(block_id(first.head.id, key), 256, 256, aliases(first.head.id, key))
    behind = Wanted(BlockId(b"b" * 32), 512, 256)
    run = tier.locate([*wanted([first]), place, behind])
    assert run[1] == Location(second.head.id, 256, 96, run[1].size_bytes)
    assert len(run) == 2


def test_a_tail_is_found_by_what_continues_it_and_not_written_again(
    redis_server: RedisServer, make_tier: MakeTier
) -> None:
    tier = make_tier(redis_server)
    (whole,) = chain(1)
    tokens, alias = whole.head.aliases[4]
    tail = Wanted(alias, 0, tokens, whole.head.aliases[5:])
    tier.write([whole])
    assert [(each.id, each.tokens) for each in tier.locate([tail])] == [(whole.head.id, tokens)]


def test_one_of_many_writers_writes(redis_server: RedisServer, make_tier: MakeTier) -> None:
    (block,) = chain(1, size_bytes=500_000)
    tiers = [make_tier(redis_server) for _ in range(8)]
    start = threading.Barrier(8)
    outcomes: list[str | None] = []

    def write(n: int) -> None:
        start.wait()
        outcomes.extend(tiers[n].write([block]))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(None) == 1
    assert outcomes.count("claimed") == 7
    assert sum(tier.stats().blocks for tier in tiers) == 1
    assert redis_server.all_keys("*:w:*") == []


def test_a_dead_writer_holds_its_claim_for_a_while_only(
    redis_server: RedisServer, make_tier: MakeTier
) -> None:
    tier = make_tier(redis_server)
    (block,) = chain(1)
    claim = f"stockpot:w:{block.head.id.hex()}".encode()
    redis_server.ask(b"SET", claim, b"dead", b"PX", 100)
    assert tier.write([block]) == ["claimed"]
    deadline_s = time.monotonic() + 20
    while tier.write([block]) != [None]:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert tier.stats().unkept["claimed"] >= 1


@pytest.mark.parametrize("size_bytes", [0, 1, 1023, 100_000])
def test_values_are_no_larger_than_asked_for(
    redis_server: RedisServer, make_tier: MakeTier, size_bytes: int
) -> None:
    tier = make_tier(redis_server, max_value_bytes=4096)
    (block,) = chain(1, size_bytes=size_bytes)
    assert tier.write([block]) == [None]
    lengths = [redis_server.ask(b"STRLEN", key) for key in redis_server.all_keys("*:b:*")]
    assert max(each for each in lengths if isinstance(each, int)) <= 4096
    assert (
        sum(each for each in lengths if isinstance(each, int))
        == entry_of(redis_server, block.head.id).size_bytes
    )
    assert list(tier.read([block.head.id])) == [block]


def test_more_than_may_be_in_flight_goes_in_turns(redis_server: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server, max_value_bytes=16_384, max_in_flight_bytes=100_000)
    blocks = chain(12, size_bytes=40_000)
    assert tier.write(blocks) == [None] * 12
    assert list(tier.read([each.head.id for each in blocks])) == blocks
    (too_large,) = chain(1, seed=1, size_bytes=200_000)
    assert tier.write([too_large]) == ["full"]


def test_ttl_is_in_redis_and_promises_extend_it(redis_server: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server, ttl_s=100)
    (block,) = chain(1)
    (promised,) = chain(1, kept_until_s=time.time() + 1000)
    assert promised.head.id == block.head.id

    def ttls_ms(kind: str) -> list[int]:
        found = [redis_server.ask(b"PTTL", key) for key in redis_server.all_keys(f"*:{kind}:*")]
        return [each for each in found if isinstance(each, int)]

    tier.write([block])
    assert len(ttls_ms("a")) == 11
    assert all(90_000 < each <= 100_000 for each in ttls_ms("a"))
    assert all(150_000 < each <= 160_000 for each in ttls_ms("b"))
    assert tier.write([promised]) == ["claimed"]
    assert all(900_000 < each <= 1_000_000 for each in ttls_ms("a"))
    assert all(960_000 < each <= 1_060_000 for each in ttls_ms("b"))
    assert list(tier.read([block.head.id])) == [block]  # never shorter by use
    assert all(each > 900_000 for each in ttls_ms("a"))


def test_use_refreshes_the_ttl(redis_server: RedisServer, make_tier: MakeTier) -> None:
    make_tier(redis_server, ttl_s=50).write(blocks := chain(1))
    list(make_tier(redis_server, ttl_s=1000).read([blocks[0].head.id]))
    for key in redis_server.all_keys():
        left_ms = redis_server.ask(b"PTTL", key)
        assert isinstance(left_ms, int)
        assert left_ms > 900_000


def test_a_thousand_damaged_blocks_are_all_refused(redis_server: RedisServer, make_tier: MakeTier) -> None:
    departed: list[BlockId] = []

    def depart(ids: Sequence[BlockId], cause: str) -> None:
        departed.extend(ids)

    tier = make_tier(
        redis_server,
        max_value_bytes=1024,
        on_departure=depart,
    )
    blocks = [chain(1, seed=seed, size_bytes=2000)[0] for seed in range(1000)]
    assert tier.write(blocks) == [None] * 1000
    rng = random.Random(3)
    possible = [damage(redis_server, rng, entry_of(redis_server, each.head.id)) for each in blocks]

    outcomes = causes(list(tier.read([each.head.id for each in blocks])))
    assert all(cause in allowed for cause, allowed in zip(outcomes, possible, strict=True))
    assert tier.stats().misses == Counter(outcomes)
    assert tier.stats().hits == 0
    incomplete = outcomes.count("absent")
    assert tier.stats().evicted == {"quarantined": 1000 - incomplete, "incomplete": incomplete}
    assert departed == [each.head.id for each in blocks]
    assert redis_server.all_keys("*:b:*") == []  # gone for everybody
    assert tier.write(blocks) == [None] * 1000  # and may be written again
    assert list(tier.read([blocks[7].head.id])) == [blocks[7]]


def damage(server: RedisServer, rng: random.Random, entry: Entry) -> set[Refusal]:
    """Change one random value of a block; the causes it may be refused for."""
    key = rng.choice(Keys("stockpot").chunks(entry))
    value = server.ask(b"GET", key)
    assert isinstance(value, bytes)
    kind = rng.choice(["flip", "flip", "cut", "grow", "another type", "gone"])
    if kind == "flip":
        at = rng.randrange(len(value))
        server.ask(b"SETRANGE", key, at, bytes([value[at] ^ 1 << rng.randrange(8)]))
        return set(REFUSED_BY_CHECK)
    if kind == "cut":
        server.ask(b"SET", key, value[: rng.randrange(len(value))])
    elif kind == "grow":
        server.ask(b"APPEND", key, b"more")
    else:
        server.ask(b"UNLINK", key)
    if kind == "another type":
        server.ask(b"RPUSH", key, b"item")
    return {"absent"} if kind == "gone" else {"truncated"}


@pytest.mark.parametrize("bit", range(0, 8 * 96, 7))
def test_any_bit_of_the_head_may_flip(redis_server: RedisServer, make_tier: MakeTier, bit: int) -> None:
    tier = make_tier(redis_server)
    (block,) = chain(1, size_bytes=100)
    tier.write([block])
    key = f"stockpot:b:{block.head.id.hex()}:0".encode()
    whole = redis_server.ask(b"GET", key)
    assert isinstance(whole, bytes)
    byte = bytes([whole[bit // 8] ^ 1 << bit % 8])
    redis_server.ask(b"SETRANGE", key, bit // 8, byte)
    assert causes(list(tier.read([block.head.id])))[0] in {"mac", "version", "truncated", "cipher"}
    assert tier.stats().evicted == {"quarantined": 1}


def test_a_block_of_somebody_without_the_secret_is_refused(
    redis_server: RedisServer, make_tier: MakeTier
) -> None:
    blocks = chain(1)
    make_tier(redis_server, secret=b"another secret, also long").write(blocks)
    tier = make_tier(redis_server)
    assert causes(list(tier.read([blocks[0].head.id]))) == ["mac"]
    assert tier.locate(wanted(blocks)) == []


def test_a_block_under_the_name_of_another_is_refused(redis_server: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server)
    (one,), (other,) = chain(1, seed=1), chain(1, seed=2)
    tier.write([one, other])
    stolen = redis_server.ask(b"GET", f"stockpot:b:{one.head.id.hex()}:0".encode())
    assert isinstance(stolen, bytes)
    redis_server.ask(b"SET", f"stockpot:b:{other.head.id.hex()}:0".encode(), stolen)
    assert causes(list(tier.read([other.head.id]))) == ["id"]


@pytest.mark.parametrize(
    ("ours", "cause"), [({"fingerprint": "new"}, "model"), ({"layout": "new"}, "layout")]
)
def test_blocks_of_other_weights_or_layouts_are_refused(
    redis_server: RedisServer, make_tier: MakeTier, ours: dict[str, str], cause: str
) -> None:
    (block,) = chain(1)
    make_tier(redis_server).write([block])
    assert causes(list(make_tier(redis_server, **ours).read([block.head.id]))) == [cause]


@given(data=st.binary(max_size=80))
def test_a_directory_entry_of_any_bytes_is_none_or_sound(data: bytes) -> None:
    entry = decode_entry(data, largest_bytes=10_000)
    assert entry is None or 1 <= entry.size_bytes <= 10_000


@pytest.mark.parametrize(
    "forged",
    [
        Entry(BlockId(b"x" * 32), 0, 256, 2**40, 1),
        Entry(BlockId(b"x" * 32), 0, 256, 100, 2**31),
        Entry(BlockId(b"x" * 32), -1, 256, 100, 1),
        Entry(BlockId(b"x" * 32), 0, 0, 100, 1),
        Entry(BlockId(b"x" * 31), 0, 256, 100, 1),
        Entry(BlockId(b"x" * 32), 0, 256, 4, 3),
    ],
)
def test_forged_directory_entries_lead_nowhere_and_do_not_stop_a_writer(
    redis_server: RedisServer, make_tier: MakeTier, forged: Entry
) -> None:
    tier = make_tier(redis_server)
    (block,) = chain(1)
    key = f"stockpot:a:{block.head.id.hex()}".encode()
    redis_server.ask(b"SET", key, forged.encode())
    assert tier.locate(wanted([block])) == []
    assert causes(list(tier.read([block.head.id]))) == ["absent"]
    assert tier.write([block]) == [None]
    assert list(tier.read([block.head.id])) == [block]


def test_an_alias_to_a_block_that_is_gone_is_not_followed_twice(
    redis_server: RedisServer, make_tier: MakeTier
) -> None:
    tier = make_tier(redis_server)
    (block,) = chain(1)
    tokens, alias = block.head.aliases[0]
    tier.write([block])
    assert tier.drop([block.head.id, alias, BlockId(b"n" * 32)]) == 1
    assert redis_server.all_keys("*:b:*") == []
    place = Wanted(alias, 0, tokens)
    (found,) = tier.locate([place])
    assert causes(list(tier.read([found.id]))) == ["absent"]
    assert tier.locate([place]) == []
    assert tier.write([block]) == [None]
    assert [each.id for each in tier.locate([place])] == [block.head.id]


def test_what_cannot_be_enumerated_is_not_dropped(redis_server: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server)
    tier.write(chain(1))
    assert tier.drop_where(lambda _: True, "invalidated") == 0


def test_reading_may_stop_at_any_block(redis_server: RedisServer, make_tier: MakeTier) -> None:
    tier = make_tier(redis_server)
    blocks = chain(4)
    tier.write(blocks)
    reading = tier.read([each.head.id for each in blocks])
    assert next(iter(reading)) == blocks[0]
    del reading
    assert list(tier.read([each.head.id for each in blocks])) == blocks


def test_a_secret_is_mandatory(make_tier: MakeTier) -> None:
    with pytest.raises(ConfigurationError, match="needs a secret"):
        make_tier(RedisOptions(), secret=None)


def test_password_and_user(tmp_path: Path, redis_folder: Path, make_tier: MakeTier) -> None:
    users = ("--user", "cook", "on", ">p@ss:word", "~stock:*", "+@read", "+@write", "+@connection", "+info")
    server = RedisServer(tmp_path, *users, "--requirepass", "root word")
    server.start()
    try:
        named = RedisOptions(server.url, username="cook", password="p@ss:word", prefix="stock")
        in_url = RedisOptions(f"redis://cook:p%40ss%3Aword@127.0.0.1:{server.port}/0", prefix="stock")
        (block,) = chain(1)
        assert make_tier(named).write([block]) == [None]
        assert list(make_tier(in_url).read([block.head.id])) == [block]
        assert make_tier(RedisOptions(server.url, password="root word")).locate(wanted([block])) == []
        for options in (named, in_url):
            assert "word" not in repr(options) + options.address
    finally:
        server.stop()


def test_unix_socket(tmp_path: Path, redis_folder: Path, make_tier: MakeTier) -> None:
    path = tmp_path / "redis.sock"
    server = RedisServer(tmp_path, "--unixsocket", str(path))
    server.start()
    try:
        (block,) = chain(1)
        tier = make_tier(RedisOptions(f"unix://{path}?db=3"))
        assert tier.write([block]) == [None]
        assert list(tier.read([block.head.id])) == [block]
        assert redis_db_sizes(server) == [0, 12]
    finally:
        server.stop()


def redis_db_sizes(server: RedisServer) -> list[object]:
    """Of the databases 0 and 3."""
    third = RedisOptions(server.url.removesuffix("0") + "3")
    return [server.ask(b"DBSIZE"), server.ask(b"DBSIZE", options=third)]


def test_tls(tmp_path: Path, redis_folder: Path, make_tier: MakeTier) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command here to make a certificate with")
    ca, certificate, key = make_certificates(tmp_path)
    server = RedisServer(
        tmp_path,
        *("--port", "0", "--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(ca)),
    )
    server.arguments = (*server.arguments, "--tls-port", str(server.port))
    url = f"rediss://127.0.0.1:{server.port}/0"
    options = RedisOptions(url, ca_file=ca, cert_file=certificate, key_file=key)

    def answers() -> bool:
        try:
            open_connection(options, clock=SystemClock(), timeout_s=1, connect_timeout_s=1).close()
        except RedisFailure:
            return False
        return True

    try:
        try:
            server.start(answers=answers)
        except AssertionError as error:
            if "Bad directive" in str(error) or "TLS" in str(error):
                pytest.skip("this redis-server was built without TLS")
            raise
        blocks = chain(3, size_bytes=200_000)
        tier = make_tier(options)
        assert tier.write(blocks) == [None] * 3
        assert list(tier.read([each.head.id for each in blocks])) == blocks
        client = open_client(options, timeout_s=10, connect_timeout_s=10)
        with client:
            assert client.dbsize() > 0  # pyright: ignore[reportUnknownMemberType]
        # An authority we do not know is refused, unless we are told not to look.
        assert make_tier(RedisOptions(url, cert_file=certificate, key_file=key)).locate(wanted(blocks)) == []
        blind = RedisOptions(url, cert_file=certificate, key_file=key, verify=False)
        assert len(make_tier(blind).locate(wanted(blocks))) == 3
    finally:
        server.stop()


@pytest.mark.parametrize(
    "url", ["http://host", "redis://host:port", "redis://host/x", "unix://", "redis://user:word@host/zero"]
)
def test_addresses_that_are_none_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"cache\.redis\.url") as caught:
        RedisOptions(url)
    assert "word" not in str(caught.value)


@given(
    buffers=st.lists(st.binary(max_size=20), max_size=6),
    size_bytes=st.integers(1, 25),
)
def test_cutting_loses_nothing(buffers: list[bytes], size_bytes: int) -> None:
    whole = b"".join(buffers)
    pieces = [b"".join(piece) for piece in cut(buffers, size_bytes)]
    assert pieces == [whole[at : at + size_bytes] for at in range(0, len(whole), size_bytes)]

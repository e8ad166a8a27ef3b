"""KV events as others receive them: plain sockets, and vLLM's own structs declared once more to decode."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from stockpot.clock import VirtualClock
from stockpot.errors import ConfigurationError
from stockpot.kv.block import BlockId, TokenKey, block_id, content_hash, root_id, token_key
from stockpot.kv.kv_event_publisher import END_OF_REPLAY, REPLAY_STALL_S, REPLAYS_AT_ONCE, KvEventPublisher
from stockpot.kv.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    KvEventBatch,
    decode,
    encode,
    medium_of,
    removed_events,
    stored_events,
    wire_hash,
)
from stockpot.kv.tier import BlockHead

BLOCK = 4
DEADLINE_S = 20
FIELDS: dict[str, Any] = {"omit_defaults": True, "gc": False, "tag": True}


# The fields and options of vllm/distributed/kv_events.py: another party's decoder.
TheirStored = msgspec.defstruct(
    "BlockStored",
    [
        ("block_hashes", list[bytes | int]),
        ("parent_block_hash", bytes | int | None),
        ("token_ids", list[int]),
        ("block_size", int),
        ("lora_id", int | None),
        ("medium", str | None),
        ("lora_name", str | None),
        ("extra_keys", list[tuple[Any, ...] | None] | None, None),
        ("group_idx", int | None, None),
        ("kv_cache_spec_kind", str | None, None),
        ("kv_cache_spec_sliding_window", int | None, None),
        ("locality", str | None, None),
    ],
    **FIELDS,
)
TheirRemoved = msgspec.defstruct(
    "BlockRemoved",
    [
        ("block_hashes", list[bytes | int]),
        ("medium", str | None),
        ("group_idx", int | None, None),
        ("locality", str | None, None),
    ],
    **FIELDS,
)
TheirCleared = msgspec.defstruct("AllBlocksCleared", [], **FIELDS)
TheirBatch = msgspec.defstruct(
    "KVEventBatch",
    [
        ("ts", float),
        ("events", list[TheirStored | TheirRemoved | TheirCleared]),
        ("data_parallel_rank", int | None, None),
    ],
    array_like=True,
    omit_defaults=True,
    gc=False,
)


def key_of(*tokens: int) -> TokenKey:
    return token_key(np.array(tokens, np.int32))


def chain(*blocks: tuple[int, ...]) -> list[BlockHead]:
    """The heads of a prompt's blocks, first to last."""
    heads: list[BlockHead] = []
    parent, start = root_id(fingerprint="f", layout="l"), 0
    for tokens in blocks:
        key = key_of(*tokens)
        head = BlockHead(block_id(parent, key), parent, start, key, content_hash(key), "f", "l")
        heads.append(head)
        parent, start = head.id, start + len(tokens)
    return heads


def numbered(number: int) -> BlockRemoved:
    return BlockRemoved((number,), "CPU")


def test_bytes_on_the_wire_are_those_of_vllm() -> None:
    first, second = chain((1, 2, 3, 4), (5, 6, 7, 8))
    events: tuple[KvEvent, ...] = (
        *stored_events([first, second], tier="disk", block_tokens=BLOCK),
        *removed_events([first.id], tier="ram"),
        AllBlocksCleared(),
    )
    payload = encode(KvEventBatch(12.5, events, 0))
    ids = [first.id, second.id]
    assert msgspec.msgpack.decode(payload) == [
        12.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": ids,
                "parent_block_hash": None,
                "token_ids": [1, 2, 3, 4, 5, 6, 7, 8],
                "block_size": 4,
                "lora_id": None,
                "medium": "STORAGE",
                "lora_name": None,
                "locality": "LOCAL",
            },
            {"type": "BlockRemoved", "block_hashes": [first.id], "medium": "CPU"},
            {"type": "AllBlocksCleared"},
        ],
        0,
    ]
    theirs: Any = msgspec.msgpack.decode(payload, type=TheirBatch)
    assert theirs.events == [
        TheirStored(ids, None, [1, 2, 3, 4, 5, 6, 7, 8], 4, None, "STORAGE", None, locality="LOCAL"),
        TheirRemoved([first.id], "CPU"),
        TheirCleared(),
    ]
    assert msgspec.msgpack.encode(theirs) == payload


def test_what_vllm_sends_can_be_read() -> None:
    stored: Any = TheirStored(
        [15760518052499183552], None, [1, 2], 2, None, "GPU", None, extra_keys=[None], group_idx=0
    )
    batch = decode(msgspec.msgpack.encode(TheirBatch(1.0, [stored, TheirCleared()], 3)))
    assert batch == KvEventBatch(
        1.0,
        (BlockStored((15760518052499183552,), None, (1, 2), 2, None, "GPU", None), AllBlocksCleared()),
        3,
    )


def test_runs_become_one_event_each_and_short_blocks_none() -> None:
    a = chain((1, 2, 3, 4), (5, 6, 7, 8), (9, 10))
    b = chain((11, 12, 13, 14), (15, 16, 17, 18))
    events = list(stored_events([*a, b[1]], tier="ram", block_tokens=BLOCK))
    assert [event.block_hashes for event in events] == [(a[0].id, a[1].id), (b[1].id,)]
    assert [event.parent_block_hash for event in events] == [None, b[0].id]
    assert all(event.medium == "CPU" and event.locality is None for event in events)
    assert not list(stored_events(a[2:], tier="ram", block_tokens=BLOCK))
    assert not list(removed_events([], tier="ram"))


def test_short_hashes_are_the_low_64_bits() -> None:
    first, second = chain((1, 2, 3, 4), (5, 6, 7, 8))
    (event,) = stored_events([second], tier="redis", block_tokens=BLOCK, short_hashes=True)
    low = [int.from_bytes(head.id, "big") & (2**64 - 1) for head in (first, second)]
    assert (event.parent_block_hash, *event.block_hashes) == tuple(low)
    assert wire_hash(first.id) == first.id
    assert medium_of("redis") == ("STORAGE", "REMOTE")
    assert medium_of("context") == ("GPU", None)


HASHES = st.binary(min_size=32, max_size=32) | st.integers(0, 2**64 - 1)
EVENTS = st.one_of(
    st.builds(
        BlockStored,
        block_hashes=st.lists(HASHES).map(tuple),
        parent_block_hash=st.none() | HASHES,
        token_ids=st.lists(st.integers(0, 2**31 - 1)).map(tuple),
        block_size=st.integers(1, 512),
        lora_id=st.none(),
        medium=st.sampled_from(["GPU", "CPU", "STORAGE", None]),
        lora_name=st.none() | st.text(),
        locality=st.sampled_from(["LOCAL", "REMOTE", None]),
    ),
    st.builds(
        BlockRemoved,
        block_hashes=st.lists(HASHES).map(tuple),
        medium=st.none() | st.text(),
        locality=st.none(),
    ),
    st.just(AllBlocksCleared()),
)


@given(ts=st.floats(0, 2**32), events=st.lists(EVENTS).map(tuple), rank=st.none() | st.integers(0, 9))
def test_every_batch_survives_both_decoders(ts: float, events: tuple[KvEvent, ...], rank: int | None) -> None:
    batch = KvEventBatch(ts, events, rank)
    payload = encode(batch)
    assert decode(payload) == batch
    assert msgspec.msgpack.encode(msgspec.msgpack.decode(payload, type=TheirBatch)) == payload


Sockets = Callable[[int], zmq.Socket[bytes]]


class Consumer:
    """A router's side: subscribes, sees gaps, asks for what it missed. Waits are bounded."""

    def __init__(self, sockets: Sockets, publisher: KvEventPublisher) -> None:
        self.subscription = sockets(zmq.SUB)
        self.subscription.setsockopt_string(zmq.SUBSCRIBE, "kv")
        self.subscription.connect(publisher.endpoint)
        self.requests = sockets(zmq.DEALER)
        assert publisher.replay_endpoint is not None
        self.requests.connect(publisher.replay_endpoint)

    def next(self) -> tuple[int, Any]:
        assert self.subscription.poll(DEADLINE_S * 1000), "no message came"
        topic, sequence, payload = self.subscription.recv_multipart()
        assert topic == b"kv-events"
        return int.from_bytes(sequence, "big"), msgspec.msgpack.decode(payload, type=TheirBatch)

    def pending(self) -> Iterator[tuple[int, Any]]:
        while self.subscription.poll(200):
            yield self.next()

    def replay(self, start: int) -> list[tuple[int, Any]]:
        self.requests.send_multipart([b"", start.to_bytes(8, "big")])
        return self.answer()

    def answer(self) -> list[tuple[int, Any]]:
        """What comes for a request, up to its end."""
        missed: list[tuple[int, Any]] = []
        while True:
            assert self.requests.poll(DEADLINE_S * 1000), "the replay does not end"
            empty, sequence, payload = self.requests.recv_multipart()
            assert empty == b""
            if not payload:
                assert sequence == END_OF_REPLAY == b"\xff" * 8
                return missed
            missed.append((int.from_bytes(sequence, "big"), msgspec.msgpack.decode(payload, type=TheirBatch)))


def numbers(received: list[tuple[int, Any]]) -> list[tuple[int, int]]:
    """(sequence, number) of received batches of `numbered` events."""
    return [(sequence, batch.events[0].block_hashes[0]) for sequence, batch in received]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.005)


@pytest.fixture
def sockets() -> Generator[Sockets]:
    """Opens sockets of a kind, and closes them."""
    context = zmq.Context()
    opened: list[zmq.Socket[bytes]] = []

    def open_one(kind: int) -> zmq.Socket[bytes]:
        one = context.socket(kind)
        one.linger = 0
        opened.append(one)
        return one

    yield open_one
    for one in opened:
        one.close()
    context.term()


Make = Callable[..., KvEventPublisher]


@pytest.fixture
def make() -> Generator[Make]:
    """Makes publishers on free ports, and closes them."""
    made: list[KvEventPublisher] = []

    def publisher(**options: Any) -> KvEventPublisher:
        one = KvEventPublisher(
            "tcp://127.0.0.1:0", replay_endpoint="tcp://127.0.0.1:0", topic="kv-events", **options
        )
        made.append(one)
        return one

    yield publisher
    for one in made:
        one.close()


def connect(sockets: Sockets, publisher: KvEventPublisher) -> Consumer:
    """A consumer whose subscription has arrived: it has had one batch."""
    consumer = Consumer(sockets, publisher)
    wait_for(lambda: (publisher.publish([AllBlocksCleared()]), consumer.subscription.poll(20))[1] != 0)
    list(consumer.pending())
    return consumer


def test_a_subscriber_gets_batches_in_order_and_replays_what_it_missed(sockets: Sockets, make: Make) -> None:
    publisher = make(clock=VirtualClock(1234.5), data_parallel_rank=2)
    publisher.publish([numbered(0)])  # before anybody listens, even before the start
    publisher.start()
    assert not publisher.endpoint.endswith(":0")
    for number in range(1, 50):
        publisher.publish([numbered(number)])
    wait_for(lambda: publisher.stats().published == 50)

    consumer = connect(sockets, publisher)
    base = publisher.stats().published
    for number in range(100, 150):
        publisher.publish([numbered(number), AllBlocksCleared()])
    received = [consumer.next() for _ in range(50)]
    assert numbers(received) == [(base + at, 100 + at) for at in range(50)]
    assert all(batch.ts == 1234.5 and batch.data_parallel_rank == 2 for _, batch in received)
    assert received[0][1].events[1] == TheirCleared()

    missed = consumer.replay(0)
    assert numbers(missed[:50]) == [(number, number) for number in range(50)]
    assert [sequence for sequence, _ in missed] == list(range(base + 50))
    assert numbers(consumer.replay(base + 45)) == numbers(received[45:])
    assert consumer.replay(base + 50) == []
    assert publisher.stats().replayed == base + 50 + 5


def test_a_req_client_gets_the_first_batch_it_missed(sockets: Sockets, make: Make) -> None:
    """As vLLM's example asks. REQ takes one answer a request, whatever else is sent."""
    publisher = make()
    publisher.start()
    for number in range(3):
        publisher.publish([numbered(number)])
    wait_for(lambda: publisher.stats().published == 3)
    assert publisher.replay_endpoint is not None
    for wanted, answer in ((0, 0), (2, 2), (3, None)):
        client = sockets(zmq.REQ)
        client.connect(publisher.replay_endpoint)
        client.send(wanted.to_bytes(8, "big"))
        assert client.poll(DEADLINE_S * 1000)
        sequence, payload = client.recv_multipart()
        if answer is None:
            assert (sequence, payload) == (END_OF_REPLAY, b"")
        else:
            assert (int.from_bytes(sequence, "big"), decode(payload).events) == (answer, (numbered(answer),))


def test_a_full_queue_drops_the_oldest_and_shows_it_as_a_gap(
    sockets: Sockets, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = make(queue_batches=10)
    for number in range(25):  # nobody takes them yet
        publisher.publish([numbered(number)])
    publisher.start()
    wait_for(lambda: publisher.stats().published == 10)
    assert numbers(Consumer(sockets, publisher).replay(0)) == [(number, number) for number in range(15, 25)]
    assert publisher.stats().dropped == 15
    assert "KV events were dropped, 15 batches since the start; the last: the queue was full" in caplog.text


def test_a_batch_is_made_on_the_publishers_thread_and_a_bad_one_leaves_a_gap(
    sockets: Sockets, make: Make
) -> None:
    def failing() -> Iterator[KvEvent]:
        yield numbered(1)
        raise ValueError("tokens that are none")

    publisher = make()
    publisher.publish(failing())
    publisher.publish([])  # nothing to tell: takes no number
    publisher.publish(stored_events(chain((1, 2)), tier="ram", block_tokens=BLOCK))
    publisher.publish(stored_events(chain((1, 2, 3, 4)), tier="ram", block_tokens=BLOCK))
    publisher.start()
    wait_for(lambda: publisher.stats().published == 1)
    ((sequence, batch),) = Consumer(sockets, publisher).replay(0)
    assert (sequence, batch.events[0].token_ids) == (1, [1, 2, 3, 4])
    assert publisher.stats().dropped == 1


def test_the_replay_buffer_is_bounded_in_batches_and_bytes(sockets: Sockets, make: Make) -> None:
    few = make(buffer_steps=5)
    small = make(buffer_bytes=300)
    for publisher in (few, small):
        publisher.start()
        for number in range(100):
            publisher.publish([numbered(number)])
        wait_for(lambda publisher=publisher: publisher.stats().published == 100)
    assert numbers(Consumer(sockets, few).replay(0)) == [(number, number) for number in range(95, 100)]
    assert small.stats().kept_bytes <= 300
    kept = numbers(Consumer(sockets, small).replay(3))
    assert 0 < len(kept) < 10
    assert kept[-1] == (99, 99)


def test_clients_that_stop_reading_their_replay_are_given_up(sockets: Sockets, make: Make) -> None:
    clock = VirtualClock()
    publisher = make(clock=clock)
    publisher.start()
    wide = tuple(range(2_000))
    for _ in range(2_500):  # more than what the pipes and the kernel take in for a client
        publisher.publish([BlockRemoved(wide, "CPU")])
    wait_for(lambda: publisher.stats().published == 2_500)
    assert publisher.replay_endpoint is not None
    for _ in range(REPLAYS_AT_ONCE):
        idle = sockets(zmq.DEALER)
        idle.setsockopt(zmq.RCVHWM, 10)
        idle.setsockopt(zmq.RCVBUF, 4096)
        idle.connect(publisher.replay_endpoint)
        idle.send_multipart([b"", bytes(8)])

    def stands_still() -> bool:
        before = publisher.stats().replayed
        time.sleep(0.2)
        return before == publisher.stats().replayed > 0

    wait_for(stands_still)
    consumer = Consumer(sockets, publisher)
    consumer.requests.send_multipart([b"", (2_499).to_bytes(8, "big")])
    assert not consumer.requests.poll(200), "all places are taken"
    clock.advance(REPLAY_STALL_S + 1)
    # The request from before is answered now; asked anew, its answers would mix with those of the next.
    assert [sequence for sequence, _ in consumer.answer()] == [2_499]
    assert [sequence for sequence, _ in consumer.replay(0)] == list(range(2_500))


def test_requests_that_mean_nothing_are_passed_over(sockets: Sockets, make: Make) -> None:
    publisher = make()
    publisher.start()
    consumer = Consumer(sockets, publisher)
    for frames in ([b"", b"short"], [bytes(8)], [b"", bytes(8), b"more"], [b"x", bytes(8)]):
        consumer.requests.send_multipart(frames)
    publisher.publish([numbered(7)])
    wait_for(lambda: publisher.stats().published == 1)
    assert numbers(consumer.replay(0)) == [(0, 7)]
    assert publisher.stats().refused_requests == 4


def test_a_subscriber_that_does_not_read_loses_messages_and_finds_out(sockets: Sockets, make: Make) -> None:
    total = 20_000
    publisher = make(hwm=10, buffer_steps=total * 2, queue_batches=total * 2)
    publisher.start()
    slow = Consumer(sockets, publisher)
    slow.subscription.close(linger=0)
    slow.subscription = sockets(zmq.SUB)
    slow.subscription.setsockopt(zmq.RCVHWM, 10)
    slow.subscription.setsockopt(zmq.RCVBUF, 4096)
    slow.subscription.setsockopt_string(zmq.SUBSCRIBE, "kv")
    slow.subscription.connect(publisher.endpoint)
    wait_for(lambda: (publisher.publish([AllBlocksCleared()]), slow.subscription.poll(20))[1] != 0)
    wide = tuple(range(500))
    for _ in range(total):
        publisher.publish([BlockRemoved(wide, "CPU")])
    wait_for(lambda: publisher.stats().published >= total)

    seen = [sequence for sequence, _ in slow.pending()]
    assert len(seen) < total
    publisher.publish([numbered(1)])
    after, _ = slow.next()
    assert after > seen[-1] + 1 or any(b > a + 1 for a, b in itertools.pairwise(seen))


def test_with_nobody_listening_publishing_goes_on_and_closing_ends(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    for total in (50_000, *range(100)):  # closing meets the thread at every point of its round
        publisher = make(queue_batches=100)
        publisher.start()
        for number in range(total):
            publisher.publish([numbered(number)])
        publisher.close()
        publisher.close()
        publisher.publish([numbered(0)])  # ignored
        stats = publisher.stats()
        assert stats.published + stats.dropped == total
    assert "still busy" not in caplog.text


def test_closing_sends_what_is_queued(sockets: Sockets, make: Make) -> None:
    publisher = make()
    publisher.start()
    consumer = connect(sockets, publisher)
    for number in range(1_000):
        publisher.publish([numbered(number)])
    publisher.close()
    received = numbers([consumer.next() for _ in range(1_000)])
    assert [number for _, number in received] == list(range(1_000))


def test_one_that_was_never_started_closes(make: Make) -> None:
    publisher = make()
    publisher.publish([numbered(1)])
    publisher.close()
    with pytest.raises(RuntimeError, match="starts once"):
        publisher.start()


def test_an_address_that_is_taken_or_none_is_named(make: Make) -> None:
    first = make()
    first.start()
    for endpoint in (first.endpoint, "tcp://203.0.113.7:5557", "nonsense"):
        second = KvEventPublisher(endpoint)
        with pytest.raises(ConfigurationError, match=endpoint):
            second.start()
        second.close()
    third = KvEventPublisher("tcp://*:0", replay_endpoint=first.endpoint)
    with pytest.raises(ConfigurationError, match=first.endpoint):
        third.start()
    with pytest.raises(ConfigurationError, match="queue_batches=0"):
        KvEventPublisher(queue_batches=0)


def test_the_ids_are_the_stores() -> None:
    """As vLLM's, a hash is that of the parent's and the tokens: readers can follow a chain by them."""
    heads = chain((1, 2, 3, 4), (5, 6, 7, 8))
    (event,) = stored_events(heads, tier="ram", block_tokens=BLOCK)
    assert event.block_hashes[1] == block_id(BlockId(heads[0].id), key_of(5, 6, 7, 8))

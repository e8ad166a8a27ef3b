"""Following a backend's KV events: with our publisher, and with sockets that do what they should not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import zmq

from stockpot.kv.kv_event_publisher import END_OF_REPLAY, KvEventPublisher
from stockpot.kv.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from stockpot.routing.kv_event_follower import KvEventFollower
from stockpot.routing.prefix_index import PrefixIndex, TokenChain

BLOCK = 4
DEADLINE_S = 20.0


def stored(
    first: int, *, parent: int | None = None, medium: str = "GPU", remote: bool = False
) -> BlockStored:
    """The block named `first`, of the tokens from `first` on."""
    tokens = tuple(range(first, first + BLOCK))
    locality = "REMOTE" if remote else None
    return BlockStored((first,), parent, tokens, BLOCK, None, medium, None, locality)


def cached(follower: KvEventFollower, first: int, blocks: int = 1) -> int:
    return follower.index.match(TokenChain(range(first, first + BLOCK * blocks)))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def following(
    endpoint: str, replay: str | None, *, blocks_max: int = 1000
) -> AsyncGenerator[KvEventFollower]:
    index = PrefixIndex(blocks_max)
    follower = KvEventFollower("worker", endpoint, replay, index, replay_silence_s=0.5)
    follower.start()
    try:
        yield follower
    finally:
        await follower.stop()
        index.check_integrity()


def publisher(replay: bool = True, endpoint: str = "tcp://127.0.0.1:0", **more: Any) -> KvEventPublisher:
    made = KvEventPublisher(endpoint, replay_endpoint="tcp://127.0.0.1:0" if replay else None, **more)
    made.start()
    return made


async def heard(follower: KvEventFollower, of: KvEventPublisher, *events: KvEvent) -> None:
    """Publish until the subscription, which takes a while to arrive, has brought something."""
    before = follower.stats().batches
    async with asyncio.timeout(DEADLINE_S):
        while follower.stats().batches == before:
            of.publish(events or (stored(10_000),))
            await asyncio.sleep(0.02)


async def test_the_past_is_learnt_and_the_present_followed() -> None:
    source = publisher()
    try:
        source.publish([stored(0), stored(4, parent=0)])
        async with following(source.endpoint, source.replay_endpoint) as follower:
            await until(lambda: cached(follower, 0, 3) == 8)
            assert follower.live
            await heard(follower, source)
            source.publish([stored(8, parent=4), stored(8, parent=4, medium="CPU"), stored(900, remote=True)])
            await until(lambda: cached(follower, 0, 3) == 12)
            source.publish([BlockRemoved((8,), "GPU"), BlockRemoved((4,), "GPU"), BlockRemoved((77,), "GPU")])
            await until(lambda: cached(follower, 0, 3) == 4)
            assert cached(follower, 900) == 0
            source.publish([AllBlocksCleared()])
            await until(lambda: cached(follower, 0, 3) == 0)
            assert follower.stats().garbage == 0
        assert not follower.live
    finally:
        source.close()


async def test_a_restarted_publisher_is_another_one() -> None:
    first = publisher()
    endpoint = first.endpoint
    async with following(endpoint, None) as follower:
        await heard(follower, first)
        first.publish([stored(0)])
        await until(lambda: cached(follower, 0) == 4)
        first.close()
        second = publisher(endpoint=endpoint)
        try:
            await heard(follower, second, stored(500))
            await until(lambda: cached(follower, 500) == 4)
            assert cached(follower, 0) == 0
        finally:
            second.close()


async def test_bound_of_memory() -> None:
    source = publisher()
    try:
        source.publish([stored(n * BLOCK) for n in range(5000)])
        async with following(source.endpoint, source.replay_endpoint, blocks_max=100) as follower:
            await until(lambda: follower.live)
            assert follower.stats().index.blocks == 100
    finally:
        source.close()


class Server:
    """A publisher by hand: what it sends and what it keeps are as the test says."""

    def __init__(self, *, replay: bool = True) -> None:
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        port = self._pub.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.kept: list[tuple[int, bytes]] = []
        self.asked: list[int] = []
        self._router = self._context.socket(zmq.ROUTER)
        self.replay_endpoint = None
        if replay:
            port = self._router.bind_to_random_port("tcp://127.0.0.1")
            self.replay_endpoint = f"tcp://127.0.0.1:{port}"
        self._serving = asyncio.create_task(self._serve())

    def send(self, number: int, payload: bytes) -> None:
        self._pub.send_multipart((b"kv", number.to_bytes(8, "big"), payload))

    def send_frames(self, *frames: bytes) -> None:
        self._pub.send_multipart(frames)

    async def close(self) -> None:
        self._serving.cancel()
        await asyncio.wait({self._serving})
        self._context.destroy(linger=0)

    async def _serve(self) -> None:
        while True:
            with suppress(zmq.Again):
                client, empty, start = self._router.recv_multipart(zmq.NOBLOCK)
                first = int.from_bytes(start, "big")
                self.asked.append(first)
                for number, payload in self.kept:
                    if number >= first:
                        self._router.send_multipart((client, empty, number.to_bytes(8, "big"), payload))
                self._router.send_multipart((client, empty, END_OF_REPLAY, b""))
            await asyncio.sleep(0.005)


def batch(*events: Any) -> bytes:
    return msgspec.msgpack.encode([time.time(), list(events), 0])


@asynccontextmanager
async def connected(*, replay: bool = True) -> AsyncGenerator[tuple[Server, KvEventFollower]]:
    """A server and a follower that has heard batch 0, which stored block 0."""
    server = Server(replay=replay)
    try:
        first = batch(stored(0))
        async with following(server.endpoint, server.replay_endpoint) as follower:
            async with asyncio.timeout(DEADLINE_S):
                while not follower.stats().batches:
                    server.send(0, first)
                    await asyncio.sleep(0.02)
                # The subscription may have brought it several times.
                server.kept.append((0, first))
            await until(lambda: cached(follower, 0) == 4)
            yield server, follower
    finally:
        await server.close()


async def test_a_gap_is_filled_by_replay() -> None:
    async with connected() as (server, follower):
        missed = [(n, batch(stored(n * BLOCK, parent=(n - 1) * BLOCK))) for n in (1, 2, 3)]
        server.kept += missed
        server.send(3, missed[-1][1])
        await until(lambda: cached(follower, 0, 4) == 16)
        assert follower.stats().recovered == 3
        # What the subscription brings late has been seen.
        cleared = follower.stats().index.cleared
        server.send(4, batch(stored(4 * BLOCK, parent=3 * BLOCK)))
        await until(lambda: cached(follower, 0, 5) == 20)
        assert follower.stats().index.cleared == cleared


async def test_a_gap_that_is_not_kept_any_more_empties_the_index() -> None:
    async with connected() as (server, follower):
        server.kept = [(6, batch(stored(600)))]
        server.send(7, batch(stored(700)))
        await until(lambda: cached(follower, 700) == 4)
        assert (cached(follower, 600), cached(follower, 0)) == (4, 0)


async def test_a_gap_without_replay_empties_the_index() -> None:
    async with connected(replay=False) as (server, follower):
        server.send(7, batch(stored(700)))
        await until(lambda: cached(follower, 700) == 4)
        assert cached(follower, 0) == 0


async def test_a_publisher_that_restarted_unseen_and_is_further_on_is_found_out() -> None:
    async with connected() as (server, follower):
        server.kept = [(0, batch(stored(900))), (1, batch(stored(904, parent=900)))]
        server.send(2, batch(stored(908, parent=904)))
        await until(lambda: cached(follower, 900, 3) == 12)
        assert cached(follower, 0) == 0


async def test_garbage_is_counted_and_survived() -> None:
    async with connected() as (server, follower):
        server.send_frames(b"")
        server.send_frames(b"kv", b"short", batch())
        server.send_frames(b"kv", b"\xff" * 8, batch())
        server.send(2**60, b"\xc1 not msgpack")
        server.send(1, batch({"type": "BlockPraised", "by": "nobody"}, ["AlsoNew", 1], stored(4, parent=0)))
        await until(lambda: cached(follower, 0, 2) == 8)
        stats = follower.stats()
        assert (stats.garbage, stats.unknown) == (4, 2)
        server.send(2, batch({"type": "BlockRemoved", "block_hashes": "all"}))
        await until(lambda: not follower.live)
        assert cached(follower, 0) == 0
        server.send(3, batch(stored(0)))
        await until(lambda: cached(follower, 0) == 4)
        assert follower.live


async def test_other_versions_of_the_format() -> None:
    """Arrays instead of maps, hashes of 32 bytes, fields nobody has heard of."""
    async with connected() as (server, follower):
        one, two = b"\x01" * 32, b"\x02" * 32
        server.send(
            1, batch(["BlockStored", [one], None, [100, 101, 102, 103], BLOCK, None, "GPU", None, [], 0])
        )
        follows = {"block_hashes": [two], "parent_block_hash": one, "token_ids": [104, 105, 106, 107]}
        server.send(2, batch({"type": "BlockStored", **follows, "block_size": BLOCK, "colour": "red"}))
        await until(lambda: cached(follower, 100, 2) == 8)
        server.send(3, batch(["BlockRemoved", [one], "GPU", 0]))
        await until(lambda: cached(follower, 100, 2) == 0)
        server.send(4, batch(["AllBlocksCleared"]))
        await until(lambda: follower.stats().index.blocks == 0)


async def test_an_impossible_address_ends_the_following_and_says_so() -> None:
    async with following("nowhere", None) as follower:
        await asyncio.sleep(0.05)
        assert not follower.live

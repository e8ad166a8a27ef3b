"""Fixtures of the KV tests: a real Redis, and blocks to put into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.redis_server import RedisServer

from stockpot.clock import SystemClock
from stockpot.kv.block import Namespace, aliases, block_id, content_hash, token_key
from stockpot.kv.breaker import BreakerLimits
from stockpot.kv.envelope import Sealer, Sealing
from stockpot.kv.redis_connection import RedisOptions
from stockpot.kv.redis_tier import RedisTier
from stockpot.kv.tier import Block, BlockHead, Wanted

SECRET = b"a secret of at least 16 bytes"

MakeTier = Callable[..., RedisTier]


@pytest.fixture(scope="session")
def redis_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server is not installed; run scripts/bootstrap-debian")
    return tmp_path_factory.mktemp("redis")


@pytest.fixture(scope="session")
def shared_redis(redis_folder: Path) -> Iterator[RedisServer]:
    """One server for all tests that leave it running."""
    server = RedisServer(redis_folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """A running, empty server."""
    shared_redis.ask(b"FLUSHALL")
    return shared_redis


@pytest.fixture
def own_redis(redis_folder: Path, tmp_path: Path) -> Iterator[RedisServer]:
    """A running, empty server that the test may stop, pause and restart."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_tier() -> Iterator[MakeTier]:
    """Makes Redis tiers, each a node of its own; they are closed at the end.

    Waits are generous where a test does not say otherwise: nothing may depend on how busy the machine is.
    """
    made: list[RedisTier] = []

    def make(
        where: RedisServer | RedisOptions,
        *,
        secret: bytes | None = SECRET,
        fingerprint: str = "weights",
        layout: str = "layout",
        ttl_s: int = 600,
        timeout_s: float = 10.0,
        breaker: BreakerLimits | None = None,
        **options: Any,
    ) -> RedisTier:
        tier = RedisTier(
            RedisOptions(where.url) if isinstance(where, RedisServer) else where,
            sealer=Sealer(Sealing(secret), fingerprint=fingerprint, layout=layout),
            clock=SystemClock(),
            node=f"node {len(made)}",
            ttl_s=ttl_s,
            timeout_s=timeout_s,
            connect_timeout_s=timeout_s,
            breaker=breaker,
            **options,
        )
        made.append(tier)
        return tier

    yield make
    for tier in made:
        tier.close()


def chain(
    count: int, *, seed: int = 0, tokens: int = 256, size_bytes: int = 3000, kept_until_s: float = 0.0
) -> list[Block]:
    """The first blocks of a prompt; every seed is another prompt."""
    rng = np.random.default_rng(seed)
    parent = Namespace("weights", "layout").root("")
    blocks: list[Block] = []
    for n in range(count):
        key = token_key(rng.integers(0, 50_000, tokens, dtype=np.int32))
        head = BlockHead(
            id=block_id(parent, key),
            parent=parent,
            start=n * tokens,
            tokens=key,
            content=content_hash(key),
            fingerprint="weights",
            layout="layout",
            created_s=1.0,
            kept_until_s=kept_until_s,
            aliases=aliases(parent, key),
        )
        blocks.append(Block(head, rng.bytes(size_bytes)))
        parent = head.id
    return blocks


def wanted(blocks: list[Block]) -> list[Wanted]:
    """The places of a prompt of just these blocks."""
    return [
        Wanted(each.head.id, each.head.start, len(each.head.tokens) // 4, each.head.aliases)
        for each in blocks
    ]

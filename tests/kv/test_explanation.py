"""Every reason for a miss, produced for real, and named right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kv.conftest import MakeTier
from tests.kv.engine_harness import (
    SECRET,
    JumpingClock,
    Node,
    alone,
    disk_tier,
    fake_driver,
    key_of,
    random_tokens,
)
from tests.redis_server import RedisServer

from stockpot.kv.block import chain
from stockpot.kv.breaker import BreakerLimits
from stockpot.kv.cache import CacheLimits
from stockpot.kv.invalidation import EPOCH_STEP, Invalidation
from stockpot.kv.promises import Labels, Promise

PROMPT = random_tokens(1, 80)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """One with a disk tier."""
    driver = fake_driver()
    node = Node([disk_tier(tmp_path / "kv", driver)], driver=driver)
    yield node
    node.close()


def test_never_seen(node: Node) -> None:
    node.ask("new", PROMPT)
    explained = node.explained("new")
    assert [(gap.start, gap.end, gap.cause) for gap in explained.gaps] == [(0, 79, "never seen")]
    assert explained.found_tokens == 0
    assert explained.prompt_tokens == 80
    assert explained.divergence is None


def test_what_was_found_and_where_it_departs(node: Node) -> None:
    node.ask("earlier", PROMPT)
    ours = [*PROMPT[:43], 33 if PROMPT[43] != 33 else 34, *random_tokens(2, 20)]
    node.ask("later", ours)
    explained = node.explained("later")
    assert [(each.start, each.end, each.tier) for each in explained.found] == [(0, 43, "ram")]
    divergence = explained.divergence
    assert divergence is not None
    assert (divergence.position, divergence.request) == (43, "earlier")
    at = divergence.position - divergence.shown_from
    assert list(divergence.ours[:at]) == list(divergence.theirs[:at]) == PROMPT[divergence.shown_from : 43]
    assert (divergence.ours[at], divergence.theirs[at]) == (ours[43], PROMPT[43])
    assert [(gap.start, gap.end, gap.cause) for gap in explained.gaps] == [(43, len(ours) - 1, "never seen")]


def test_it_departs_from_the_request_that_used_the_branch_last(node: Node) -> None:
    clock = JumpingClock()
    node = Node(clock=clock)
    for name, token in (("one", 40), ("two", 41)):
        node.ask(name, [*PROMPT[:32], *([token] * 16)])
        clock.wall_s += 1
    node.ask("three", [*PROMPT[:32], *([42] * 16)])
    divergence = node.explained("three").divergence
    assert divergence is not None
    assert (divergence.position, divergence.request) == (32, "two")
    node.close()


def test_a_prompt_that_goes_on_does_not_depart(node: Node) -> None:
    node.ask("earlier", PROMPT[:40], 1)
    node.ask("later", PROMPT)
    assert node.explained("later").divergence is None
    assert node.causes("later") == ["never seen"]


def test_evicted_for_room() -> None:
    node = Node(limits=CacheLimits(ram_bytes=1200))
    node.ask("first", PROMPT)
    node.ask("other", random_tokens(2, 80))
    node.ask("again", PROMPT)
    gap = node.explained("again").gaps[0]
    assert gap.cause == "evicted: capacity"
    assert gap.at_s == node.clock.wall()
    node.close()


def test_evicted_under_pressure_and_by_quota() -> None:
    node = Node(limits=CacheLimits(ram_bytes=2**20, quotas={"poor": 1200}))
    node.ask("first", PROMPT)
    node.empty_ram()
    node.ask("again", PROMPT)
    assert node.causes("again") == ["evicted: pressure"]
    poor = Labels(tenant="poor")
    node.ask("poor", PROMPT, labels=poor)
    node.ask("poor other", random_tokens(2, 80), labels=poor)
    node.ask("poor again", PROMPT, labels=poor)
    assert node.causes("poor again")[0] == "evicted: quota"
    node.close()


def test_expired_by_policy() -> None:
    clock = JumpingClock()
    node = Node(clock=clock, limits=CacheLimits(ram_bytes=2**20, policy="ttl", policy_ttl_s=60))
    node.ask("first", PROMPT)
    clock.monotonic_s += 61
    assert node.cache.store.expire() > 0
    node.ask("again", PROMPT)
    assert node.causes("again") == ["expired"]
    node.close()


def test_invalidated_and_by_whom(node: Node) -> None:
    labels = Labels(promises=(Promise(80, 300, frozenset({"news"})),))
    node.ask("first", PROMPT, labels=labels)
    record = Invalidation(EPOCH_STEP, "tag", "news", by="ann")
    node.cache.invalidations.add(record)
    node.core.invalidate([record])
    node.ask("again", PROMPT)
    gap = node.explained("again").gaps[0]
    assert gap.cause == "invalidated"
    assert "news" in gap.detail
    assert "ann" in gap.detail


def test_invalidated_while_only_the_disk_had_it(node: Node) -> None:
    node.ask("first", PROMPT)
    node.empty_ram()
    node.cache.invalidations.add(Invalidation(EPOCH_STEP, "all", by="ann"))
    assert node.ask("again", PROMPT) == alone(PROMPT)
    gap = node.explained("again").gaps[0]
    assert (gap.cause, gap.start) == ("invalidated", 0)
    assert "ann" in gap.detail


def test_another_tenant_has_it(node: Node) -> None:
    node.ask("theirs", PROMPT, labels=Labels(tenant="them"))
    node.ask("ours", PROMPT, labels=Labels(tenant="us"))
    gap = node.explained("ours").gaps[0]
    assert gap.cause == "other scope"
    assert "them" in gap.detail
    assert node.cached("ours") == {}


def test_another_model_has_it(tmp_path: Path) -> None:
    """The model was replaced under the same name; the folder is the same."""
    old = fake_driver(fingerprint="old-weights")
    before = Node([disk_tier(tmp_path, old)], driver=old)
    before.ask("first", PROMPT)
    before.close()
    new = fake_driver(fingerprint="new-weights")
    after = Node([disk_tier(tmp_path, new)], driver=new)
    assert after.ask("again", PROMPT) == alone(PROMPT)
    assert after.cached("again") == {}
    gap = after.explained("again").gaps[0]
    assert gap.cause == "other model"
    assert "old-weights" in gap.detail
    after.close()


def damage(folder: Path, node: Node, place: int) -> None:
    """Flip the last bit of the data of one block of PROMPT."""
    scope = node.cache.store.scope("")
    block = list(chain(scope, key_of(PROMPT), 8))[place]
    path = folder / "kv" / f"{block.id.hex()}.kv"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("place", [0, 4])
def test_refused_by_its_check(node: Node, tmp_path: Path, place: int) -> None:
    node.ask("first", PROMPT)
    node.empty_ram()
    damage(tmp_path, node, place)
    assert node.ask("again", PROMPT) == alone(PROMPT)
    assert sum(node.cached("again").values()) == place * 8
    gap = node.explained("again").gaps[0]
    assert gap.start == place * 8
    assert gap.cause == "refused: mac"
    # It was computed again, and is sound now.
    node.empty_ram()
    node.ask("third", PROMPT)
    assert node.cached("third") == {"disk": 72}


def test_a_tier_that_is_down_or_silent(own_redis: RedisServer, make_tier: MakeTier) -> None:
    breaker = BreakerLimits()
    tier = make_tier(
        own_redis, secret=SECRET, fingerprint="fake-weights", layout="fake/1", timeout_s=0.05, breaker=breaker
    )
    node = Node([tier])
    node.ask("first", PROMPT)
    node.empty_ram()
    own_redis.pause()
    causes: list[str] = []
    for n in range(12):
        assert node.ask(f"{n}", PROMPT) == alone(PROMPT)
        causes.append(node.causes(f"{n}")[0])
        node.empty_ram()
    assert causes[0] == "tier timeout"
    assert set(causes) <= {"tier timeout", "tier down"}
    own_redis.resume()
    node.close()


def test_slower_than_computing(node: Node) -> None:
    node.ask("first", PROMPT)
    node.empty_ram()
    node.cache.slots[0].meter.read(1, 10.0)
    node.ask("again", PROMPT)
    gap = node.explained("again").gaps[0]
    assert gap.cause == "slower than recomputing"
    assert "disk" in gap.detail


def test_explanations_are_bounded_and_found_by_either_id() -> None:
    node = Node(limits=CacheLimits(ram_bytes=2**16, explanations=5))
    for n in range(12):
        task = node.submit(f"{n}", random_tokens(n, 20))
        task.client_request = f"client {n % 7}"
        node.run()
    kept = node.cache.explanations.recent(100)
    assert [each.request for each in kept] == ["11", "10", "9", "8", "7"]
    assert node.cache.explanations.find("0") is None
    for n in range(7, 12):
        found = node.cache.explanations.find(f"client {n % 7}")
        assert found is not None
        assert found.request == f"{n}"
    assert node.cache.explanations.find("client 5") is None
    node.close()

"""Fetching from tiers behind RAM: what comes is right, and nobody waits long for what does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.kv.engine_harness import (
    PATIENCE_S,
    JumpingClock,
    Node,
    alone,
    disk_tier,
    fake_driver,
    key_of,
    random_tokens,
)
from tests.kv.lying_tier import LyingTier

from stockpot.clock import SystemClock
from stockpot.kv.block import BlockId, content_hash
from stockpot.kv.cache import CacheLimits
from stockpot.kv.disk import DiskTier
from stockpot.kv.invalidation import EPOCH_STEP, Invalidation
from stockpot.kv.promises import Labels
from stockpot.kv.tier import Block, Location, Refused, Wanted

PROMPT = random_tokens(1, 100)


class GatedTier(LyingTier):
    """Honest, and slow: waits at `gate` before it hands out blocks."""

    def __init__(self) -> None:
        super().__init__(0, honesty=1.0)
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0
        self.has_read = threading.Event()

    def locate(self, wanted: Sequence[Wanted]) -> list[Location]:
        self.asked += 1
        return super().locate(wanted)

    def read(self, ids: Sequence[BlockId]) -> Iterator[Block | Refused]:
        found = list(super().read(ids))
        self.has_read.set()
        assert self.gate.wait(PATIENCE_S)
        yield from found


@pytest.fixture
def gated() -> GatedTier:
    return GatedTier()


@pytest.fixture
def node(gated: GatedTier) -> Iterator[Node]:
    """A node whose tier has PROMPT, and whose RAM has nothing."""
    node = Node([gated])
    node.ask("first", PROMPT)
    node.empty_ram()
    yield node
    gated.gate.set()
    node.close()


def admit_until(node: Node, event: threading.Event) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not event.wait(0.001):
        node.core.step()
        assert time.monotonic() < deadline_s


def test_what_a_tier_has_is_not_computed(node: Node) -> None:
    before = node.driver.decoded_tokens
    assert node.ask("again", PROMPT) == alone(PROMPT)
    assert node.cached("again") == {"redis": 96}
    assert node.driver.decoded_tokens - before == 4 + 3
    assert node.explained("again").tiers[0].decision == "load"


def test_requests_that_lack_the_same_blocks_ask_once_and_each_gets_what_it_needs(
    node: Node, gated: GatedTier
) -> None:
    """The second prompt is shorter than what is fetched for the first, the third departs from it."""
    prompts = {"long": PROMPT, "short": PROMPT[:43], "other": [*PROMPT[:60], *random_tokens(2, 30)]}
    gated.asked = 0
    for name, prompt in prompts.items():
        node.submit(name, prompt)
    node.run()
    node.core.check_integrity()
    assert gated.asked <= 2  # and once for what follows in the third
    for name, prompt in prompts.items():
        assert node.answer(name) == alone(prompt)
        assert sum(node.cached(name).values()) >= min(len(prompt) - 1, 56) // 8 * 8


def test_what_another_prompt_did_not_ask_for_is_asked_for_then(gated: GatedTier) -> None:
    node = Node([gated])
    for name, seed in (("a", 5), ("b", 6)):
        node.ask(name, PROMPT[:40] + random_tokens(seed, 60))
    node.empty_ram()
    gated.gate.clear()
    for name, seed in (("a again", 5), ("b again", 6)):
        node.submit(name, PROMPT[:40] + random_tokens(seed, 60))
    gated.gate.set()
    node.run()
    for name, seed in (("a again", 5), ("b again", 6)):
        assert node.answer(name) == alone(PROMPT[:40] + random_tokens(seed, 60))
        assert sum(node.cached(name).values()) == 96
    node.close()


def test_others_go_on_while_a_request_waits_for_blocks(node: Node, gated: GatedTier) -> None:
    gated.gate.clear()
    node.submit("waits", PROMPT)
    admit_until(node, gated.has_read)
    assert node.core.stats().fetching == 1
    other = random_tokens(3, 12)  # too short to ask anybody
    node.submit("goes on", other)
    while "goes on" not in node.events or len(node.answer("goes on")) < 4:
        node.core.step()
    assert node.core.stats().fetching == 1
    gated.gate.set()
    node.run()
    assert node.answer("waits") == alone(PROMPT)
    assert node.cached("waits") == {"redis": 96}


def test_a_tier_that_hangs_is_waited_for_within_a_bound_and_named(gated: GatedTier) -> None:
    clock = JumpingClock()
    node = Node([gated], clock=clock)
    node.ask("first", PROMPT)
    node.empty_ram()
    gated.gate.clear()
    gated.has_read.clear()
    node.submit("late", PROMPT)
    admit_until(node, gated.has_read)
    assert "late" not in node.events
    patience_s = node.core.patience_s()
    assert patience_s is not None
    assert patience_s < 1
    clock.monotonic_s += patience_s
    node.run()
    assert node.answer("late") == alone(PROMPT)
    assert node.causes("late")[0] == "tier too slow"
    gated.gate.set()
    node.close()


def test_a_request_that_ends_while_its_blocks_come_leaves_nothing_behind(
    node: Node, gated: GatedTier
) -> None:
    gated.gate.clear()
    task = node.submit("gone", PROMPT)
    admit_until(node, gated.has_read)
    node.core.end(task, "cancelled")
    gated.gate.set()
    node.run()
    node.core.check_integrity()
    assert node.core.stats().ram_pinned_blocks == 0
    assert node.ask("next", PROMPT) == alone(PROMPT)


@pytest.mark.parametrize("everything", [True, False])
def test_what_is_invalidated_on_its_way_does_not_come_into_ram(
    node: Node, gated: GatedTier, everything: bool
) -> None:
    gated.gate.clear()
    node.submit("before", PROMPT)
    admit_until(node, gated.has_read)
    node.submit("joined", PROMPT)
    record = Invalidation(EPOCH_STEP, "all")
    if not everything:
        record = Invalidation(EPOCH_STEP, "prefix", content_hash(key_of(PROMPT[:16])).hex(), tokens=16)
    gated.gate.set()
    deadline_s = time.monotonic() + PATIENCE_S
    while node.core.patience_s() != 0.0:  # it was read, and the check of that moment passed
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    node.cache.invalidations.add(record)
    node.core.invalidate([record])
    node.run()
    for name in ("before", "joined"):
        assert node.answer(name) == alone(PROMPT)
        assert node.cached(name).get("redis", 0) <= (0 if everything else 8)


def test_a_block_that_goes_on_into_an_invalidated_prefix_does_not_come_into_ram(tmp_path: Path) -> None:
    """Its beginning serves a prompt that the invalidation does not speak of."""
    driver = fake_driver()
    node = Node([disk_tier(tmp_path, driver)], driver=driver)
    node.ask("whole", PROMPT[:48], 1)
    node.empty_ram()
    record = Invalidation(EPOCH_STEP, "prefix", content_hash(key_of(PROMPT[:44])).hex(), tokens=44)
    node.cache.invalidations.add(record)
    node.core.invalidate([record])
    departs = [*PROMPT[:42], 33, 33]
    assert node.ask("departs", departs) == alone(departs)
    node.submit("whole again", PROMPT[:48], 1)
    node.run()
    assert sum(node.cached("whole again").values()) <= 44
    node.close()


def test_what_ran_while_something_was_invalidated_is_not_kept_as_younger(tmp_path: Path) -> None:
    """A request that came when the record was known here, and reused RAM before the engine heard of it."""
    driver = fake_driver()
    node = Node([disk_tier(tmp_path, driver)], driver=driver)
    node.ask("first", PROMPT)
    record = Invalidation(EPOCH_STEP, "all")
    node.cache.invalidations.add(record)
    node.submit("between", PROMPT)
    node.core.step()
    assert node.cached("between") == {"ram": 99}
    node.core.invalidate([record])
    node.run()
    assert node.cache.flush(PATIENCE_S)
    assert node.core.stats().ram_blocks == 0
    assert node.ask("after", PROMPT) == alone(PROMPT)
    assert node.cached("after") == {}
    node.close()


def test_after_an_invalidation_fresh_blocks_are_kept_and_found(tmp_path: Path) -> None:
    driver = fake_driver()
    node = Node([disk_tier(tmp_path, driver)], driver=driver)
    node.ask("first", PROMPT)
    record = Invalidation(EPOCH_STEP, "all")
    node.cache.invalidations.add(record)
    node.core.invalidate([record])
    node.ask("second", PROMPT)
    assert node.cached("second") == {}
    node.ask("third", PROMPT)
    assert node.cached("third") == {"ram": 99}
    node.empty_ram()
    node.ask("fourth", PROMPT)
    assert node.cached("fourth") == {"disk": 96}
    node.close()


def test_two_tiers_complete_each_other(tmp_path: Path, gated: GatedTier) -> None:
    driver = fake_driver()
    disk = disk_tier(tmp_path, driver)
    node = Node([disk, gated], driver=driver)
    node.ask("first", PROMPT)
    node.empty_ram()
    ends = sorted(disk.heads(), key=lambda entry: entry.head.start if entry.head else 0)[6:]
    disk.drop([entry.id for entry in ends])
    assert node.ask("again", PROMPT) == alone(PROMPT)
    assert node.cached("again") == {"disk": 48, "redis": 48}
    # What the tier further away had, the nearer one has again.
    assert node.cache.flush(PATIENCE_S)
    assert len(disk.heads()) >= 12
    node.close()


def test_a_slow_tier_is_compared_with_computing(gated: GatedTier) -> None:
    node = Node([gated])
    node.ask("first", PROMPT)
    node.empty_ram()
    node.cache.slots[0].meter.read(1, 10.0)
    assert node.ask("again", PROMPT) == alone(PROMPT)
    assert node.cached("again") == {}
    assert node.causes("again")[0] == "slower than recomputing"
    assert node.explained("again").tiers[0].decision == "recompute"
    node.close()


class NeverTier(LyingTier):
    """Asks take until the test is over."""

    def __init__(self, released: threading.Event) -> None:
        super().__init__(0, honesty=1.0)
        self._released = released

    def locate(self, wanted: Sequence[Wanted]) -> list[Location]:
        self._released.wait(PATIENCE_S)
        return []


def test_many_requests_over_a_tier_that_never_answers_all_end() -> None:
    released = threading.Event()
    node = Node([NeverTier(released)], clock=SystemClock(), limits=CacheLimits(ram_bytes=0))
    prompts = {f"{n}": random_tokens(n, 40) for n in range(100)}
    for name, prompt in prompts.items():
        node.submit(name, prompt)
    node.run()
    for name, prompt in prompts.items():
        assert node.answer(name) == alone(prompt)
    assert {cause for name in prompts for cause in node.causes(name)} <= {"tier too slow", "never seen"}
    released.set()
    node.close()


def test_no_tenant_waits_for_the_blocks_of_another(gated: GatedTier) -> None:
    """They share a beginning; what follows it, and how long it takes to come, is nobody else's business."""
    node = Node([gated])
    shared = PROMPT[:32]
    theirs = [*shared, *random_tokens(8, 60)]
    node.ask("theirs", theirs, labels=Labels(tenant="them", shared_tokens=32))
    node.empty_ram()
    gated.gate.clear()
    node.submit("theirs again", theirs, labels=Labels(tenant="them", shared_tokens=32))
    ours = node.submit("ours", [*shared, 40, 41], labels=Labels(tenant="us", shared_tokens=32))
    fetches = [sequence.fetch for task in node.core.tasks for sequence in task.sequences]
    assert fetches[0] is not fetches[1]
    assert ours.sequences[0].fetch is fetches[1]
    gated.gate.set()
    node.run()
    assert sum(node.cached("ours").values()) == 32
    node.close()


def test_a_disk_of_a_process_that_is_gone_serves_the_next(tmp_path: Path) -> None:
    driver = fake_driver()
    first = Node([disk_tier(tmp_path, driver)], driver=driver)
    first.ask("first", PROMPT)
    first.close()
    tier: DiskTier = disk_tier(tmp_path, driver)
    second = Node([tier])
    assert second.ask("again", PROMPT) == alone(PROMPT)
    assert second.cached("again") == {"disk": 96}
    assert [verdict for _, verdict in tier.verify()] == ["ok"] * len(tier.heads())
    second.close()

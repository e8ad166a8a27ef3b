"""Writing behind: bounded, in order, never in the way; what cannot be written is counted and nothing more."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tests.kv.conftest import chain
from tests.kv.engine_harness import PATIENCE_S, Node, alone, random_tokens
from tests.kv.lying_tier import LyingTier

from stockpot.kv.cache import CacheLimits
from stockpot.kv.tier import Block, Unkept
from stockpot.kv.write_behind import WriteBehind, WriteReport


class SlowTier(LyingTier):
    """Honest, writes nothing before `gate` opens, and fails as often as it is told to."""

    def __init__(self) -> None:
        super().__init__(0, honesty=1.0)
        self.gate = threading.Event()
        self.failures = 0

    def write(self, blocks: Sequence[Block]) -> list[Unkept | None]:
        assert self.gate.wait(PATIENCE_S)
        if self.failures:
            self.failures -= 1
            raise OSError("told to fail")
        return super().write(blocks)


def test_a_slow_tier_drops_what_is_too_much_and_says_so() -> None:
    tier = SlowTier()
    reports: list[WriteReport] = []
    writer = WriteBehind(tier, limit_bytes=10_000, on_written=reports.append)
    blocks = chain(40, size_bytes=1000)
    taken = sum(writer.offer([block]) for block in blocks)
    assert writer.queued_bytes <= 10_000
    # The thread may have taken a batch to write before the queue was full.
    assert 10 <= taken <= 20
    assert sum(report.unkept.get("busy", 0) for report in reports) == 40 - taken
    tier.gate.set()
    assert writer.flush(PATIENCE_S)
    assert len(tier.blocks) == taken
    assert writer.queued_bytes == 0
    writer.close(PATIENCE_S)


def test_what_is_forgotten_after_it_was_offered_is_gone() -> None:
    tier = SlowTier()
    writer = WriteBehind(tier, limit_bytes=2**20)
    blocks = chain(6)
    writer.offer(blocks)
    writer.forget([block.head.id for block in blocks[2:4]])
    writer.offer(blocks[3:4])
    tier.gate.set()
    assert writer.flush(PATIENCE_S)
    assert set(tier.blocks) == {block.head.id for block in (*blocks[:2], *blocks[3:])}
    writer.close(PATIENCE_S)


def test_a_tier_that_raises_loses_its_batch_and_nothing_else() -> None:
    tier = SlowTier()
    tier.failures = 1
    tier.gate.set()
    writer = WriteBehind(tier, limit_bytes=2**20)
    lost, kept = chain(1, seed=1), chain(1, seed=2)
    writer.offer(lost)
    assert writer.flush(PATIENCE_S)
    writer.offer(kept)
    writer.close(PATIENCE_S)
    assert set(tier.blocks) == {kept[0].head.id}


def test_what_is_offered_after_the_close_is_refused() -> None:
    tier = SlowTier()
    tier.gate.set()
    writer = WriteBehind(tier, limit_bytes=2**20)
    writer.offer(chain(3))
    writer.close(PATIENCE_S)
    assert len(tier.blocks) == 3
    assert writer.offer(chain(1, seed=1)) == 0


def test_a_close_does_not_wait_for_a_tier_that_hangs() -> None:
    tier = SlowTier()
    writer = WriteBehind(tier, limit_bytes=2**20)
    writer.offer(chain(3))
    writer.offer(chain(3, seed=1))
    writer.close(0.05)
    assert writer.queued_bytes == 0
    tier.gate.set()


def test_answers_do_not_wait_for_a_tier_that_does_not_write() -> None:
    tier = SlowTier()
    node = Node([tier], limits=CacheLimits(ram_bytes=2**20, write_behind_bytes=4_000))
    prompts = [random_tokens(n, 60) for n in range(20)]
    for n, prompt in enumerate(prompts):
        node.submit(f"{n}", prompt)
        node.run()
        assert node.answer(f"{n}") == alone(prompt)
        assert node.cache.queued_bytes <= 4_000
    tier.gate.set()
    assert node.cache.flush(PATIENCE_S)
    assert 0 < len(tier.blocks) < node.cache.store.blocks
    node.close()

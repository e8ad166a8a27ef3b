"""A core on the fake model with all tiers behind it, for tests of the cache as a whole.

The clock stands still unless a test moves it: no fetch is ever given up because the machine is busy, and
loading always counts as quicker than computing (steps of fewer than 32 tokens leave the meter of prefill at
its first value).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path

import numpy as np

from stockpot.clock import Clock, SystemClock, VirtualClock
from stockpot.engine.core import EngineCore, EngineLimits
from stockpot.engine.driver import ModelFacts
from stockpot.engine.fake_driver import FakeDriver
from stockpot.engine.sampling import Sampler
from stockpot.engine.sequence import Sequence, Task
from stockpot.engine.text_stream import TextStream
from stockpot.events import Completed, Delta, Event, Started
from stockpot.kv.block import Namespace, TokenKey, token_key
from stockpot.kv.cache import CacheLimits, KVCache
from stockpot.kv.disk import DiskTier
from stockpot.kv.envelope import Sealer, Sealing
from stockpot.kv.explanation import Explanation
from stockpot.kv.invalidation import Invalidations
from stockpot.kv.promises import Labels
from stockpot.kv.tier import Tier
from stockpot.requests import Sampling

SECRET = b"a secret of at least 16 bytes"
BLOCK_TOKENS = 8
BATCH_TOKENS = 24
PATIENCE_S = 60.0
"""A deadline for what must happen, however slow the machine."""
GREEDY = Sampling(temperature=0)


class JumpingClock(Clock):
    """Monotonic time stands still until moved; the wall clock may be set to anything."""

    def __init__(self, wall_s: float = 1_700_000_000.0) -> None:
        self.monotonic_s = 0.0
        self.wall_s = wall_s

    def monotonic(self) -> float:
        return self.monotonic_s

    def wall(self) -> float:
        return self.wall_s


def fake_driver(
    *, fingerprint: str = "fake-weights", cells: int = 4096, max_sequences: int = 32
) -> FakeDriver:
    driver = FakeDriver(cells=cells, max_sequences=max_sequences, max_batch_tokens=BATCH_TOKENS)
    driver.facts = replace(driver.facts, fingerprint=fingerprint)
    return driver


def namespace_of(facts: ModelFacts) -> Namespace:
    return Namespace(facts.fingerprint, facts.layout)


def sealer_for(driver: FakeDriver, secret: bytes | None = SECRET) -> Sealer:
    return Sealer(Sealing(secret), fingerprint=driver.facts.fingerprint, layout=driver.facts.layout)


def disk_tier(folder: Path, driver: FakeDriver, *, capacity_bytes: int = 2**24) -> DiskTier:
    return DiskTier(folder, capacity_bytes=capacity_bytes, sealer=sealer_for(driver), clock=SystemClock())


class Node:
    """One engine and its cache. Close it: writers and prefetchers are threads."""

    def __init__(
        self,
        tiers: Items[Tier] = (),
        *,
        driver: FakeDriver | None = None,
        clock: Clock | None = None,
        limits: CacheLimits | None = None,
        invalidations: Invalidations | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.driver = driver or fake_driver()
        self.clock = clock or VirtualClock(1_700_000_000.0)
        limits = limits or CacheLimits(ram_bytes=2**20)
        self.cache = KVCache(
            namespace_of(self.driver.facts),
            replace(limits, block_tokens=block_tokens),
            clock=self.clock,
            tiers=tiers,
            invalidations=invalidations,
        )
        self.events: dict[str, list[Event]] = {}
        self.core = EngineCore(
            self.driver,
            EngineLimits(block_tokens=block_tokens, prefill_tokens_beside_decode=12),
            sink=self._take,
            observers=(),
            clock=self.clock,
            cache=self.cache,
        )

    def submit(
        self,
        name: str,
        prompt: Items[int],
        max_tokens: int = 4,
        *,
        labels: Labels | None = None,
        choices: int = 1,
    ) -> Task:
        task = Task(name, np.array(prompt, np.int32), self.clock.monotonic(), None)
        task.labels = replace(labels or Labels(), request=name)
        vocabulary = self.driver.vocabulary
        for choice in range(choices):
            sampler = Sampler(GREEDY, vocabulary=vocabulary, prompt=task.prompt, seed=0)
            text = TextStream(vocabulary, ())
            task.sequences.append(Sequence(task, choice, max_tokens=max_tokens, sampler=sampler, text=text))
        self.core.submit(task)
        return task

    def run(self) -> None:
        """Step until nobody waits or runs."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.core.tasks:
            if not self.core.step():
                assert time.monotonic() < deadline_s, "requests starve"
                time.sleep(0.0002)
        self.core.flush()

    def ask(
        self, name: str, prompt: Items[int], max_tokens: int = 4, *, labels: Labels | None = None
    ) -> list[int]:
        """One request alone, to its end; its tokens. What it computed is written behind when this returns."""
        self.submit(name, prompt, max_tokens, labels=labels)
        self.run()
        assert self.cache.flush(PATIENCE_S)
        return self.answer(name)

    def answer(self, name: str, choice: int = 0) -> list[int]:
        return [
            token
            for event in self.events[name]
            if isinstance(event, Delta) and event.choice == choice
            for token in event.token_ids
        ]

    def started(self, name: str) -> Started:
        return next(event for event in self.events[name] if isinstance(event, Started))

    def completed(self, name: str) -> Completed:
        return next(event for event in self.events[name] if isinstance(event, Completed))

    def cached(self, name: str) -> dict[str, int]:
        """Tokens that were not computed, by tier; tiers that gave none are left out."""
        return {tier: tokens for tier, tokens in self.started(name).cached_tokens.items() if tokens}

    def explained(self, name: str) -> Explanation:
        found = self.cache.explanations.find(name)
        assert found is not None, f"{name} is not explained"
        return found

    def causes(self, name: str) -> list[str]:
        return [gap.cause for gap in self.explained(name).gaps]

    def empty_ram(self) -> None:
        """Put everything out of RAM, as pressure would: what is behind stays there."""
        store = self.cache.store
        capacity_bytes = store.ram.capacity_bytes
        store.resize(0)
        store.resize(capacity_bytes)

    def close(self) -> None:
        self.cache.close(PATIENCE_S)

    def _take(self, events: list[tuple[Task, Event]]) -> None:
        for task, event in events:
            self.events.setdefault(task.request_id, []).append(event)


def random_tokens(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(33, 126, count)]


def alone(prompt: Items[int], max_tokens: int = 4) -> list[int]:
    """The answer of a lone request on a fresh driver without any cache."""
    driver = FakeDriver()
    events: list[Event] = []
    core = EngineCore(
        driver,
        EngineLimits(cache_enabled=False),
        sink=lambda sent: events.extend(event for _, event in sent),
        observers=(),
        clock=VirtualClock(),
    )
    task = Task("alone", np.array(prompt, np.int32), 0.0, None)
    sampler = Sampler(GREEDY, vocabulary=driver.vocabulary, prompt=task.prompt, seed=0)
    task.sequences.append(
        Sequence(task, 0, max_tokens=max_tokens, sampler=sampler, text=TextStream(driver.vocabulary, ()))
    )
    core.submit(task)
    while core.step():
        pass
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


def key_of(tokens: Items[int]) -> TokenKey:
    return token_key(np.array(tokens, np.int32))

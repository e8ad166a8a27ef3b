"""Metrics of the KV tiers: from reports, from the snapshot, and from a cache that really reads and writes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.telemetry.test_metrics import STATS, samples, value

from stockpot.backends.embedded import EmbeddedBackend
from stockpot.clock import VirtualClock
from stockpot.engine.core import EngineLimits
from stockpot.engine.fake_driver import FakeDriver
from stockpot.engine.reports import ReuseReport, TierFigures
from stockpot.kv.block import Namespace
from stockpot.kv.cache import CacheLimits, CacheObservers
from stockpot.kv.meters import TierSpeed
from stockpot.kv.prefetch import ReadReport
from stockpot.kv.residents import Eviction
from stockpot.kv.service import open_cache
from stockpot.kv.tier import TierStats
from stockpot.kv.write_behind import WriteReport
from stockpot.requests import CompletionRequest, Generation, Sampling
from stockpot.settings import CacheSettings, DiskSettings
from stockpot.telemetry.metrics import Metrics

DISK = TierStats(
    name="disk",
    capacity_bytes=1000,
    used_bytes=600,
    blocks=6,
    hits=9,
    misses={"checksum": 2},
    unkept={"full": 5},
    evicted={"capacity": 3},
    read_bytes=900,
    written_bytes=1100,
)
REDIS = replace(DISK, name="redis", capacity_bytes=None, evicted={}, state="half-open")
TIERED = replace(
    STATS,
    fetching=1,
    prompt_tokens_cached={"context": 25, "ram": 50, "disk": 75, "redis": 25},
    tenant_bytes={"": 24, "kitchen": 1000},
    promised_bytes=512,
    promises_refused=3,
    prefill_s_per_token=0.002,
    write_behind_bytes=64,
    tiers={
        "disk": TierFigures(DISK, TierSpeed(0.0005, 1e9)),
        "redis": TierFigures(REDIS, TierSpeed(0.002, 5e8)),
    },
)
BLOCK_TOKENS = 8
PATIENCE_S = 60.0
"""A deadline for what must happen, however slow the machine."""


def names(metrics: Metrics) -> set[str]:
    return {name for name, _ in samples(metrics)}


def test_a_tier_is_shown_as_its_own_counts_say() -> None:
    metrics = Metrics(lambda: TIERED)
    assert value(metrics, "kv_bytes", tier="disk") == 600
    assert value(metrics, "kv_capacity_bytes", tier="disk") == 1000
    assert value(metrics, "kv_blocks", tier="ram") == 4
    assert value(metrics, "kv_blocks", tier="redis") == 6
    assert value(metrics, "kv_block_hits_total", tier="disk") == 9
    assert value(metrics, "kv_block_misses_total", tier="disk", cause="checksum") == 2
    assert value(metrics, "evicted_blocks_total", tier="disk", cause="capacity") == 3
    assert value(metrics, "kv_read_bytes_total", tier="disk") == 900
    assert value(metrics, "kv_written_bytes_total", tier="redis") == 1100
    assert value(metrics, "kv_latency_seconds", tier="redis") == 0.002
    assert value(metrics, "kv_read_bandwidth_bytes_per_second", tier="disk") == 1e9
    assert value(metrics, "prompt_tokens_total", source="disk") == 75
    assert value(metrics, "requests_by_state", state="fetching") == 1
    assert value(metrics, "kv_promised_bytes") == 512
    assert value(metrics, "kv_promises_refused_total") == 3
    assert value(metrics, "kv_write_behind_bytes") == 64
    assert value(metrics, "prefill_seconds_per_token") == 0.002
    # Where the bound is not known there is none to show.
    assert ("stockpot_kv_capacity_bytes", frozenset({("tier", "redis")})) not in samples(metrics)


def test_a_tier_is_in_one_state() -> None:
    metrics = Metrics(lambda: TIERED)
    for tier, present in (("disk", "up"), ("redis", "half-open")):
        states = {
            state: value(metrics, "kv_tier_state", tier=tier, state=state)
            for state in ("up", "open", "half-open")
        }
        assert states == {"up": 0, "open": 0, "half-open": 0} | {present: 1}


def test_what_leaves_ram_and_is_used_there_is_tallied() -> None:
    metrics = Metrics(lambda: TIERED)
    metrics.observe(Eviction(2, 200, "capacity", ages_s=(10.0, 4000.0), idle_s=(3.0, 100.0)))
    metrics.observe(ReuseReport((0.5, 7.0, 7.0)))
    assert value(metrics, "evicted_blocks_total", tier="ram", cause="capacity") == 2
    assert value(metrics, "evicted_bytes_total", tier="ram", cause="capacity") == 200
    assert value(metrics, "kv_block_lifetime_seconds_sum") == 4010
    assert value(metrics, "kv_block_lifetime_seconds_bucket", le="15.0") == 1
    assert value(metrics, "kv_block_idle_before_eviction_seconds_count") == 2
    assert value(metrics, "kv_block_reuse_gap_seconds_sum") == 14.5
    assert value(metrics, "kv_block_hits_total", tier="ram") == 3


def test_a_block_that_never_came_to_ram_was_not_evicted() -> None:
    metrics = Metrics(lambda: STATS)
    metrics.observe(Eviction(1, 100, "refused_quota"))
    assert value(metrics, "kv_blocks_unkept_total", tier="ram", cause="quota") == 1
    assert "stockpot_evicted_blocks_total" not in names(metrics)


def test_reads_and_writes_behind_ram_are_tallied() -> None:
    metrics = Metrics(lambda: TIERED)
    metrics.observe(ReadReport("disk", 3, 300, locate_s=0.0002, read_s=0.003, refused=None))
    metrics.observe(ReadReport("disk", 0, 0, locate_s=0.0004, read_s=0.0, refused=None))
    metrics.observe(ReadReport("disk", 1, 100, locate_s=0.0002, read_s=0.001, refused="invalidated"))
    metrics.observe(ReadReport("disk", 1, 100, locate_s=0.0002, read_s=0.001, refused="checksum"))
    metrics.observe(ReadReport("redis", 0, 0, locate_s=0.000001, read_s=0.0, refused="down"))
    metrics.observe(WriteReport("disk", 4, 400, {"full": 1}))
    metrics.observe(WriteReport("disk", 0, 0, {"busy": 2}))
    assert value(metrics, "kv_locate_seconds_count", tier="disk") == 4
    assert value(metrics, "kv_read_seconds_count", tier="disk") == 3
    # A tier that was not asked did not answer quickly.
    assert ("stockpot_kv_locate_seconds_count", frozenset({("tier", "redis")})) not in samples(metrics)
    # The tier counts its own refusals; that a block was invalidated only the reader knows.
    assert value(metrics, "kv_block_misses_total", tier="disk", cause="checksum") == 2
    assert value(metrics, "kv_block_misses_total", tier="disk", cause="invalidated") == 1
    # The tier counts what it did not keep, the report that and what it was never given.
    assert value(metrics, "kv_blocks_unkept_total", tier="disk", cause="full") == 1
    assert value(metrics, "kv_blocks_unkept_total", tier="disk", cause="busy") == 2


@given(st.dictionaries(st.text(max_size=5) | st.just("other"), st.integers(0, 1000), max_size=200))
def test_tenants_are_bounded_and_nothing_is_lost(tenant_bytes: dict[str, int]) -> None:
    shown = [
        sample
        for family in Metrics(lambda: replace(STATS, tenant_bytes=tenant_bytes)).collect()
        if family.name == "stockpot_kv_tenant_bytes"
        for sample in family.samples
    ]
    labels = [sample.labels["tenant"] for sample in shown]
    assert len(labels) == len(set(labels)) <= 65
    assert sum(sample.value for sample in shown) == sum(tenant_bytes.values())
    assert set(labels) - set(tenant_bytes) <= {"other"}


@pytest.mark.anyio
async def test_a_cache_at_work_is_seen(tmp_path: Path) -> None:
    """RAM for one prompt, a disk behind it: the first prompt leaves RAM, comes back from disk, and comes back
    no more once its files are damaged."""
    # Time stands still, and no step has the 32 tokens of a measurement: loading always beats computing.
    clock = VirtualClock(1_700_000_000.0)
    driver = FakeDriver(max_batch_tokens=24)
    metrics = Metrics(lambda: backend.engine_stats())  # noqa: PLW0108  backend is made below
    cache = open_cache(
        CacheSettings(yield_memory=False, disk=DiskSettings(path=tmp_path / "kv", capacity_bytes=2**24)),
        Namespace(driver.facts.fingerprint, driver.facts.layout),
        CacheLimits(block_tokens=BLOCK_TOKENS, ram_bytes=12 * (16 + 12 * BLOCK_TOKENS)),
        folder=tmp_path,
        clock=clock,
        observers=CacheObservers(
            evicted=metrics.observe,
            reused=lambda gaps_s: metrics.observe(ReuseReport(tuple(gaps_s))),
            read=metrics.observe,
            written=metrics.observe,
        ),
    )
    backend = EmbeddedBackend(
        driver,
        EngineLimits(block_tokens=BLOCK_TOKENS, prefill_tokens_beside_decode=12),
        served_name="fake",
        observers=[metrics],
        clock=clock,
        cache=cache,
    )

    async def ask(prompt: str) -> None:
        generation = Generation("fake", "r", Sampling(temperature=0), max_tokens=4)
        async for _ in backend.generate(CompletionRequest(generation, prompt)):
            pass
        # A client has its answer before the blocks are in the store; the report of the step comes after both.
        deadline_s = time.monotonic() + PATIENCE_S
        while value(metrics, "step_duration_seconds_count") < value(metrics, "steps_total"):
            assert time.monotonic() < deadline_s, "the engine does not report its last step"
            await asyncio.sleep(0.001)
        assert cache.cache.flush(PATIENCE_S)

    first, second = "a" * 64, "b" * 64
    await backend.start()
    await ask(first)
    await ask(second)
    assert value(metrics, "evicted_blocks_total", tier="ram", cause="capacity") >= 4
    assert value(metrics, "kv_block_lifetime_seconds_count") == value(
        metrics, "evicted_blocks_total", tier="ram", cause="capacity"
    )
    assert value(metrics, "kv_written_bytes_total", tier="disk") > 0
    assert value(metrics, "kv_blocks", tier="disk") >= 16

    await ask(first)
    hits = value(metrics, "kv_block_hits_total", tier="disk")
    assert hits >= 4
    assert value(metrics, "kv_read_seconds_count", tier="disk") == 1
    assert value(metrics, "kv_read_bytes_total", tier="disk") > 0
    assert value(metrics, "prompt_tokens_total", source="disk") >= 4 * BLOCK_TOKENS
    assert value(metrics, "kv_tier_state", tier="disk", state="up") == 1

    for file in (tmp_path / "kv").rglob("*"):
        if file.is_file() and file.stat().st_size > BLOCK_TOKENS * 12:
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    await ask(second)
    assert value(metrics, "kv_block_hits_total", tier="disk") == hits
    refused = {
        labels: count
        for (name, labels), count in samples(metrics).items()
        if name == "stockpot_kv_block_misses_total"
    }
    assert refused == {frozenset({("tier", "disk"), ("cause", "checksum")}): 1}
    assert value(metrics, "evicted_blocks_total", tier="disk", cause="quarantined") == 1
    await backend.stop(drain=True)
    backend.close()

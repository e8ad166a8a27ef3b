"""Metrics: what is reported comes out under its name; labels are bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from stockpot.engine.reports import EngineStats, RefusalReport, RequestReport, StepReport
from stockpot.events import Timings, Usage
from stockpot.kv.residents import Eviction
from stockpot.telemetry.metrics import Metrics
from stockpot.telemetry.tally import Counts, Histogram

STATS = EngineStats(
    running=2,
    waiting=3,
    joining=1,
    preempted=0,
    steps=10,
    cells=1000,
    cells_used=250,
    kv_bytes_per_token=8,
    ram_capacity_bytes=4096,
    ram_used_bytes=1024,
    ram_blocks=4,
    ram_pinned_blocks=1,
    prompt_tokens_computed=25,
    prompt_tokens_cached={"context": 25, "ram": 50},
    tokens_generated=77,
    preemptions=1,
    evicted_blocks={"capacity": 2},
)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by name and labels; the text must parse."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[f"stockpot_{name}", frozenset(labels.items())]


def test_the_snapshot_is_read_at_the_scrape() -> None:
    metrics = Metrics(lambda: STATS)
    assert value(metrics, "kv_cells") == 1000
    assert value(metrics, "kv_cells_used") == 250
    assert value(metrics, "kv_bytes", tier="context") == 2000
    assert value(metrics, "kv_bytes", tier="ram") == 1024
    assert value(metrics, "cache_hit_ratio") == 0.75
    assert value(metrics, "prompt_tokens_total", source="computed") == 25
    assert value(metrics, "prompt_tokens_total", source="ram") == 50
    assert value(metrics, "generation_tokens_total") == 77
    assert value(metrics, "requests_by_state", state="waiting") == 3
    assert value(metrics, "requests_by_state", state="fetching") == 0


def test_reports_are_tallied() -> None:
    metrics = Metrics(lambda: STATS)
    metrics.observe(
        StepReport(
            decode_tokens=3,
            prefill_tokens=60,
            sequences=4,
            duration_s=0.01,
            sample_s=0.0001,
            inter_token_s=(0.01, 0.02, 0.011),
        )
    )
    usage = Usage(100, {"context": 0, "ram": 40}, 7)
    metrics.observe(RequestReport("stop", usage, Timings(0.1, 0.2, 0.5), preemptions=0))
    metrics.observe(RequestReport("cancelled", usage, Timings(0.1, None, 0.5), preemptions=0))
    metrics.observe(RefusalReport("queue_full"))
    metrics.observe(Eviction(3, 300, "capacity"))
    assert value(metrics, "batch_size_count") == 1
    assert value(metrics, "batch_size_sum") == 4
    assert value(metrics, "batch_tokens_total", kind="prefill") == 60
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "queue_time_seconds_count") == 2
    assert value(metrics, "requests_total", outcome="stop") == 1
    assert value(metrics, "requests_cancelled_total") == 1
    assert value(metrics, "requests_refused_total", cause="queue_full") == 1
    assert value(metrics, "evicted_blocks_total", tier="ram", cause="capacity") == 3
    assert value(metrics, "evicted_bytes_total", tier="ram", cause="capacity") == 300
    assert value(metrics, "time_to_first_token_seconds_bucket", le="0.3") == 1
    assert value(metrics, "time_to_first_token_seconds_bucket", le="0.15") == 0


def test_labels_are_bounded() -> None:
    counts = Counts(limit=2)
    for label in ("a", "b", "c", "d", "a"):
        counts.add(label)
    assert dict(counts.totals()) == {("a",): 2, ("b",): 1, ("other",): 2}


def test_two_metrics_do_not_meet() -> None:
    first, second = Metrics(lambda: STATS), Metrics(lambda: STATS)
    first.observe(RefusalReport("queue_full"))
    assert ("stockpot_requests_refused_total", frozenset({("cause", "queue_full")})) not in samples(second)


@given(st.lists(st.floats(min_value=0, max_value=10)))
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    bounds = (0.5, 1.0, 5.0)
    histogram = Histogram(bounds)
    for one in values:
        histogram.observe(one)
    buckets = dict(histogram.buckets())
    assert buckets["+Inf"] == histogram.count == len(values)
    for bound in bounds:
        assert buckets[str(bound)] == sum(one <= bound for one in values)

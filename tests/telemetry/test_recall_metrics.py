"""Metrics of recall: each lookup counts once, what was saved is saved once, and labels are bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.telemetry.gateway_at_work import attempt, record
from tests.telemetry.test_metrics import samples, value

from stockpot.events import Recalled, RecallOutcome
from stockpot.recall.stores.store import StoreStats
from stockpot.telemetry.metrics import Metrics
from stockpot.telemetry.recall_metrics import Audited, RecallFigures, RecallMetrics

EXACT = Recalled("exact", "same_request", "e1", 60.0, None, None, "", 100, 10, 2_000_000, 1.5)
SEMANTIC = Recalled("semantic", "calibrated", "e2", 60.0, 0.97, 0.004, "", 80, 20, 1_000_000, 0.5)


def metrics_of(**changes: Any) -> tuple[RecallMetrics, Metrics]:
    usual: dict[str, Any] = {
        "stored": lambda: StoreStats(0, 0),
        "capacity_bytes": lambda: 1024,
        "unkept": dict,
    }
    seen = RecallMetrics(RecallFigures(**{**usual, **changes}))
    return seen, Metrics(None, more=[seen.families])


def shown(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(text for _, text in sorted(labels)): count
        for (each, labels), count in samples(metrics).items()
        if each == f"stockpot_recall_{name}"
    }


def test_lookups_and_what_they_saved() -> None:
    seen, metrics = metrics_of()
    for each in (
        record(recalled=EXACT, model="m", ttft_s=0.0009),
        record(recalled=SEMANTIC, model="m", ttft_s=0.006),
        record(recalled=SEMANTIC, model="soup", ttft_s=0.006),
        record(attempt(), recalled=Recalled("miss", "not_kept")),
        record(attempt(), recalled=Recalled("miss", "too_little_evidence", would="e1")),
        record(attempt(), recalled=Recalled("bypass", "sampled")),
        record(attempt()),
    ):
        seen.observe_request(each)
    assert shown(metrics, "lookups_total") == {
        ("exact",): 1,
        ("semantic",): 2,
        ("miss",): 2,
        ("bypass",): 1,
    }
    assert shown(metrics, "misses_total") == {("not_kept",): 1, ("too_little_evidence",): 1}
    assert shown(metrics, "bypasses_total") == {("sampled",): 1}
    assert shown(metrics, "shadow_hits_total") == {(): 1}
    assert value(metrics, "recall_saved_tokens_total", model="m", kind="prompt") == 180
    assert value(metrics, "recall_saved_tokens_total", model="m", kind="output") == 30
    assert value(metrics, "recall_saved_usd_total", model="m") == 0.003
    assert value(metrics, "recall_saved_seconds_total", model="soup") == 0.5
    first = "recall_time_to_first_token_seconds_bucket"
    assert value(metrics, first, model="m", outcome="exact", le="0.001") == 1
    assert value(metrics, first, model="m", outcome="semantic", le="0.005") == 0
    assert value(metrics, first, model="m", outcome="semantic", le="0.01") == 1


def test_what_is_now_is_read_at_the_scrape() -> None:
    found = Audited(audited=200, wrong=1, error=0.004, error_upper=0.009)
    _, metrics = metrics_of(
        stored=lambda: StoreStats(7, 900, evicted=3, expired=2, lost=1, reachable=False),
        unkept=lambda: {"truncated": 4},
        audited=lambda: found,
    )
    assert shown(metrics, "entries") == {(): 7}
    assert shown(metrics, "bytes") == {(): 900}
    assert shown(metrics, "capacity_bytes") == {(): 1024}
    assert shown(metrics, "store_up") == {(): 0}
    assert shown(metrics, "entries_gone_total") == {("evicted",): 3, ("expired",): 2, ("lost",): 1}
    assert shown(metrics, "answers_unkept_total") == {("truncated",): 4}
    assert shown(metrics, "audits_total") == {("same",): 199, ("wrong",): 1}
    assert shown(metrics, "error_ratio") == {("estimate",): 0.004, ("upper",): 0.009}


def test_without_evidence_no_error_is_claimed() -> None:
    _, metrics = metrics_of(audited=Audited)
    assert shown(metrics, "error_ratio") == {}
    assert shown(metrics, "audits_total") == {("same",): 0, ("wrong",): 0}
    _, metrics = metrics_of()
    assert shown(metrics, "audits_total") == {}


OUTCOMES: Sequence[RecallOutcome] = ("exact", "semantic", "miss", "bypass")


@given(
    st.lists(
        st.tuples(st.sampled_from(OUTCOMES), st.text(max_size=3), st.text(max_size=3), st.booleans()),
        max_size=300,
    )
)
def test_sums_hold_whatever_comes(lines: list[tuple[RecallOutcome, str, str, bool]]) -> None:
    seen, metrics = metrics_of()
    for outcome, reason, model, shared in lines:
        hit = outcome in ("exact", "semantic")
        recalled = Recalled(outcome, reason, saved_completion_tokens=3 if hit else 0)
        seen.observe_request(record(recalled=recalled, model=model, shared=shared, ttft_s=0.001))
    own = Counter(outcome for outcome, _, _, shared in lines if not shared)
    assert shown(metrics, "lookups_total") == {(outcome,): count for outcome, count in own.items()}
    misses, bypasses = shown(metrics, "misses_total"), shown(metrics, "bypasses_total")
    assert (sum(misses.values()), sum(bypasses.values())) == (own["miss"], own["bypass"])
    hits = own["exact"] + own["semantic"]
    assert sum(shown(metrics, "saved_tokens_total").values()) == 3 * hits
    assert sum(shown(metrics, "time_to_first_token_seconds_count").values()) == hits
    assert len(misses) <= 65 and len(bypasses) <= 65

"""Metrics of the gateway: what records say comes out under its name, and no client can make labels."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.mock_upstream import MockUpstream, Script
from tests.telemetry.gateway_at_work import answer, attempt, gateway, question, record
from tests.telemetry.test_metrics import samples, value

from stockpot.accounts.ledger import LedgerStats
from stockpot.clock import VirtualClock
from stockpot.errors import UnknownModel
from stockpot.events import Recalled
from stockpot.gateway.condition import ConditionReport
from stockpot.records import Cost
from stockpot.telemetry.gateway_metrics import GatewayFigures, GatewayMetrics
from stockpot.telemetry.metrics import Metrics


def report(name: str, **changes: Any) -> ConditionReport:
    usual: dict[str, Any] = {
        "ready": True,
        "reason": "",
        "breaker": "closed",
        "in_flight": 0,
        "limit": 16,
        "ejected": (),
        "resting": (),
        "attempts": 0,
        "failures": {},
    }
    return ConditionReport(name, **{**usual, **changes})


def figures(**changes: Any) -> GatewayFigures:
    usual: dict[str, Any] = {
        "models": lambda: ("m", "soup"),
        "conditions": tuple,
        "waiting": dict,
        "findings": tuple,
        "ledger": None,
    }
    return GatewayFigures(**{**usual, **changes})


def metrics_of(**changes: Any) -> tuple[GatewayMetrics, Metrics]:
    gateway_metrics = GatewayMetrics(figures(**changes), VirtualClock())
    return gateway_metrics, Metrics(None, more=[gateway_metrics.families])


def shown(metrics: Metrics, name: str) -> dict[frozenset[tuple[str, str]], float]:
    return {labels: count for (each, labels), count in samples(metrics).items() if each == f"stockpot_{name}"}


def test_without_an_engine_there_are_no_figures_of_one() -> None:
    _, metrics = metrics_of()
    names = {name for name, _ in samples(metrics)}
    assert not [name for name in names if "_kv_" in name or name.startswith("stockpot_steps")]
    assert "stockpot_time_to_first_token_seconds_count" not in names
    assert "stockpot_build_info" in names


def test_a_request_is_tallied() -> None:
    seen, metrics = metrics_of()
    seen.observe_request(
        record(
            attempt(written_tokens=10),
            cache="partial",
            written_tokens=10,
            ttft_s=0.05,
            tpot_s=0.003,
            queue_s=0.01,
            total_s=0.5,
            notices=("degraded",),
        )
    )
    assert value(metrics, "gateway_requests_total", operation="chat", model="m", backend="a", cause="ok") == 1
    assert value(metrics, "gateway_attempts_total", backend="a", cause="ok") == 1
    tokens = {
        kind: value(metrics, "gateway_tokens_total", model="m", kind=kind)
        for kind in ("fresh", "cached", "written", "output")
    }
    assert tokens == {"fresh": 60, "cached": 40, "written": 10, "output": 5}
    assert value(metrics, "gateway_cost_usd_total", model="m", backend="a") == 0.002
    assert value(metrics, "gateway_cache_outcomes_total", model="m", outcome="partial") == 1
    assert value(metrics, "gateway_notices_total", kind="degraded") == 1
    assert value(metrics, "gateway_time_to_first_token_seconds_sum", model="m") == 0.05
    assert value(metrics, "gateway_time_per_output_token_seconds_count", model="m") == 1
    assert value(metrics, "gateway_queue_seconds_bucket", model="m", le="0.01") == 1
    assert value(metrics, "gateway_request_duration_seconds_sum", model="m") == 0.5


def test_retries_hedges_and_fallbacks_are_told_apart() -> None:
    seen, metrics = metrics_of()
    seen.observe_request(record(attempt(cause="reset"), attempt("b")))
    seen.observe_request(record(attempt(cause="cancelled"), attempt("b", hedge=True)))
    seen.observe_request(
        record(
            attempt(cause="timeout"),
            attempt("c", model="large"),
            model="large",
            notices=("fallback",),
        )
    )
    # A cascade's second model is asked because the answer of the first did not pass, which was no failure.
    seen.observe_request(record(attempt(), attempt("c", model="large"), notices=("cascade",)))
    assert shown(metrics, "gateway_retries_total") == {frozenset({("backend", "b")}): 1}
    assert shown(metrics, "gateway_hedges_total") == {frozenset({("backend", "b")}): 1}
    assert shown(metrics, "gateway_fallbacks_total") == {frozenset({("model", "large")}): 1}


def test_refusals_and_what_has_no_price() -> None:
    seen, metrics = metrics_of()
    seen.observe_request(record(cause="allowance"))
    seen.observe_request(record(attempt(cost=Cost()), shared=True))
    assert value(metrics, "gateway_allowance_refusals_total", team="kitchen") == 1
    assert (
        value(metrics, "gateway_requests_total", operation="chat", model="m", backend="", cause="allowance")
        == 1
    )
    assert value(metrics, "gateway_unpriced_attempts_total", model="m", backend="a") == 1
    assert value(metrics, "gateway_shared_answers_total", model="m") == 1
    assert not shown(metrics, "gateway_cost_usd_total")


def test_a_kept_answer_says_nothing_of_who_generates() -> None:
    seen, metrics = metrics_of()
    hit = record(
        model="m",
        backend="kept",
        recalled=Recalled("exact", saved_nanousd=5),
        cost=Cost(0, "none"),
        ttft_s=0.001,
        tpot_s=0.00001,
        total_s=0.002,
    )
    seen.observe_request(hit)
    seen.observe_request(record(attempt(), recalled=Recalled("miss"), ttft_s=0.3, tpot_s=0.02, total_s=1.0))
    labels = {"operation": "chat", "model": "m", "cause": "ok"}
    assert value(metrics, "gateway_requests_total", backend="kept", **labels) == 1
    # Clients had the first at once; tokens were generated for the second.
    assert value(metrics, "gateway_time_to_first_token_seconds_count", model="m") == 2
    assert value(metrics, "gateway_request_duration_seconds_count", model="m") == 2
    assert value(metrics, "gateway_time_per_output_token_seconds_sum", model="m") == 0.02
    assert shown(metrics, "gateway_attempts_total").keys() == {frozenset({("backend", "a"), ("cause", "ok")})}
    assert shown(metrics, "gateway_unpriced_attempts_total") == {}
    assert value(metrics, "gateway_tokens_total", model="m", kind="fresh") == 60


def test_what_is_now_is_read_at_the_scrape() -> None:
    _, metrics = metrics_of(
        conditions=lambda: (
            report("a", breaker="open", in_flight=3, ejected=("m",), ready=False),
            report("embedded", limit=None, resting=("m", "soup")),
        ),
        waiting=lambda: {"high": 0, "normal": 2, "low": 5},
        findings=lambda: [(("keys", "input", "redact"), 4)],
        ledger=lambda: LedgerStats(written=7, journaled=2, lost=1, waiting=3, database_up=False),
    )
    states = {
        state: value(metrics, "gateway_backend_breaker", backend="a", state=state)
        for state in ("closed", "open", "half-open")
    }
    assert states == {"closed": 0, "open": 1, "half-open": 0}
    assert value(metrics, "gateway_backend_ready", backend="a") == 0
    assert value(metrics, "gateway_backend_in_flight", backend="a") == 3
    assert value(metrics, "gateway_backend_ejected_models", backend="a") == 1
    assert value(metrics, "gateway_backend_resting_models", backend="embedded") == 2
    assert shown(metrics, "gateway_backend_limit") == {frozenset({("backend", "a")}): 16}
    assert value(metrics, "gateway_waiting", priority="low") == 5
    assert value(metrics, "gateway_guard_findings_total", rule="keys", stage="input", action="redact") == 4
    assert value(metrics, "gateway_ledger_waiting") == 3
    assert value(metrics, "gateway_ledger_database_up") == 0
    assert value(metrics, "gateway_ledger_rows_total", fate="lost") == 1


@given(st.lists(st.text(max_size=8), max_size=200))
def test_clients_cannot_make_labels(names: list[str]) -> None:
    asked = 0

    def models() -> tuple[str, ...]:
        nonlocal asked
        asked += 1
        return ("m", "soup")

    seen, metrics = metrics_of(models=models)
    for name in names:
        seen.observe_request(record(requested_model=name, cause="not_found"))
    counts = shown(metrics, "gateway_requests_total")
    assert {dict(labels)["model"] for labels in counts} <= {"m", "soup", "other"}
    assert sum(counts.values()) == len(names)
    # Time stands still: however many wrong names come, all names are looked up once.
    assert asked <= 1


def test_a_model_that_comes_later_is_known_later() -> None:
    clock = VirtualClock()
    known = ["m"]
    seen = GatewayMetrics(figures(models=lambda: known), clock)
    metrics = Metrics(None, more=[seen.families])
    down = record(requested_model="new", cause="overloaded")
    seen.observe_request(down)
    known.append("new")
    clock.advance(60.0)
    seen.observe_request(down)
    labels = {"operation": "chat", "backend": "", "cause": "overloaded"}
    assert value(metrics, "gateway_requests_total", model="other", **labels) == 1
    assert value(metrics, "gateway_requests_total", model="new", **labels) == 1


def test_very_many_models_are_bounded() -> None:
    seen, metrics = metrics_of()
    for number in range(5000):
        seen.observe_request(record(attempt(), model=f"m{number}", ttft_s=0.1))
    assert len(shown(metrics, "gateway_requests_total")) <= 2049
    assert len(shown(metrics, "gateway_time_to_first_token_seconds_count")) <= 65
    assert sum(shown(metrics, "gateway_time_to_first_token_seconds_count").values()) == 5000


@pytest.mark.anyio
async def test_a_gateway_at_work_is_seen() -> None:
    async with MockUpstream() as mock:
        mock.scripts.append(Script(status=503))
        async with gateway(
            {"a": {"url": mock.url}}, resilience={"retries": 1, "backoff_s": 0.001}
        ) as serving:
            metrics = serving.service.metrics
            await answer(serving, question())
            with pytest.raises(UnknownModel):
                await answer(serving, question("nobody's"))
            requests = shown(metrics, "gateway_requests_total")
            assert value(metrics, "gateway_attempts_total", backend="a", cause="overloaded") == 1
            assert value(metrics, "gateway_attempts_total", backend="a", cause="ok") == 1
            assert value(metrics, "gateway_retries_total", backend="a") == 1
            assert value(metrics, "gateway_backend_ready", backend="a") == 1
            assert value(metrics, "gateway_backend_in_flight", backend="a") == 0
            assert value(metrics, "gateway_backend_breaker", backend="a", state="closed") == 1
            assert value(metrics, "gateway_waiting", priority="normal") == 0
    assert {(dict(labels)["model"], dict(labels)["cause"]) for labels in requests} == {
        ("m", "ok"),
        ("other", "not_found"),
    }

"""Prometheus metrics of the gateway's path: requests, attempts, tokens, cost, backends; `stockpot_gateway_*`.

What happens is tallied from the record of each request, on the event loop, in microseconds. What is, is read
when somebody scrapes. Labels come from the configuration and from codes in the program, and are bounded even
so: a model nobody serves is `other`, whatever a client calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from stockpot.accounts.ledger import LedgerStats
from stockpot.clock import Clock
from stockpot.gateway.condition import ConditionReport
from stockpot.records import Attempt, RequestRecord
from stockpot.requests import Priority
from stockpot.telemetry.families import counter, gauge, histogram
from stockpot.telemetry.tally import Counts, Histograms

_LATENCY_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.5)
_BREAKER_STATES = ("closed", "open", "half-open")
_OK = "ok"
_OTHER = "other"
_SERIES_MAX = 2048
_NAMES_STAY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayFigures:
    """Where that is read which the path counts itself; each is called at a scrape.

    `models`: the names clients may give. `conditions`: one report for each backend. `waiting`: requests in
    line. `findings` of guards: by (rule, stage, action). `ledger`: None where there is none.
    """

    models: Callable[[], Iterable[str]]
    conditions: Callable[[], Iterable[ConditionReport]]
    waiting: Callable[[], Mapping[Priority, int]]
    findings: Callable[[], Iterable[tuple[tuple[str, str, str], float]]]
    ledger: Callable[[], LedgerStats] | None


class GatewayMetrics:
    """A `records.RecordObserver` whose `families` go to `telemetry.metrics.Metrics` as one of `more`."""

    def __init__(self, figures: GatewayFigures, clock: Clock) -> None:
        self._figures = figures
        self._clock = clock
        self._names: frozenset[str] = frozenset()
        self._names_until_s = float("-inf")
        self._requests = Counts(_SERIES_MAX)
        self._attempts = Counts(_SERIES_MAX)
        self._retries = Counts(_SERIES_MAX)
        self._hedges = Counts(_SERIES_MAX)
        self._fallbacks = Counts(_SERIES_MAX)
        self._tokens = Counts(_SERIES_MAX)
        self._nanousd = Counts(_SERIES_MAX)
        self._unpriced = Counts(_SERIES_MAX)
        self._cache = Counts(_SERIES_MAX)
        self._notices = Counts()
        self._refused = Counts(_SERIES_MAX)
        self._shared = Counts(_SERIES_MAX)
        self._ttft_s = Histograms(_LATENCY_S)
        self._tpot_s = Histograms(_TOKEN_S)
        self._queue_s = Histograms(_LATENCY_S)
        self._total_s = Histograms(_LATENCY_S)

    def observe_request(self, record: RequestRecord) -> None:
        """Tally one request."""
        model = record.model or self._known(record.requested_model)
        self._requests.add(record.operation, model, record.backend, record.cause or _OK)
        if record.attempts:
            self._tried(record, model)
        if record.cache != "none":
            self._cache.add(model, record.cache)
        if record.shared:
            self._shared.add(model)
        if record.cause == "allowance":
            self._refused.add(record.caller.team)
        for kind in record.notices:
            self._notices.add(kind)
            if kind == "fallback":
                self._fallbacks.add(model)
        if record.ttft_s is not None:
            self._ttft_s.observe(model, record.ttft_s)
        # An answer that was kept comes as fast as it is written out, which says nothing of who generates. Its
        # other times are its client's, and count; `recall_time_to_first_token` has them apart.
        if record.tpot_s is not None and not (record.recalled and record.recalled.is_hit):
            self._tpot_s.observe(model, record.tpot_s)
        self._queue_s.observe(model, record.queue_s)
        self._total_s.observe(model, record.total_s)

    def families(self) -> Iterable[Metric]:
        """All families, at a scrape."""
        yield from self._request_families()
        yield from self._attempt_families()
        yield from self._token_families()
        yield from self._time_families()
        yield from self._backend_families()
        yield gauge(
            "gateway_waiting",
            "Requests in line for a backend.",
            ("priority",),
            [((priority,), count) for priority, count in self._figures.waiting().items()],
        )
        if self._figures.ledger is not None:
            yield from _ledger_families(self._figures.ledger())

    def _known(self, requested: str) -> str:
        """The label of a model that was not asked: clients may call it what they like. All names are looked
        up at times only, so that a flood of wrong ones stays cheap."""
        if requested not in self._names and self._clock.monotonic() >= self._names_until_s:
            self._names = frozenset(self._figures.models())
            self._names_until_s = self._clock.monotonic() + _NAMES_STAY_S
        return requested if requested in self._names else _OTHER

    def _tried(self, record: RequestRecord, model: str) -> None:
        previous: Attempt | None = None
        for attempt in record.attempts:
            backend = attempt.backend
            self._attempts.add(backend, attempt.cause or _OK)
            if attempt.hedge:
                self._hedges.add(backend)
            else:
                if previous is not None and _is_retry(attempt, previous, record.notices):
                    self._retries.add(backend)
                previous = attempt
            if attempt.cost.nanousd:
                self._nanousd.add(model, backend, by=attempt.cost.nanousd)
            elif attempt.cost.source == "unknown" and attempt.prompt_tokens:
                self._unpriced.add(model, backend)
        for kind, count in (
            ("fresh", record.fresh_tokens),
            ("cached", record.cached_tokens),
            ("written", record.written_tokens),
            ("output", record.completion_tokens),
        ):
            if count > 0:
                self._tokens.add(model, kind, by=count)

    def _request_families(self) -> Iterable[Metric]:
        yield counter(
            "gateway_requests",
            "Requests that are over. Cause ok: a complete answer. No backend: none was asked.",
            ("operation", "model", "backend", "cause"),
            self._requests.totals(),
        )
        yield counter(
            "gateway_shared_answers",
            "Requests that were given the answer of an identical one.",
            ("model",),
            self._shared.totals(),
        )
        yield counter(
            "gateway_cache_outcomes",
            "Requests by what of their prompt was cached: hit (all but the last token), partial, miss.",
            ("model", "outcome"),
            self._cache.totals(),
        )
        yield counter(
            "gateway_notices",
            "What clients were told was done to a request: fallback, cascade, degraded, guard_redact, ...",
            ("kind",),
            self._notices.totals(),
        )
        yield counter(
            "gateway_allowance_refusals",
            "Requests refused by a limit of the key or its team.",
            ("team",),
            self._refused.totals(),
        )
        yield counter(
            "gateway_guard_findings",
            "What guards found.",
            ("rule", "stage", "action"),
            self._figures.findings(),
        )

    def _attempt_families(self) -> Iterable[Metric]:
        yield counter(
            "gateway_attempts", "Tries on a backend.", ("backend", "cause"), self._attempts.totals()
        )
        yield counter(
            "gateway_retries",
            "Attempts after one that failed, with the same model.",
            ("backend",),
            self._retries.totals(),
        )
        yield counter(
            "gateway_hedges",
            "Attempts beside one that was slow to begin.",
            ("backend",),
            self._hedges.totals(),
        )
        yield counter(
            "gateway_fallbacks",
            "Times the next model of a fallback chain took over, by the model that was asked last.",
            ("model",),
            self._fallbacks.totals(),
        )

    def _token_families(self) -> Iterable[Metric]:
        yield counter(
            "gateway_tokens",
            "Tokens of all attempts: fresh (prompt, computed), cached (prompt, read from a cache), output;"
            " written are those of the fresh ones that were put into a cache under a promise.",
            ("model", "kind"),
            self._tokens.totals(),
        )
        yield counter(
            "gateway_cost_usd",
            "US dollars, as the ledger reckons them.",
            ("model", "backend"),
            [(labels, nanousd / 1e9) for labels, nanousd in self._nanousd.totals()],
        )
        yield counter(
            "gateway_unpriced_attempts",
            "Attempts for which no price is known.",
            ("model", "backend"),
            self._unpriced.totals(),
        )

    def _time_families(self) -> Iterable[Metric]:
        for name, text, tallies in (
            ("time_to_first_token", "From arrival to the first token that was delivered.", self._ttft_s),
            (
                "time_per_output_token",
                "Mean time between the output tokens of a request; of an answer that was kept, none.",
                self._tpot_s,
            ),
            ("queue", "Waiting, here and where the backend says so.", self._queue_s),
            ("request_duration", "From arrival to the end, whatever it was.", self._total_s),
        ):
            yield histogram(f"gateway_{name}_seconds", text, ("model",), tallies.labelled())

    def _backend_families(self) -> Iterable[Metric]:
        label = ("backend",)
        reports = tuple(self._figures.conditions())
        yield gauge(
            "gateway_backend_ready",
            "1: its last health check was good.",
            label,
            [((each.name,), float(each.ready)) for each in reports],
        )
        yield gauge(
            "gateway_backend_breaker",
            "1 for the state its breaker is in: closed, open (left alone), half-open (probed).",
            ("backend", "state"),
            [
                ((each.name, state), float(state == each.breaker))
                for each in reports
                for state in _BREAKER_STATES
            ],
        )
        yield gauge(
            "gateway_backend_in_flight",
            "Requests there now.",
            label,
            [((each.name,), each.in_flight) for each in reports],
        )
        yield gauge(
            "gateway_backend_limit",
            "Requests that may be there at once, as measured; the engine in this process has none.",
            label,
            [((each.name,), each.limit) for each in reports if each.limit is not None],
        )
        yield gauge(
            "gateway_backend_ejected_models",
            "Models not asked for there, because it is slower or fails more than its peers.",
            label,
            [((each.name,), len(each.ejected)) for each in reports],
        )
        yield gauge(
            "gateway_backend_resting_models",
            "Models not asked for there until the time its Retry-After named.",
            label,
            [((each.name,), len(each.resting)) for each in reports],
        )


def _is_retry(attempt: Attempt, previous: Attempt, notices: tuple[str, ...]) -> bool:
    """Whether it was made because the one before failed, and not because another model took over."""
    if previous.cause in (None, "validation", "cancelled"):
        return False
    return attempt.model == previous.model or "fallback" not in notices


def _ledger_families(stats: LedgerStats) -> Iterable[Metric]:
    yield gauge("gateway_ledger_waiting", "Rows to be written.", (), [((), stats.waiting)])
    yield gauge(
        "gateway_ledger_database_up",
        "0: rows go to a journal on disk until the database is back.",
        (),
        [((), float(stats.database_up))],
    )
    yield counter(
        "gateway_ledger_rows",
        "Rows by what became of them; journaled ones are written later, and counted again then.",
        ("fate",),
        [
            (("written",), stats.written),
            (("journaled",), stats.journaled),
            (("lost",), stats.lost),
        ],
    )

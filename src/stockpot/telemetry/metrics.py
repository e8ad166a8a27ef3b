"""Prometheus metrics of the engine and the wire, under the names the field uses, prefixed `stockpot_`.

What happens is tallied as it is reported (`observe`: on the engine's thread, refusals on the event loop,
reads and writes on the tiers' threads, one at a time; `observe_http`: on the event loop), and each tally has
one writer. What is, is read from the engine's snapshot when somebody scrapes. Nothing is registered globally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from stockpot import __version__
from stockpot.engine.reports import EngineStats, RefusalReport, Report, RequestReport, StepReport
from stockpot.telemetry.cache_metrics import CacheMetrics
from stockpot.telemetry.families import counter, gauge, histogram
from stockpot.telemetry.tally import Counts, Histogram

_STEP_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.5)
_LATENCY_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SAMPLING_S = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
_SEQUENCES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Metrics(Collector):
    """An `engine.reports.Observer` and the source of /metrics.

    `stats` gives the engine's snapshot; it is called once a scrape. None: there is no engine, and no families
    of one. `more` are families of other parts, read at each scrape too.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats] | None,
        *,
        more: Sequence[Callable[[], Iterable[Metric]]] = (),
    ) -> None:
        self._stats = stats
        self._more = tuple(more)
        self._ttft_s = Histogram(_LATENCY_S)
        self._inter_token_s = Histogram(_STEP_S)
        self._queue_s = Histogram(_LATENCY_S)
        self._request_s = Histogram(_LATENCY_S)
        self._step_s = Histogram(_STEP_S)
        self._sampling_s = Histogram(_SAMPLING_S)
        self._batch = Histogram(_SEQUENCES)
        self._prompt_length = Histogram(_TOKENS)
        self._answer_length = Histogram(_TOKENS)
        self._batch_tokens = Counts()
        self._requests = Counts()
        self._refused = Counts()
        self._cache = CacheMetrics()
        self._http = Counts(limit=512)
        self._http_s: dict[str, Histogram] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def observe(self, report: Report) -> None:
        """Tally what the engine reports; a few hundred nanoseconds a value."""
        match report:
            case StepReport():
                self._step(report)
            case RequestReport():
                self._request(report)
            case RefusalReport():
                self._refused.add(report.cause)
            case _:
                self._cache.observe(report)

    def observe_http(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Tally one HTTP request. `route` is a template, never a path."""
        method = method if method in {"GET", "POST"} else "other"
        self._http.add(route, method, str(status))
        # Routes are few and fixed (`route` is a template), so this dictionary is bounded.
        self._http_s.setdefault(route, Histogram(_LATENCY_S)).observe(duration_s)

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read the engine's snapshot yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All families but the process's."""
        yield gauge("build_info", "The version that runs.", ("version",), [((__version__,), 1)])
        if self._stats is not None:
            stats = self._stats()
            yield from self._engine_families(stats)
            yield from self._cache.families(stats)
            yield from self._event_families()
        yield from self._http_families()
        for families in self._more:
            yield from families()

    def _step(self, report: StepReport) -> None:
        self._step_s.observe(report.duration_s)
        self._batch.observe(report.sequences)
        self._sampling_s.observe(report.sample_s)
        self._batch_tokens.add("decode", by=report.decode_tokens)
        self._batch_tokens.add("prefill", by=report.prefill_tokens)
        for interval_s in report.inter_token_s:
            self._inter_token_s.observe(interval_s)

    def _request(self, report: RequestReport) -> None:
        self._requests.add(report.reason)
        self._queue_s.observe(report.timings.queue_s)
        self._request_s.observe(report.timings.total_s)
        if report.timings.ttft_s is not None:
            self._ttft_s.observe(report.timings.ttft_s)
        self._prompt_length.observe(report.usage.prompt_tokens)
        self._answer_length.observe(report.usage.completion_tokens)

    def _engine_families(self, stats: EngineStats) -> Iterable[Metric]:
        states = {
            "running": stats.running,
            "waiting": stats.waiting,
            "joining": stats.joining,
            "fetching": stats.fetching,
            "preempted": stats.preempted,
        }
        yield gauge(
            "requests_by_state",
            "Requests now. Of the waiting, joining ones wait for another's prefill of their common prefix, "
            "fetching ones for blocks from a tier behind RAM.",
            ("state",),
            [((state,), value) for state, value in states.items()],
        )
        yield counter("generation_tokens", "Tokens generated.", (), [((), stats.tokens_generated)])
        yield counter("steps", "Decodes of the driver.", (), [((), stats.steps)])
        yield counter(
            "preemptions", "Requests put aside to make room for others.", (), [((), stats.preemptions)]
        )

    def _event_families(self) -> Iterable[Metric]:
        yield counter(
            "batch_tokens", "Tokens decoded, by kind of work.", ("kind",), self._batch_tokens.totals()
        )
        outcomes = self._requests.totals()
        yield counter("requests", "Requests that are over, by outcome.", ("outcome",), outcomes)
        cancelled = sum(count for (outcome,), count in outcomes if outcome == "cancelled")
        yield counter(
            "requests_cancelled",
            "Requests whose client went away or that a stop ended.",
            (),
            [((), cancelled)],
        )
        yield counter("requests_refused", "Requests not taken, by cause.", ("cause",), self._refused.totals())
        for name, text, tally in (
            ("time_to_first_token_seconds", "From arrival to the first token.", self._ttft_s),
            ("inter_token_latency_seconds", "Between two tokens of a stream.", self._inter_token_s),
            ("queue_time_seconds", "From arrival to a place in the batch.", self._queue_s),
            ("request_duration_seconds", "From arrival to the last token.", self._request_s),
            ("step_duration_seconds", "One decode of the driver and all around it.", self._step_s),
            ("sampling_seconds", "The part of a step spent choosing tokens.", self._sampling_s),
            ("batch_size", "Sequences in a step.", self._batch),
            ("prompt_length_tokens", "Tokens of a prompt, cached ones too.", self._prompt_length),
            ("generation_length_tokens", "Tokens of an answer.", self._answer_length),
        ):
            yield histogram(name, text, (), [((), tally)])

    def _http_families(self) -> Iterable[Metric]:
        yield counter(
            "http_requests",
            "HTTP requests; status 499: the client did not wait.",
            ("route", "method", "status"),
            self._http.totals(),
        )
        yield histogram(
            "http_request_duration_seconds",
            "HTTP requests, to the last byte of a stream.",
            ("route",),
            [((route,), tally) for route, tally in self._http_s.items()],
        )

"""Prometheus metrics of the engine and the wire, under the names the field uses, prefixed `stockpot_`.

What happens is tallied as it is reported (`observe`: on the engine's thread, refusals on the event loop;
`observe_http`: on the event loop), and each tally has one writer. What is, is read from the engine's
snapshot when somebody scrapes. Nothing is registered globally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from stockpot import __version__
from stockpot.engine.reports import (
    EngineStats,
    EvictionReport,
    RefusalReport,
    Report,
    RequestReport,
    StepReport,
)
from stockpot.telemetry.tally import Counts, Histogram

_STEP_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.5)
_LATENCY_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SAMPLING_S = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
_SEQUENCES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Metrics(Collector):
    """An `engine.reports.Observer` and the source of /metrics.

    `stats` gives the engine's snapshot; it is called once a scrape.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
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
        self._evicted_blocks = Counts()
        self._evicted_bytes = Counts()
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
            case EvictionReport():
                self._evicted_blocks.add(report.tier, report.cause, by=report.blocks)
                self._evicted_bytes.add(report.tier, report.cause, by=report.size_bytes)

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
        yield _gauge("build_info", "The version that runs.", ("version",), [((__version__,), 1)])
        yield from self._engine_families(self._stats())
        yield from self._event_families()
        yield from self._http_families()

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
            "preempted": stats.preempted,
        }
        yield _gauge(
            "requests_by_state",
            "Requests now; joining ones are waiting for another's prefill of their common prefix.",
            ("state",),
            [((state,), value) for state, value in states.items()],
        )
        sources = {"computed": stats.prompt_tokens_computed, **stats.prompt_tokens_cached}
        yield _counter(
            "prompt_tokens",
            "Prompt tokens by where they came from: computed, or cached in a tier.",
            ("source",),
            [((source,), value) for source, value in sources.items()],
        )
        yield _counter("generation_tokens", "Tokens generated.", (), [((), stats.tokens_generated)])
        yield _gauge("cache_hit_ratio", "Share of prompt tokens not computed.", (), [((), stats.hit_ratio)])
        yield _gauge("kv_cells", "Cells (tokens) the context holds.", (), [((), stats.cells)])
        yield _gauge("kv_cells_used", "Cells in use.", (), [((), stats.cells_used)])
        cell_bytes = stats.kv_bytes_per_token
        yield _gauge(
            "kv_bytes",
            "Bytes of keys and values held, by tier.",
            ("tier",),
            [(("context",), stats.cells_used * cell_bytes), (("ram",), stats.ram_used_bytes)],
        )
        yield _gauge(
            "kv_capacity_bytes",
            "Bytes of keys and values a tier can hold.",
            ("tier",),
            [(("context",), stats.cells * cell_bytes), (("ram",), stats.ram_capacity_bytes)],
        )
        yield _gauge("kv_ram_blocks", "Blocks in the RAM tier.", (), [((), stats.ram_blocks)])
        yield _gauge(
            "kv_ram_pinned_blocks", "Blocks of the RAM tier in use now.", (), [((), stats.ram_pinned_blocks)]
        )
        yield _counter("steps", "Decodes of the driver.", (), [((), stats.steps)])
        yield _counter(
            "preemptions", "Requests put aside to make room for others.", (), [((), stats.preemptions)]
        )

    def _event_families(self) -> Iterable[Metric]:
        yield _counter(
            "batch_tokens", "Tokens decoded, by kind of work.", ("kind",), self._batch_tokens.totals()
        )
        outcomes = self._requests.totals()
        yield _counter("requests", "Requests that are over, by outcome.", ("outcome",), outcomes)
        cancelled = sum(count for (outcome,), count in outcomes if outcome == "cancelled")
        yield _counter(
            "requests_cancelled",
            "Requests whose client went away or that a stop ended.",
            (),
            [((), cancelled)],
        )
        yield _counter(
            "requests_refused", "Requests not taken, by cause.", ("cause",), self._refused.totals()
        )
        labels = ("tier", "cause")
        yield _counter("evicted_blocks", "Blocks that left a tier.", labels, self._evicted_blocks.totals())
        yield _counter("evicted_bytes", "Bytes that left a tier.", labels, self._evicted_bytes.totals())
        for name, text, histogram in (
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
            yield _histogram(name, text, (), [((), histogram)])

    def _http_families(self) -> Iterable[Metric]:
        yield _counter(
            "http_requests",
            "HTTP requests; status 499: the client did not wait.",
            ("route", "method", "status"),
            self._http.totals(),
        )
        yield _histogram(
            "http_request_duration_seconds",
            "HTTP requests, to the last byte of a stream.",
            ("route",),
            [((route,), histogram) for route, histogram in self._http_s.items()],
        )


_Values = Sequence[tuple[tuple[str, ...], float]]


def _gauge(name: str, text: str, labels: Sequence[str], values: _Values) -> Metric:
    family = GaugeMetricFamily(f"stockpot_{name}", text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _counter(name: str, text: str, labels: Sequence[str], values: _Values) -> Metric:
    family = CounterMetricFamily(f"stockpot_{name}", text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _histogram(
    name: str, text: str, labels: Sequence[str], values: Sequence[tuple[tuple[str, ...], Histogram]]
) -> Metric:
    family = HistogramMetricFamily(f"stockpot_{name}", text, labels=labels)
    for label_values, histogram in values:
        family.add_metric(label_values, histogram.buckets(), histogram.sum)
    return family

"""Traces: opens what sends the spans of requests to an OpenTelemetry collector, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stockpot.errors import ConfigurationError
from stockpot.gateway.spans import Spans, no_spans
from stockpot.settings_gateway import BackendSettings
from stockpot.settings_telemetry import TRACES_PATH, TelemetrySettings
from stockpot.telemetry.conventions import SCHEMA_URL, SERVICE_NAME, SERVICE_VERSION

_SPANS_WAITING_MAX = 16_384
_SPANS_PER_POST = 1024
_BETWEEN_POSTS_S = 2.0
_POST_TIMEOUT_S = 5.0


def open_spans(
    settings: TelemetrySettings, version: str, backends: Callable[[], Mapping[str, BackendSettings]]
) -> tuple[Spans, Callable[[], None]]:
    """Spans of requests, and what ends them: it sends what waits, blocks for half a minute at most, and is
    called once, on any thread.

    `backends` gives the settings of all backends by name, as they are now. Spans are sent by a thread of the
    SDK; when the collector is slow or away, those beyond a bound are dropped and logged. Nothing global is
    set. Raises ConfigurationError where tracing is asked for and not installed.
    """
    if settings.otlp_endpoint is None:
        return no_spans(), _nothing
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        from stockpot.telemetry.otel_spans import OtelSpans
    except ImportError as error:
        raise ConfigurationError(
            f"telemetry.otlp_endpoint is set and {error.name} is not installed: install 'stockpot[otel]',"
            " or leave the endpoint out."
        ) from error
    exporter = OTLPSpanExporter(
        endpoint=settings.otlp_endpoint + TRACES_PATH,
        headers={name.lower(): value.get_secret_value() for name, value in settings.otlp_headers.items()},
        timeout=_POST_TIMEOUT_S,
    )
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        resource=Resource.create({SERVICE_NAME: settings.service_name, SERVICE_VERSION: version}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=_SPANS_WAITING_MAX,
            max_export_batch_size=_SPANS_PER_POST,
            schedule_delay_millis=_BETWEEN_POSTS_S * 1e3,
        )
    )
    tracer = provider.get_tracer("stockpot", version, schema_url=SCHEMA_URL)
    return OtelSpans(tracer, backends, with_prompts=settings.log_prompts), provider.shutdown


def _nothing() -> None:
    """What there is to end where nothing was opened."""

"""Traces: one span for a request and one for each attempt, joined to the client's and the backend's."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import SecretStr, ValidationError
from tests.mock_upstream import MockUpstream, Script
from tests.telemetry.gateway_at_work import SECRET, answer, attempt, gateway, question, record

from stockpot.caller import Caller
from stockpot.errors import ConfigurationError, UpstreamError
from stockpot.events import Recalled
from stockpot.gateway.spans import no_spans
from stockpot.requests import CompletionRequest, EmbeddingRequest, Generation, Message, ToolCall
from stockpot.settings_gateway import BackendSettings
from stockpot.settings_telemetry import TelemetrySettings
from stockpot.telemetry.otel_spans import OtelSpans
from stockpot.telemetry.tracing import open_spans

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Memory:
    """Spans that stay here."""

    def __init__(
        self, *, ratio: float = 1.0, with_prompts: bool = False, **backends: BackendSettings
    ) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.spans = OtelSpans(provider.get_tracer("test"), lambda: backends, with_prompts=with_prompts)

    def ended(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())


def facts(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


@pytest.mark.anyio
async def test_a_request_is_one_trace_from_client_to_backend() -> None:
    async with MockUpstream() as mock:
        section = BackendSettings(url=mock.url, server="vllm")
        memory = Memory(a=section)
        mock.default = Script(text="one two three", cached_tokens=2)
        async with gateway({"a": {"url": mock.url, "server": "vllm"}}, spans=memory.spans) as serving:
            caller = Caller(key_id="k1", team="kitchen", tags=("soup",))
            trace_parent = f"00-{TRACE_ID}-{PARENT_ID}-01"
            await answer(
                serving,
                question(stream=True, max_tokens=7, trace_parent=trace_parent, caller=caller, session="s"),
            )
        sent = mock.requests[-1].headers["traceparent"]
    attempt_span, request_span = memory.ended()
    assert request_span.context is not None and attempt_span.context is not None
    assert request_span.name == "chat m" and request_span.kind is SpanKind.SERVER
    assert request_span.parent is not None and f"{request_span.parent.span_id:016x}" == PARENT_ID
    assert f"{request_span.context.trace_id:032x}" == TRACE_ID
    assert attempt_span.kind is SpanKind.CLIENT
    assert attempt_span.parent is not None
    assert attempt_span.parent.span_id == request_span.context.span_id
    assert sent == f"00-{TRACE_ID}-{attempt_span.context.span_id:016x}-01"

    told = facts(request_span)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "vllm"
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "m"
    assert told["gen_ai.request.max_tokens"] == 7
    assert told["gen_ai.usage.output_tokens"] == 3
    assert told["gen_ai.usage.cache_read.input_tokens"] == 2
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert told["gen_ai.response.time_to_first_chunk"] == told["stockpot.ttft_s"]
    assert told["gen_ai.conversation.id"] == "s"
    assert (told["stockpot.key.id"], told["stockpot.team"], told["stockpot.tags"]) == (
        "k1",
        "kitchen",
        ("soup",),
    )
    assert told["stockpot.attempts"] == 1 and told["stockpot.cache.outcome"] == "partial"
    assert "error.type" not in told and request_span.status.status_code is StatusCode.UNSET
    told = facts(attempt_span)
    assert (told["server.address"], told["server.port"]) == ("127.0.0.1", mock.port)
    assert told["stockpot.backend"] == "a" and told["gen_ai.usage.output_tokens"] == 3
    assert SECRET not in repr([facts(span) for span in memory.ended()])


@pytest.mark.anyio
async def test_a_failed_attempt_is_a_span_of_its_own() -> None:
    async with MockUpstream() as mock:
        memory = Memory()
        mock.scripts.append(Script(status=500))
        async with gateway(
            {"a": {"url": mock.url}}, spans=memory.spans, resilience={"retries": 1, "backoff_s": 0.001}
        ) as serving:
            await answer(serving, question())
            mock.default = Script(status=400)
            with pytest.raises(UpstreamError):
                await answer(serving, question())
    failed, succeeded, request_span, refused, refused_request = memory.ended()
    assert facts(failed)["error.type"] == "server_error"
    assert failed.status.status_code is StatusCode.ERROR
    assert succeeded.status.status_code is StatusCode.UNSET
    assert facts(request_span)["stockpot.attempts"] == 2
    assert request_span.status.status_code is StatusCode.UNSET
    # The client's own mistake is an error of the call, not of the server.
    assert refused.status.status_code is StatusCode.ERROR
    assert facts(refused_request)["error.type"] == "invalid_request"
    assert refused_request.status.status_code is StatusCode.UNSET


def test_what_caches_of_answers_did_is_on_the_span_of_the_request() -> None:
    memory = Memory()
    hit = Recalled("semantic", "calibrated", "e2", 60.0, 0.97, 0.004, "", 80, 20, 500_000_000, 0.5)
    for each in (
        record(recalled=hit, model="m", backend="kept"),
        record(recalled=hit, shared=True),
        record(attempt(), recalled=Recalled("miss", "not_kept", would="e9")),
        record(attempt()),
    ):
        memory.spans.request(question()).end(each)
    given, shared, missed, unasked = (facts(span) for span in memory.ended())
    assert {name: value for name, value in given.items() if name.startswith("stockpot.recall.")} == {
        "stockpot.recall.outcome": "semantic",
        "stockpot.recall.reason": "calibrated",
        "stockpot.recall.entry": "e2",
        "stockpot.recall.age_s": 60.0,
        "stockpot.recall.similarity": 0.97,
        "stockpot.recall.error_upper": 0.004,
        "stockpot.recall.saved_prompt_tokens": 80,
        "stockpot.recall.saved_output_tokens": 20,
        "stockpot.recall.saved_usd": 0.5,
        "stockpot.recall.saved_s": 0.5,
    }
    assert given["gen_ai.provider.name"] == "stockpot"  # no provider was asked
    assert (given["stockpot.attempts"], given["gen_ai.usage.input_tokens"]) == (0, 0)
    assert shared["stockpot.recall.outcome"] == "semantic" and "stockpot.recall.saved_usd" not in shared
    assert (missed["stockpot.recall.outcome"], missed["stockpot.recall.would"]) == ("miss", "e9")
    assert "stockpot.recall.saved_usd" not in missed and "stockpot.recall.outcome" not in unasked


def test_what_is_current_is_no_parent() -> None:
    memory = Memory()
    with TracerProvider(shutdown_on_exit=False).get_tracer("other").start_as_current_span("ambient"):
        span = memory.spans.request(question())
        span.attempt("a", "m").end(attempt())
        span.end(record(attempt()))
    _, request_span = memory.ended()
    assert request_span.parent is None


def test_a_trace_that_is_not_sampled_is_passed_on_as_such() -> None:
    memory = Memory()
    span = memory.spans.request(question(trace_parent=f"00-{TRACE_ID}-{PARENT_ID}-00"))
    tried = span.attempt("a", "m")
    assert tried.trace_parent().startswith(f"00-{TRACE_ID}-")
    assert tried.trace_parent().endswith("-00")
    tried.end(attempt())
    span.end(record(attempt()))
    assert memory.ended() == []


def test_the_ratio_is_for_requests_without_a_trace() -> None:
    memory = Memory(ratio=0)
    memory.spans.request(question()).end(record())
    assert memory.ended() == []
    memory.spans.request(question(trace_parent=f"00-{TRACE_ID}-{PARENT_ID}-01")).end(record())
    assert len(memory.ended()) == 1


def test_a_malformed_parent_begins_a_trace() -> None:
    memory = Memory()
    memory.spans.request(question(trace_parent="00-nonsense")).end(record())
    assert memory.ended()[0].parent is None


def test_providers_go_by_the_names_of_the_conventions() -> None:
    url = "https://user:secret@models.example/v1?key=secret"
    memory = Memory(
        grok=BackendSettings(url=url, provider="x-ai"),
        claude=BackendSettings(url=url, kind="anthropic"),
        own=BackendSettings(url="http://10.0.0.5:8080/v1", server="llama-server"),
    )
    span = memory.spans.request(question())
    for backend in ("grok", "claude", "own", "embedded"):
        span.attempt(backend, "m").end(attempt(backend))
    told = [facts(each) for each in memory.ended()]
    assert [each["gen_ai.provider.name"] for each in told] == [
        "x_ai",
        "anthropic",
        "llama-server",
        "stockpot",
    ]
    assert [each.get("server.port") for each in told] == [443, 443, 8080, None]
    assert "secret" not in repr(told)


def test_prompts_are_told_when_asked_for_and_bounded() -> None:
    memory = Memory(with_prompts=True)
    call = ToolCall("c1", "stir", '{"times": 3}')
    chat = replace(
        question(),
        messages=(
            Message("user", "x" * 100_000),
            Message("assistant", "", tool_calls=(call,)),
            Message("user", SECRET),
        ),
    )
    memory.spans.request(chat).end(record())
    memory.spans.request(CompletionRequest(Generation("m", "r"), [1, 2, 3])).end(record())
    memory.spans.request(EmbeddingRequest(Generation("m", "r"), ["soup"])).end(record())
    told = [json.loads(str(facts(span)["gen_ai.input.messages"])) for span in memory.ended()]
    first, second, last = told[0]
    assert last == {"role": "user", "parts": [{"type": "text", "content": SECRET}]}
    assert second["parts"][0] == {
        "type": "tool_call",
        "id": "c1",
        "name": "stir",
        "arguments": '{"times": 3}',
    }
    assert 0 < len(first["parts"][0]["content"]) < 20_000
    assert told[1] == []
    assert told[2] == [{"role": "user", "parts": [{"type": "text", "content": "soup"}]}]
    assert [span.name for span in memory.ended()] == ["chat m", "text_completion m", "embeddings m"]


class Collector(ThreadingHTTPServer):
    """An OpenTelemetry collector that only listens."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, str | None, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.posts.append(
            (self.path, self.headers["x-key"], ExportTraceServiceRequest.FromString(body))
        )
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def collector() -> Generator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_spans_arrive_at_a_collector() -> None:
    before = trace.get_tracer_provider()
    with collector() as server:
        settings = TelemetrySettings(
            otlp_endpoint=f"http://127.0.0.1:{server.server_port}/v1/traces",
            otlp_headers={"X-Key": SecretStr("k")},
            service_name="kitchen",
        )
        spans, shutdown = open_spans(settings, "1.2.3", dict)
        span = spans.request(question())
        span.attempt("a", "m").end(attempt())
        span.end(record(attempt()))
        shutdown()
    path, key, posted = server.posts[0]
    assert (path, key) == ("/v1/traces", "k")
    resource = {each.key: each.value.string_value for each in posted.resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["service.version"]) == ("kitchen", "1.2.3")
    scope = posted.resource_spans[0].scope_spans[0]
    assert scope.scope.name == "stockpot" and scope.schema_url.startswith("https://opentelemetry.io/schemas/")
    assert [each.name for each in scope.spans] == ["chat m", "chat m"]
    assert trace.get_tracer_provider() is before


def test_without_an_endpoint_there_is_nothing() -> None:
    spans, shutdown = open_spans(TelemetrySettings(), "1", dict)
    assert type(spans) is type(no_spans())
    assert spans.request(question()).attempt("a", "m").trace_parent() == ""
    shutdown()


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigurationError, match=r"stockpot\[otel\]"):
        open_spans(TelemetrySettings(otlp_endpoint="http://127.0.0.1:1"), "1", dict)


def test_an_endpoint_of_another_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="gRPC"):
        TelemetrySettings(otlp_endpoint="127.0.0.1:4317")
    with pytest.raises(ValidationError):
        TelemetrySettings(otlp_headers={"bad header": SecretStr("k")})

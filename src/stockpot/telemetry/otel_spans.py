"""The spans of requests and attempts, over the OpenTelemetry API.

Imported only where tracing is configured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from stockpot.events import Recalled
from stockpot.records import Attempt, RequestRecord
from stockpot.requests import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest, Message
from stockpot.settings_gateway import BackendSettings
from stockpot.telemetry import conventions as names
from stockpot.telemetry.causes import SERVING_FAILURES

Value = str | int | float | bool | Sequence[str]
"""What an attribute may be."""

_PROMPT_CHARACTERS_MAX = 16 * 2**10
_PART_CHARACTERS = 64
"""What a part counts for beside its text, so that very many empty ones come to an end too."""
_OUR_ENGINE: Mapping[str, Value] = {names.PROVIDER_NAME: "stockpot"}


class OtelSpans:
    """A `gateway.spans.Spans`. Contexts are passed on by hand: what is current in a task or thread is neither
    read nor set."""

    def __init__(
        self,
        tracer: Tracer,
        backends: Callable[[], Mapping[str, BackendSettings]],
        *,
        with_prompts: bool = False,
    ) -> None:
        self.tracer = tracer
        self._backends = backends
        self._with_prompts = with_prompts
        self._propagator = TraceContextTextMapPropagator()
        self._known: Mapping[str, BackendSettings] = {}
        self._facts: dict[str, Mapping[str, Value]] = {}

    def request(self, request: AnyRequest) -> OtelRequestSpan:
        """Begin the span of a request, as a child of the client's where it sent one."""
        generation = request.generation
        context = Context()  # empty: no ambient span becomes the parent
        if generation.trace_parent:
            context = self._propagator.extract({"traceparent": generation.trace_parent}, context)
        operation = names.operation_of(request)
        span = self.tracer.start_span(
            f"{operation} {generation.model}", context, SpanKind.SERVER, _asked(request, operation)
        )
        if self._with_prompts and span.is_recording():
            span.set_attribute(names.INPUT_MESSAGES, _prompt(request))
        return OtelRequestSpan(self, span, operation)

    def facts(self, backend: str) -> Mapping[str, Value]:
        """What spans say about a backend, whatever the request."""
        backends = self._backends()
        if backends is not self._known:  # at the first request, and after a reload
            self._known = backends
            self._facts = {
                name: {names.PROVIDER_NAME: names.provider_of(each), **names.address_of(each)}
                for name, each in backends.items()
            }
        return self._facts.get(backend, _OUR_ENGINE)


class OtelRequestSpan:
    """A `gateway.spans.RequestSpan`."""

    __slots__ = ("_operation", "_span", "_spans")

    def __init__(self, spans: OtelSpans, span: Span, operation: str) -> None:
        self._spans = spans
        self._span = span
        self._operation = operation

    def attempt(self, backend: str, model: str) -> OtelAttemptSpan:
        """Begin the span of one attempt."""
        attributes: dict[str, Value] = {
            names.OPERATION_NAME: self._operation,
            names.REQUEST_MODEL: model,
            names.BACKEND: backend,
            **self._spans.facts(backend),
        }
        context = set_span_in_context(self._span, Context())
        name = f"{self._operation} {model}"
        return OtelAttemptSpan(self._spans.tracer.start_span(name, context, SpanKind.CLIENT, attributes))

    def end(self, record: RequestRecord, /) -> None:
        """Say how it went."""
        span = self._span
        if span.is_recording():
            span.set_attributes(self._outcome(record))
            if record.cause in SERVING_FAILURES:
                span.set_status(Status(StatusCode.ERROR, record.cause))
        span.end()

    def _outcome(self, record: RequestRecord) -> dict[str, Value]:
        attributes: dict[str, Value] = {
            names.USAGE_INPUT_TOKENS: record.prompt_tokens,
            names.USAGE_OUTPUT_TOKENS: record.completion_tokens,
            names.USAGE_CACHE_READ: record.cached_tokens,
            names.USAGE_CACHE_CREATION: record.written_tokens,
            names.CACHE_OUTCOME: record.cache,
            names.COST_USD: record.cost.nanousd / 1e9,
            names.COST_SOURCE: record.cost.source,
            names.QUEUE_S: record.queue_s,
            names.ATTEMPTS: len(record.attempts),
        }
        if record.backend:
            attributes[names.BACKEND] = record.backend
            attributes[names.PROVIDER_NAME] = self._spans.facts(record.backend)[names.PROVIDER_NAME]
        if record.model:
            attributes[names.RESPONSE_MODEL] = record.model
        if record.finish_reason:
            attributes[names.RESPONSE_FINISH_REASONS] = (record.finish_reason,)
        if record.ttft_s is not None:
            attributes[names.TTFT_S] = record.ttft_s
            if record.stream:
                attributes[names.RESPONSE_TIME_TO_FIRST_CHUNK] = record.ttft_s
        if record.tpot_s is not None:
            attributes[names.TPOT_S] = record.tpot_s
        if record.cause is not None:
            attributes[names.ERROR_TYPE] = record.cause
        if record.estimated:
            attributes[names.TOKENS_ESTIMATED] = True
        if record.shared:
            attributes[names.SHARED] = True
        if record.notices:
            attributes[names.NOTICES] = record.notices
        if record.recalled is not None:
            attributes |= _recall(record.recalled, shared=record.shared)
        return attributes


class OtelAttemptSpan:
    """A `gateway.spans.AttemptSpan`."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    def trace_parent(self) -> str:
        """As W3C Trace Context has it. A trace that is not sampled is passed on too: the backend is to know
        that it need not record either."""
        context = self._span.get_span_context()
        if not context.is_valid:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def end(self, attempt: Attempt, /) -> None:
        """Say how it went; the model goes by the backend's own name of it from here on."""
        span = self._span
        if span.is_recording():
            attributes: dict[str, Value] = {
                names.REQUEST_MODEL: attempt.model,
                names.USAGE_INPUT_TOKENS: attempt.prompt_tokens,
                names.USAGE_OUTPUT_TOKENS: attempt.completion_tokens,
                names.USAGE_CACHE_READ: attempt.cached_tokens,
                names.USAGE_CACHE_CREATION: attempt.written_tokens,
            }
            if attempt.hedge:
                attributes[names.HEDGE] = True
            if attempt.estimated:
                attributes[names.TOKENS_ESTIMATED] = True
            if attempt.cause is not None:
                attributes[names.ERROR_TYPE] = attempt.cause
                if attempt.cause != "cancelled":  # given up here, by the client or for a faster one
                    span.set_status(Status(StatusCode.ERROR, attempt.cause))
            span.set_attributes(attributes)
        span.end()


def _recall(recalled: Recalled, *, shared: bool) -> dict[str, Value]:
    """What the caches of answers did. What it saved is said once, by the request that is not `shared`."""
    attributes: dict[str, Value] = {names.RECALL_OUTCOME: recalled.outcome}
    for name, value in (
        (names.RECALL_REASON, recalled.reason or None),
        (names.RECALL_ENTRY, recalled.entry or None),
        (names.RECALL_AGE_S, recalled.age_s),
        (names.RECALL_SIMILARITY, recalled.similarity),
        (names.RECALL_ERROR_UPPER, recalled.error_upper),
        (names.RECALL_WOULD, recalled.would or None),
    ):
        if value is not None:
            attributes[name] = value
    if recalled.is_hit and not shared:
        attributes[names.RECALL_SAVED_PROMPT_TOKENS] = recalled.saved_prompt_tokens
        attributes[names.RECALL_SAVED_OUTPUT_TOKENS] = recalled.saved_completion_tokens
        attributes[names.RECALL_SAVED_USD] = recalled.saved_nanousd / 1e9
        attributes[names.RECALL_SAVED_S] = recalled.saved_s
    return attributes


def _asked(request: AnyRequest, operation: str) -> dict[str, Value]:
    """What is known before anything was done; nothing of what the client wrote to the model."""
    generation = request.generation
    caller = generation.caller
    attributes: dict[str, Value] = {
        names.OPERATION_NAME: operation,
        names.REQUEST_MODEL: generation.model,
        names.REQUEST_ID: generation.request_id,
        names.PRIORITY: generation.priority,
    }
    for name, text in (
        (names.CLIENT_REQUEST_ID, generation.client_request_id),
        (names.CONVERSATION_ID, generation.session),
        (names.TASK, generation.task),
        (names.KEY_ID, caller.key_id),
        (names.TEAM, caller.team),
        (names.TAGS, caller.tags),
    ):
        if text:
            attributes[name] = text
    if isinstance(request, EmbeddingRequest):
        return attributes
    sampling = generation.sampling
    attributes[names.REQUEST_TEMPERATURE] = sampling.temperature
    attributes[names.REQUEST_TOP_P] = sampling.top_p
    attributes[names.OUTPUT_TYPE] = "text" if generation.output_format.kind == "text" else "json"
    if generation.stream:
        attributes[names.REQUEST_STREAM] = True
    if generation.max_tokens is not None:
        attributes[names.REQUEST_MAX_TOKENS] = generation.max_tokens
    if generation.choices != 1:
        attributes[names.REQUEST_CHOICE_COUNT] = generation.choices
    if sampling.seed is not None:
        attributes[names.REQUEST_SEED] = sampling.seed
    return attributes


def _prompt(request: AnyRequest) -> str:
    """The messages as JSON, as the conventions shape it: the last ones, as far as there is room. Token ids,
    images and what else is not text stay out."""
    left = _PROMPT_CHARACTERS_MAX
    messages: list[Mapping[str, object]] = []
    for message in reversed(_messages(request)):
        parts: list[Mapping[str, str]] = []
        for part, key in _parts(message):
            parts.append({**part, key: part[key][:left]})
            left -= len(part[key]) + _PART_CHARACTERS
            if left <= 0:
                break
        if parts:
            messages.append({"role": message.role, "parts": parts})
        if left <= 0:
            break
    return json.dumps(messages[::-1])


def _messages(request: AnyRequest) -> Sequence[Message]:
    if isinstance(request, ChatRequest):
        return request.messages
    texts = (request.prompt,) if isinstance(request, CompletionRequest) else request.inputs
    return [Message("user", text) for text in texts if isinstance(text, str)]


def _parts(message: Message) -> Iterator[tuple[Mapping[str, str], str]]:
    """Each part, and the name of its member that may be cut short."""
    if message.content:
        yield {"type": "text", "content": message.content}, "content"
    for call in message.tool_calls:
        yield (
            {"type": "tool_call", "id": call.id, "name": call.name, "arguments": call.arguments},
            "arguments",
        )

"""The OpenAI-compatible backend against a scripted server: what is sent, what comes back, every failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from tests.mock_upstream import Fault, MockUpstream, Script

from stockpot.backends.backend import Backend
from stockpot.backends.open_remote import open_remote
from stockpot.backends.openai_compatible import OpenAIBackend
from stockpot.backends.remote import Cadence
from stockpot.backends.sse_reader import BrokenStream, SseReader
from stockpot.backends.upstream_errors import retry_after_s
from stockpot.clock import SystemClock
from stockpot.errors import (
    DeadlineExceeded,
    ShuttingDown,
    UnknownModel,
    UnsupportedField,
    UpstreamError,
)
from stockpot.events import Completed, Delta, Event, Finished, Queued, Started, TokenLogprob
from stockpot.requests import (
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    OutputFormat,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from stockpot.settings_gateway import BackendSettings

pytestmark = pytest.mark.anyio

FIXTURES = Path(__file__).parent / "fixtures"
QUICK = Cadence(ready_s=0.02, failing_s=0.02, models_s=0.02)


@asynccontextmanager
async def serving(mock: MockUpstream, **settings: Any) -> AsyncGenerator[Backend]:
    """A started backend in front of a mock."""
    given: Any = {"url": mock.url, "models": {"m": "upstream-m"}, "server": "vllm", **settings}
    backend = open_remote("b", BackendSettings(**given), clock=SystemClock())
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop(drain=False)


def chat(content: str = "one two three", *messages: Message, **generation: Any) -> ChatRequest:
    return ChatRequest(Generation("m", "req-1", **generation), [*messages, Message("user", content)])


async def events_of(backend: Backend, request: ChatRequest | CompletionRequest) -> list[Event]:
    return [event async for event in backend.generate(request)]


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def completed(events: Sequence[Event]) -> Completed:
    """The last event, after checking the order of all."""
    assert isinstance(events[0], Queued)
    assert isinstance(events[1], Started)
    assert all(isinstance(event, Delta | Finished) for event in events[2:-1])
    last = events[-1]
    assert isinstance(last, Completed)
    return last


async def failure(backend: Backend, request: ChatRequest) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        await events_of(backend, request)
    return caught.value


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat(stream: bool) -> None:
    async with MockUpstream() as mock, serving(mock, api_key=SecretStr("sk-1")) as backend:
        mock.default = Script(cached_tokens=2, reasoning="hm", tool_calls=(("c1", "f", '{"a":1}'),))
        events = await events_of(backend, chat(stream=stream, trace_parent="00-aa-bb-01"))
        end = completed(events)
        assert text_of(events) == "one two three"
        assert end.usage.prompt_tokens == 3
        assert end.usage.cached_tokens == {"upstream": 2}
        assert end.usage.completion_tokens == 3
        assert not end.usage.estimated
        assert end.timings.ttft_s is not None
        deltas = [event for event in events if isinstance(event, Delta)]
        assert "".join(delta.reasoning for delta in deltas) == "hm"
        assert next(call for delta in deltas for call in delta.tool_calls).name == "f"
        assert [event.reason for event in events if isinstance(event, Finished)] == ["tool_calls"]
        sent = mock.requests[0]
        assert sent.path == "/v1/chat/completions"
        assert sent.headers["authorization"] == "Bearer sk-1"
        assert sent.headers["x-request-id"] == "req-1"
        assert sent.headers["traceparent"] == "00-aa-bb-01"
        assert sent.headers["accept-encoding"] == "identity"
        assert sent.body.get("stream", False) is stream
        assert sent.body["model"] == "upstream-m"


async def test_what_is_sent() -> None:
    sampling = Sampling(temperature=0, top_k=5, repetition_penalty=1.1, logit_bias={7: -1.0}, seed=2**64 - 1)
    request = ChatRequest(
        Generation(
            "m",
            "r",
            sampling=sampling,
            output_format=OutputFormat("json_schema", {"type": "object"}, "n", True),
            max_tokens=9,
            stop=("x",),
            logprobs=2,
            user="u",
            extras={"store": True, "model": "never this"},
        ),
        [
            Message("developer", "be brief"),
            Message("user", "look", parts=(TextPart("look"), ImagePart(media_type="image/png", data="QQ=="))),
            Message("assistant", "", tool_calls=(ToolCall("c", "f", "{}"),)),
            Message("tool", "gone", tool_call_id="c", tool_failed=True),
            Message("user", "", parts=(OpaquePart("openai", {"type": "file", "file": {}}),)),
        ],
        template_arguments={"enable_thinking": False},
        tools=(Tool("f", "does", {"type": "object"}, True),),
        tool_choice=ToolChoice("named", "f"),
        parallel_tool_calls=False,
    )
    async with MockUpstream() as mock, serving(mock) as backend:
        await events_of(backend, request)
        assert mock.requests[0].body == {
            "store": True,
            "model": "upstream-m",
            "temperature": 0,
            "top_k": 5,
            "repetition_penalty": 1.1,
            "logit_bias": {"7": -1.0},
            "seed": -1,
            "stop": ["x"],
            "user": "u",
            "max_tokens": 9,
            "logprobs": True,
            "top_logprobs": 2,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
            },
            "messages": [
                {"role": "system", "content": "be brief"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ=="}},
                    ],
                },
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                    ],
                },
                {"role": "tool", "content": "Error: gone", "tool_call_id": "c"},
                {"role": "user", "content": [{"type": "file", "file": {}}]},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "description": "does",
                        "parameters": {"type": "object"},
                        "strict": True,
                    },
                }
            ],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "parallel_tool_calls": False,
            "chat_template_kwargs": {"enable_thinking": False},
        }


async def test_what_a_generic_server_is_sent() -> None:
    async with MockUpstream() as mock, serving(mock, server="generic") as backend:
        await events_of(backend, chat(max_tokens=5))
        assert mock.requests[0].body["max_completion_tokens"] == 5
        refused: list[tuple[ChatRequest, str]] = [
            (chat(sampling=Sampling(top_k=3)), "top_k"),
            (chat(sampling=Sampling(min_p=0.1)), "min_p"),
            (chat(sampling=Sampling(repetition_penalty=2)), "repetition_penalty"),
            (chat(ignore_eos=True), "ignore_eos"),
            (replace(chat(), template_arguments={"a": 1}), "chat_template_kwargs"),
            (chat(dialect="anthropic", extras={"thinking": {"type": "enabled"}}), "thinking"),
        ]
        for request, param in refused:
            with pytest.raises(UnsupportedField) as caught:
                await events_of(backend, request)
            assert caught.value.param == param
        assert len(mock.requests) == 1


async def test_boundaries_for_another_stockpot() -> None:
    marks = (
        CacheBoundary(0, 3, 300, tags=frozenset({"t", "document:d"})),
        CacheBoundary(0, None, 3600, shared=True),
    )
    request = replace(chat("hi", Message("system", "abcdef")), boundaries=marks)
    async with MockUpstream() as mock, serving(mock, server="stockpot") as backend:
        await events_of(backend, request)
        assert mock.requests[0].body["messages"][0] == {
            "role": "system",
            "content": [
                {
                    "type": "text",
                    "text": "abc",
                    "cache_control": {"type": "ephemeral", "ttl": "5m", "tags": ["t"], "document": "d"},
                },
                {"type": "text", "text": "def"},
            ],
            "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "shared"},
        }
    async with MockUpstream() as mock, serving(mock, server="vllm") as backend:
        await events_of(backend, request)
        assert mock.requests[0].body["messages"][0] == {"role": "system", "content": "abcdef"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_plain_completion_and_two_choices(stream: bool) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        plain = CompletionRequest(Generation("m", "r", stream=stream), [1, 2, 3])
        assert text_of(await events_of(backend, plain)) == "1 2 3"
        assert mock.requests[0].body["prompt"] == [1, 2, 3]
        both = await events_of(backend, chat(choices=2))
        assert {event.choice for event in both if isinstance(event, Delta)} == {0, 1}
        assert sum(isinstance(event, Finished) for event in both) == 2


@pytest.mark.parametrize("drip_bytes", [0, 1, 7])
@pytest.mark.parametrize(
    ("name", "text", "reasoning", "reason", "prompt", "cached"),
    [
        ("openai_text", "Good morning – ☀", "", "stop", 1200, 1024),
        ("openai_tools", "", "", "tool_calls", 80, 0),
        ("vllm_reasoning", "4", "Two and two is four.", "stop", 33, 32),
        ("llama_server_text", "Hej!", "", "length", 20, 16),
    ],
)
async def test_orders_of_events(
    *, name: str, text: str, reasoning: str, reason: str, prompt: int, cached: int, drip_bytes: int
) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = Script(raw=(FIXTURES / f"{name}.sse").read_bytes(), drip_bytes=drip_bytes)
        events = await events_of(backend, chat(stream=True))
        end = completed(events)
        deltas = [event for event in events if isinstance(event, Delta)]
        assert text_of(events) == text
        assert "".join(delta.reasoning for delta in deltas) == reasoning
        finish = next(event for event in events if isinstance(event, Finished))
        assert finish.reason == reason
        assert finish.stop_sequence == ("END" if name == "vllm_reasoning" else None)
        assert (end.usage.prompt_tokens, end.usage.cached_total) == (prompt, cached)
        if name == "openai_tools":
            calls = [call for delta in deltas for call in delta.tool_calls]
            assert [(call.index, call.id, call.name) for call in calls if call.id] == [
                (0, "call_a", "weather"),
                (1, "call_b", "time"),
            ]
            assert "".join(call.arguments for call in calls if call.index == 0) == '{"city":"Oslo"}'


async def test_logprobs() -> None:
    entry = {
        "token": "é",
        "logprob": -0.5,
        "bytes": [195, 169],
        "top_logprobs": [{"token": "e", "logprob": -1}],
    }
    choice = {
        "index": 0,
        "message": {"content": "é"},
        "logprobs": {"content": [entry]},
        "finish_reason": "stop",
    }
    plain = {
        "index": 0,
        "text": "é",
        "logprobs": {"tokens": ["é"], "token_logprobs": [-0.5], "top_logprobs": [{"e": -1, "é": -0.5}]},
        "finish_reason": "stop",
    }
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.scripts += [Script(body={"choices": [choice]}), Script(body={"choices": [plain]})]
        for request in (chat(logprobs=1), CompletionRequest(Generation("m", "r", logprobs=2), "p")):
            events = await events_of(backend, request)
            delta = next(event for event in events if isinstance(event, Delta))
            assert delta.details[0].chosen == TokenLogprob(-1, "é".encode(), -0.5)
            assert TokenLogprob(-1, b"e", -1) in delta.details[0].top
            assert completed(events).usage.estimated


async def test_reasoning_tokens_are_passed_on() -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        details = {"reasoning_tokens": 5}
        mock.default = Script(
            usage={"prompt_tokens": 3, "completion_tokens": 9, "completion_tokens_details": details}
        )
        done = (await events_of(backend, chat()))[-1]
    assert isinstance(done, Completed)
    assert done.usage.reasoning_tokens == 5


async def test_usage_that_is_not_told_is_estimated() -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = Script(text="a b c", usage=False)
        usage = completed(await events_of(backend, chat("x" * 40, stream=True))).usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.estimated) == (10, 3, True)


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (400, {"error": {"message": "bad 'x'", "param": "x", "code": "bad"}}, "invalid_request"),
        (422, {"detail": [{"msg": "no"}]}, "invalid_request"),
        (413, b"<html>", "invalid_request"),
        (400, {"error": {"code": "context_length_exceeded", "message": "long"}}, "context_overflow"),
        (
            400,
            {"error": {"message": "This model's maximum context length is 10 tokens."}},
            "context_overflow",
        ),
        (
            400,
            {"error": {"type": "exceed_context_size_error", "message": "no", "code": 400}},
            "context_overflow",
        ),
        (400, {"object": "error", "message": "maximum context length is 1", "code": 400}, "context_overflow"),
        (401, {"error": {"message": "Incorrect API key sk-secret"}}, "unauthenticated"),
        (403, {"error": {"message": "sk-secret"}}, "forbidden"),
        (404, {"error": {"message": "no such model"}}, "not_found"),
        (408, {}, "timeout"),
        (429, {"error": {"message": "slow down"}}, "rate_limited"),
        (500, b"", "server_error"),
        (502, {"error": "sk-secret"}, "server_error"),
        (503, {}, "overloaded"),
        (504, {}, "timeout"),
        (529, {}, "overloaded"),
        (302, {}, "format"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_statuses(status: int, body: Any, cause: str, stream: bool) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = Script(
            status=status, body=body, headers={"location": "/elsewhere", "retry-after": "7"}
        )
        error = await failure(backend, chat(stream=stream))
        assert (error.cause, error.upstream_status, error.backend) == (cause, status, "b")
        assert "sk-secret" not in str(error)
        assert len(str(error)) < 1100
        if cause in ("rate_limited", "overloaded"):
            assert error.retry_after_s == 7
        if "bad" in str(body):
            assert "bad 'x'" in str(error)
            assert (error.param, error.code) == ("x", "bad")
        failures: dict[str, int] = backend.cache_stats()["failures"]
        assert failures == {cause: 1}
        mock.default = Script()
        assert text_of(await events_of(backend, chat())) == "one two three"


@pytest.mark.parametrize(
    ("fault", "after", "stream", "cause"),
    [
        ("reset", 0, False, "reset"),
        ("reset", 0, True, "reset"),
        ("close", 2, True, "truncated"),
        ("close", 0, False, "truncated"),
        ("hang", 0, False, "timeout"),
        ("hang", 0, True, "timeout"),
        ("hang_midway", 2, True, "timeout"),
        ("broken_sse", 1, True, "format"),
        ("broken_json", 1, True, "format"),
        ("broken_json", 1, False, "format"),
        ("error_event", 1, True, "server_error"),
    ],
)
async def test_faults(fault: Fault, after: int, stream: bool, cause: str) -> None:
    limits = {"first_byte_timeout_s": 1.0, "idle_timeout_s": 0.5}
    async with MockUpstream() as mock, serving(mock, **limits) as backend:
        mock.default = Script(fault=fault, fault_after=after, token_delay_s=0.01)
        error = await failure(backend, chat("a b c d", stream=stream))
        assert error.cause == cause
        await mock.until(lambda m: m.running == 0)
        mock.default = Script()
        assert text_of(await events_of(backend, chat(stream=stream))) == "one two three"


async def test_a_stream_that_ends_without_an_end() -> None:
    chunk = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": %s}]}\n\n'
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.scripts += [Script(raw=chunk % b"null"), Script(raw=chunk % b'"stop"'), Script(raw=b"")]
        assert (await failure(backend, chat(stream=True))).cause == "truncated"
        assert text_of(await events_of(backend, chat(stream=True))) == "a"  # whole, without [DONE]
        assert (await failure(backend, chat(stream=True))).cause == "truncated"
        error = {"error": {"type": "exceed_context_size_error", "message": "too long", "code": 500}}
        mock.scripts += [
            Script(raw=(FIXTURES / "llama_server_error.sse").read_bytes()),
            Script(body=error),
            Script(body=error, status=500),
        ]
        for _ in range(3):
            assert (await failure(backend, chat(stream=True))).cause == "context_overflow"
        mock.scripts.append(Script(body={"choices": []}))
        assert (await failure(backend, chat(stream=True))).cause == "format"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_backend_that_ignores_the_number_of_choices(stream: bool) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        one = {"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}
        chunk = b'data: {"choices": [{"index": %d, "delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'
        done = b"data: [DONE]\n\n"
        for index in (0, 7):
            body = {"choices": [{**one, "index": index}]}
            mock.scripts.append(Script(raw=chunk % index + done) if stream else Script(body=body))
            error = await failure(backend, chat(choices=2, stream=stream))
            # About the request, and so neither tried again nor held against the backend.
            assert (error.cause, error.status, error.param) == ("invalid_request", 400, "n")
            assert "choice" in str(error)
        mock.scripts.append(Script(raw=done) if stream else Script(body={"choices": []}))
        if stream:
            assert text_of(await events_of(backend, chat(stream=True))) == ""
        else:
            assert (await failure(backend, chat())).cause == "format"


async def test_no_connection() -> None:
    async with MockUpstream() as mock:
        url = mock.url
    backend = open_remote("b", BackendSettings(url=url, models={"m": "m"}), clock=SystemClock())
    await backend.start()
    try:
        assert not backend.health().ready
        assert "cannot be reached" in backend.health().reason
        assert (await failure(backend, chat())).cause == "connect"
    finally:
        await backend.stop(drain=True)
    with pytest.raises(ShuttingDown):
        await events_of(backend, chat())


@pytest.mark.parametrize("script", [Script(fault="hang"), Script(token_delay_s=0.05, text="a " * 100)])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline(script: Script, stream: bool) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = script
        with pytest.raises(DeadlineExceeded):
            await events_of(backend, chat(deadline_s=0.5, stream=stream))
        await mock.until(lambda m: m.disconnects == 1)


async def test_closing_the_stream_closes_the_connection() -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = Script(text="a b c", fault="hang_midway", fault_after=2)
        async with aclosing(backend.generate(chat(stream=True))) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break
        await mock.until(lambda m: m.disconnects == 1)
        assert backend.cache_stats()["running"] == 0
        mock.default = Script(fault="hang")
        task = asyncio.create_task(events_of(backend, chat()))
        await mock.until(lambda m: m.running == 1)
        task.cancel()
        await mock.until(lambda m: m.disconnects == 2)


async def test_stopping_without_draining() -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.scripts += [Script(text="a b c", fault="hang_midway", fault_after=2), Script(fault="hang")]
        begun, events = backend.generate(chat(stream=True)), list[Event]()
        while not isinstance(events[-1] if events else None, Delta):
            events.append(await anext(begun))
        waiting = asyncio.create_task(events_of(backend, chat(stream=True)))
        await mock.until(lambda m: m.running == 2)
        stopping = asyncio.create_task(backend.stop(drain=False))
        async with asyncio.timeout(20):  # far below the timeouts of the backend
            events += [event async for event in begun]
            with pytest.raises(ShuttingDown):
                await waiting
            await stopping
        assert completed(events).usage.estimated
        assert [event.reason for event in events if isinstance(event, Finished)] == ["cancelled"]


async def test_draining_lets_answers_end() -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = Script(token_delay_s=0.05)
        task = asyncio.create_task(events_of(backend, chat(stream=True)))
        await mock.until(lambda m: m.running == 1)
        await backend.stop(drain=True)
        assert text_of(await task) == "one two three"


async def test_connections_are_kept() -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        for turn in range(20):
            await events_of(backend, chat(stream=turn % 2 == 0))
            await asyncio.sleep(0.01)  # the end of a stream comes behind its last event
        assert mock.connections <= 10


async def test_models_are_discovered_and_followed() -> None:
    mock = MockUpstream("first")
    await mock.start()
    await mock.stop()
    settings = BackendSettings(url=mock.url)
    backend = OpenAIBackend("b", settings, clock=SystemClock(), cadence=QUICK)
    await backend.start()
    try:
        assert backend.models() == ()
        assert (await failure(backend, chat())).cause == "connect"
        await mock.start()
        await eventually(lambda: backend.health().ready)
        card = backend.models()[0]
        assert (card.id, card.context_tokens) == ("first", 4096)
        with pytest.raises(UnknownModel):
            await events_of(backend, chat())
        mock.model_list = [{"id": "m", "meta": {"n_ctx_train": 77}}]
        await eventually(lambda: [card.context_tokens for card in backend.models()] == [77])
        assert text_of(await events_of(backend, chat())) == "one two three"
        mock.model_list_status = 500
        await eventually(lambda: not backend.health().ready)
        assert [card.id for card in backend.models()] == ["m"]
    finally:
        await backend.stop(drain=True)
        await mock.stop()


async def test_a_server_without_a_list_is_well_when_its_models_are_named() -> None:
    async with MockUpstream() as mock:
        mock.model_list_status = 404
        async with serving(mock) as backend:
            assert backend.health().ready
        async with serving(mock, models={}) as backend:
            assert "name them" in backend.health().reason
        async with serving(mock, health_path="/healthz") as backend:
            assert backend.health().ready
            assert mock.probes["/healthz"] == 1


async def test_embeddings() -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        request = EmbeddingRequest(Generation("m", "r"), ["a", "b"], dimensions=2)
        answer = await backend.embed(request)
        assert (list(answer.vectors), answer.prompt_tokens) == ([[0.0, 0.5], [1.0, 0.5]], 6)
        assert mock.requests[0].body == {"model": "upstream-m", "input": ["a", "b"], "dimensions": 2}
        mock.default = Script(body={"data": []})
        with pytest.raises(UpstreamError, match="0 embeddings for 2"):
            await backend.embed(request)


@pytest.mark.parametrize("server", ["vllm", "llama-server", "stockpot"])
async def test_token_ids(server: str) -> None:
    async with MockUpstream() as mock, serving(mock, server=server) as backend:
        assert await backend.tokenize("m", chat("abc"), special=True) == list(b"abc")
        assert {request.path for request in mock.requests} <= {"/tokenize", "/apply-template"}
        if server != "stockpot":  # the mock does not know its `text`
            assert await backend.tokenize("m", "abc", special=True) == list(b"abc")
    async with MockUpstream() as mock, serving(mock, server="generic") as backend:
        with pytest.raises(UnsupportedField):
            await backend.tokenize("m", "abc", special=True)


def test_when_to_try_again() -> None:
    assert retry_after_s({"retry-after-ms": "1500", "retry-after": "9"}, 0) == 1.5
    assert retry_after_s({"retry-after": formatdate(1000, usegmt=True)}, 940) == 60
    assert retry_after_s({"retry-after": formatdate(1000, usegmt=True)}, 2000) == 0
    assert retry_after_s({"retry-after": "soon"}, 0) is None
    assert retry_after_s({"retry-after": "9" * 12}, 0) == 86_400
    assert retry_after_s({}, 0) is None


PAYLOADS = st.lists(st.text("ab ☀{}:", min_size=1).map(lambda text: text.lstrip() or "x"), max_size=5)


@given(PAYLOADS, st.sampled_from(["\n", "\r", "\r\n"]), st.lists(st.integers(1, 9), max_size=40))
def test_events_do_not_depend_on_pieces(payloads: list[str], newline: str, sizes: list[int]) -> None:
    wire = "".join(
        f": ping{newline}event: e{newline}data: {payload}{newline}id:1{newline}{newline}"
        for payload in payloads
    ).encode()
    reader, read = SseReader(), list[bytes]()
    for size in [*sizes, len(wire) + 1]:
        read += reader.feed(wire[:size])
        wire = wire[size:]
    assert read == [payload.encode() for payload in payloads]


def test_streams_that_are_none() -> None:
    assert SseReader().feed(b"data: a\ndata: b\n\nerror: {}\n\ndata\n\n") == [b"a\nb", b"{}"]
    for broken in (b"<html>\n", b'{"a": 1}\n', b"\xff\n"):
        with pytest.raises(BrokenStream):
            SseReader().feed(broken)
    reader = SseReader(event_bytes_max=100)
    with pytest.raises(BrokenStream, match="longer than 100"):
        for _ in range(200):
            reader.feed(b"x")
    reader = SseReader(event_bytes_max=100)
    with pytest.raises(BrokenStream, match="longer than 100"):
        for _ in range(200):
            reader.feed(b"data: x\n")


async def eventually(holds: Any, *, within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - a backend tells nobody when it is well again
            await asyncio.sleep(0.01)

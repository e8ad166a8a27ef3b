"""The Anthropic backend against a scripted server: what is sent, what comes back, what is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tests.mock_upstream import Fault, MockUpstream, Script

from stockpot.backends.backend import Backend
from stockpot.backends.open_remote import open_remote
from stockpot.clock import SystemClock
from stockpot.errors import RequestError, UnsupportedField, UpstreamError
from stockpot.events import Completed, Delta, Event, Finished, Queued, Started, Usage
from stockpot.requests import (
    TOOLS,
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


@asynccontextmanager
async def serving(mock: MockUpstream, **settings: Any) -> AsyncGenerator[Backend]:
    given: Any = {"kind": "anthropic", "url": mock.url, "models": {"m": "claude"}, **settings}
    backend = open_remote("a", BackendSettings(**given), clock=SystemClock())
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop(drain=False)


def chat(content: str = "one two three", **generation: Any) -> ChatRequest:
    return ChatRequest(Generation("m", "req-1", **generation), [Message("user", content)])


async def events_of(backend: Backend, request: ChatRequest | CompletionRequest) -> list[Event]:
    return [event async for event in backend.generate(request)]


def deltas_of(events: Sequence[Event]) -> list[Delta]:
    return [event for event in events if isinstance(event, Delta)]


def text_of(events: Sequence[Event]) -> str:
    return "".join(delta.text for delta in deltas_of(events))


def finish_of(events: Sequence[Event]) -> Finished:
    return next(event for event in events if isinstance(event, Finished))


def usage_of(events: Sequence[Event]) -> Usage:
    """Of the last event, after checking the order of all."""
    assert isinstance(events[0], Queued)
    assert isinstance(events[1], Started)
    assert all(isinstance(event, Delta | Finished) for event in events[2:-1])
    last = events[-1]
    assert isinstance(last, Completed)
    return last.usage


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat(stream: bool) -> None:
    async with MockUpstream() as mock, serving(mock, api_key=SecretStr("sk-1")) as backend:
        mock.default = Script(cached_tokens=2, tool_calls=(("c1", "f", '{"a":1}'), ("c2", "g", "")))
        events = await events_of(backend, chat(stream=stream))
        assert text_of(events) == "one two three"
        assert usage_of(events) == Usage(3, {"upstream": 2}, 3)
        assert finish_of(events).reason == "tool_calls"
        calls = [call for delta in deltas_of(events) for call in delta.tool_calls]
        assert [(call.index, call.id, call.name) for call in calls if call.id] == [
            (0, "c1", "f"),
            (1, "c2", "g"),
        ]
        assert "".join(call.arguments for call in calls if call.index == 0) == '{"a":1}'
        assert "".join(call.arguments for call in calls if call.index == 1) == "{}"
        sent = mock.requests[0]
        assert sent.path == "/v1/messages"
        assert sent.headers["x-api-key"] == "sk-1"
        assert sent.headers["anthropic-version"] == "2023-06-01"
        assert "authorization" not in sent.headers
        expected: dict[str, Any] = {
            "model": "claude",
            "max_tokens": 4096,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "one two three"}]}],
        }
        assert sent.body == (expected | {"stream": True} if stream else expected)


async def test_what_is_sent() -> None:
    request = ChatRequest(
        Generation(
            "m",
            "r",
            sampling=Sampling(temperature=0.5, top_p=0.9, top_k=5),
            output_format=OutputFormat("json_schema", {"type": "object"}),
            max_tokens=9,
            stop=("x",),
            user="u",
            extras={"reasoning_effort": "low", "store": False, "prompt_cache_key": "k"},
        ),
        [
            Message("system", "abcdef"),
            Message("developer", "brief"),
            Message("user", "look", parts=(TextPart("look"), ImagePart(url="https://x/y.png"))),
            Message("assistant", "", tool_calls=(ToolCall("c1", "f", '{"a":1}'), ToolCall("c2", "f", ""))),
            Message("tool", "gone", tool_call_id="c1", tool_failed=True),
            Message("tool", "there", tool_call_id="c2"),
            Message("user", "so?"),
        ],
        boundaries=(
            CacheBoundary(TOOLS, 1, 3600),
            CacheBoundary(0, 3, 300),
            CacheBoundary(3, None, 300),
            CacheBoundary(5, None, 300),
        ),
        tools=(Tool("f", "does", {"type": "object", "properties": {}}), Tool("g")),
        tool_choice=ToolChoice("required"),
        parallel_tool_calls=False,
    )
    short = {"type": "ephemeral", "ttl": "5m"}
    async with MockUpstream() as mock, serving(mock) as backend:
        assert usage_of(await events_of(backend, request)).promised_tokens == {300: 0, 3600: 0}
        assert mock.requests[0].body == {
            "model": "claude",
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "stop_sequences": ["x"],
            "metadata": {"user_id": "u"},
            "output_config": {
                "effort": "low",
                "format": {"type": "json_schema", "schema": {"type": "object"}},
            },
            "system": [
                {"type": "text", "text": "abc", "cache_control": short},
                {"type": "text", "text": "def"},
                {"type": "text", "text": "brief"},
            ],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look"},
                        {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
                        {"type": "tool_use", "id": "c2", "name": "f", "input": {}, "cache_control": short},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "c1",
                            "content": [{"type": "text", "text": "gone"}],
                            "is_error": True,
                        },
                        {
                            "type": "tool_result",
                            "tool_use_id": "c2",
                            "content": [{"type": "text", "text": "there"}],
                            "cache_control": short,
                        },
                        {"type": "text", "text": "so?"},
                    ],
                },
            ],
            "tools": [
                {"name": "f", "description": "does", "input_schema": {"type": "object", "properties": {}}},
                {
                    "name": "g",
                    "input_schema": {"type": "object"},
                    "cache_control": {"type": "ephemeral", "ttl": "1h"},
                },
            ],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        }


async def test_its_own_dialect_passes_as_it_came() -> None:
    thinking = OpaquePart("anthropic", {"type": "thinking", "thinking": "hm", "signature": "s"})
    request = ChatRequest(
        Generation(
            "m",
            "r",
            dialect="anthropic",
            user="u",
            extras={"metadata": {"user_id": "u"}, "thinking": {"type": "enabled", "budget_tokens": 1024}},
        ),
        [
            Message("user", "a"),
            Message("assistant", "b", parts=(thinking, TextPart("b"))),
            Message("system", "c"),
        ],
    )
    async with MockUpstream() as mock, serving(mock) as backend:
        await events_of(backend, request)
        body = mock.requests[0].body
        assert body["thinking"] == {"type": "enabled", "budget_tokens": 1024}
        assert body["metadata"] == {"user_id": "u"}
        assert body["messages"][1]["content"] == [dict(thinking.value), {"type": "text", "text": "b"}]
        assert body["messages"][2] == {"role": "system", "content": [{"type": "text", "text": "c"}]}


@pytest.mark.parametrize(
    ("generation", "param"),
    [
        ({"choices": 2}, "n"),
        ({"logprobs": 0}, "logprobs"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"output_format": OutputFormat("json_object")}, "response_format"),
        ({"sampling": Sampling(temperature=1.5)}, "temperature"),
        ({"sampling": Sampling(min_p=0.1)}, "min_p"),
        ({"sampling": Sampling(presence_penalty=1)}, "presence_penalty"),
        ({"sampling": Sampling(frequency_penalty=1)}, "frequency_penalty"),
        ({"sampling": Sampling(repetition_penalty=2)}, "repetition_penalty"),
        ({"sampling": Sampling(logit_bias={1: 1})}, "logit_bias"),
        ({"sampling": Sampling(seed=0)}, "seed"),
        ({"extras": {"store": True}}, "store"),
        ({"extras": {"audio": {}}}, "audio"),
    ],
)
async def test_what_cannot_be_said(generation: dict[str, Any], param: str) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        with pytest.raises(UnsupportedField) as caught:
            await events_of(backend, chat(**generation))
        assert caught.value.param == param
        assert not mock.requests


async def test_messages_that_cannot_be_said() -> None:
    generation = Generation("m", "r")
    async with MockUpstream() as mock, serving(mock) as backend:
        for message, param in (
            (Message("user", "a", "Ann"), "messages[0].name"),
            (Message("user", "", parts=(OpaquePart("openai", {"type": "file"}),)), "messages[0].content"),
            (Message("user", "", parts=(ImagePart(url="https://x", detail="low"),)), "messages[0].content"),
            (
                Message("assistant", "", tool_calls=(ToolCall("c", "f", "{nonsense"),)),
                "messages[0].tool_calls[0].function.arguments",
            ),
        ):
            with pytest.raises(RequestError) as caught:
                await events_of(backend, ChatRequest(generation, [message]))
            assert caught.value.param == param
        with pytest.raises(UnsupportedField):
            await events_of(backend, CompletionRequest(generation, "p"))
        with pytest.raises(UnsupportedField):
            await backend.embed(EmbeddingRequest(generation, ["a"]))
        with pytest.raises(UnsupportedField):
            await backend.tokenize("m", "a", special=True)
        assert not mock.requests


@pytest.mark.parametrize("drip_bytes", [0, 1, 7])
async def test_orders_of_events(drip_bytes: int) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:

        async def read(name: str) -> list[Event]:
            mock.scripts.append(Script(raw=(FIXTURES / name).read_bytes(), drip_bytes=drip_bytes))
            return await events_of(backend, chat(stream=True))

        events = await read("anthropic_text.sse")
        assert text_of(events) == "Good morning"
        assert usage_of(events) == Usage(1325, {"upstream": 1000}, 15, {300: 100, 3600: 200})
        assert finish_of(events) == Finished(0, "stop", stop_sequence="END")
        assert events[1] == Started(1325, {"upstream": 1000}, 0.0)

        events = await read("anthropic_tool_use.sse")
        calls = [call for delta in deltas_of(events) for call in delta.tool_calls]
        assert [(call.index, call.name) for call in calls if call.id] == [(0, "weather"), (1, "time")]
        assert "".join(call.arguments for call in calls if call.index == 0) == '{"city": "Oslo"}'
        assert "".join(call.arguments for call in calls if call.index == 1) == "{}"
        assert usage_of(events).promised_tokens is None

        events = await read("anthropic_thinking.sse")
        assert "".join(delta.reasoning for delta in deltas_of(events)) == "Two and two is four."
        assert [delta.signature for delta in deltas_of(events) if delta.signature] == ["c2lnbmVk"]
        assert text_of(events) == "4"

        with pytest.raises(UpstreamError) as caught:
            await read("anthropic_error.sse")
        assert caught.value.cause == "overloaded"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_turn", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("something_new", "error"),
    ],
)
async def test_reasons(reason: str, expected: str) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = Script(finish_reason=reason)
        assert finish_of(await events_of(backend, chat())).reason == expected
        assert finish_of(await events_of(backend, chat(stream=True))).reason == expected


@pytest.mark.parametrize(
    ("status", "kind", "message", "cause"),
    [
        (400, "invalid_request_error", "max_tokens: too large", "invalid_request"),
        (400, "invalid_request_error", "prompt is too long: 210000 tokens > 200000", "context_overflow"),
        (401, "authentication_error", "invalid x-api-key sk-secret", "unauthenticated"),
        (403, "permission_error", "sk-secret", "forbidden"),
        (404, "not_found_error", "model: nope", "not_found"),
        (413, "request_too_large", "too large", "invalid_request"),
        (429, "rate_limit_error", "slow", "rate_limited"),
        (500, "api_error", "internal", "server_error"),
        (529, "overloaded_error", "Overloaded", "overloaded"),
    ],
)
async def test_statuses(status: int, kind: str, message: str, cause: str) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        body = {"type": "error", "error": {"type": kind, "message": message}}
        mock.default = Script(status=status, body=body)
        with pytest.raises(UpstreamError) as caught:
            await events_of(backend, chat(stream=True))
        assert caught.value.cause == cause
        assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "stream", "cause"),
    [
        ("reset", True, "reset"),
        ("close", True, "truncated"),
        ("broken_sse", True, "format"),
        ("broken_json", True, "format"),
        ("broken_json", False, "format"),
        ("error_event", True, "overloaded"),
    ],
)
async def test_faults(fault: Fault, stream: bool, cause: str) -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = Script(fault=fault, fault_after=2, token_delay_s=0.01)
        with pytest.raises(UpstreamError) as caught:
            await events_of(backend, chat(stream=stream))
        assert caught.value.cause == cause


async def test_closing_the_stream_closes_the_connection() -> None:
    async with MockUpstream() as mock, serving(mock) as backend:
        mock.default = Script(fault="hang_midway", fault_after=1)
        async with aclosing(backend.generate(chat(stream=True))) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break
        await mock.until(lambda m: m.disconnects == 1)

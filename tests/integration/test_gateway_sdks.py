"""Both official clients, unchanged, over every kind of backend: answers, streams, tools, images, usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from tests.integration.gateway_harness import Gateway, backends, gateway
from tests.mock_upstream import MockUpstream, Script

from stockpot.backends.fake import FakeBackend, FakeBehaviour

REMOTE = ("openai", "anthropic")
KINDS = (*REMOTE, "embedded")
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = ("call_1", "get_weather", '{"city": "Paris"}')
OPENAI_TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": SCHEMA},
}
ANTHROPIC_TOOL: Any = {"name": "get_weather", "description": "Weather of a city.", "input_schema": SCHEMA}


@dataclass(frozen=True)
class World:
    """One gateway over one backend, `mock` where it is not the engine, and the clients, untyped: what is sent
    is what their users send."""

    gw: Gateway
    mock: MockUpstream
    openai: Any
    anthropic: Any
    model: str

    @property
    def sent(self) -> Any:
        """The last body the backend was sent."""
        return self.mock.requests[-1].body


@asynccontextmanager
async def world(folder: Path, kind: str) -> AsyncGenerator[World]:
    engine = FakeBackend(FakeBehaviour(accepts_all=True)) if kind == "embedded" else None
    async with MockUpstream() as mock:
        sections: dict[str, Any] = {"resilience": {"retries": 0}}
        if engine is None:
            sections["backends"] = backends(kind, a=mock)
        async with (
            gateway(folder, engine=engine, **sections) as gw,
            openai.AsyncOpenAI(base_url=f"{gw.url}/v1", api_key="unused", max_retries=0) as one,
            anthropic.AsyncAnthropic(base_url=gw.url, api_key="unused", max_retries=0) as other,
        ):
            yield World(gw, mock, one, other, "fake" if engine else "m")


@pytest.mark.parametrize("kind", KINDS)
async def test_openai_chat(tmp_path: Path, kind: str) -> None:
    async with world(tmp_path, kind) as w:
        answer = await w.openai.chat.completions.create(
            model=w.model, messages=[{"role": "user", "content": "hello there"}], max_tokens=50
        )
        assert (answer.choices[0].message.content or "").endswith("hello there")
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        record = await w.gw.record()
        assert (record.prompt_tokens, record.completion_tokens) == (
            answer.usage.prompt_tokens,
            answer.usage.completion_tokens,
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_openai_chat_as_a_stream(tmp_path: Path, kind: str) -> None:
    async with world(tmp_path, kind) as w:
        stream = await w.openai.chat.completions.create(
            model=w.model,
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text.endswith("hello there")
        usage = chunks[-1].usage
        assert usage is not None
        record = await w.gw.record()
        assert (record.prompt_tokens, record.completion_tokens) == (
            usage.prompt_tokens,
            usage.completion_tokens,
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_openai_responses(tmp_path: Path, kind: str) -> None:
    async with world(tmp_path, kind) as w:
        answer = await w.openai.responses.create(model=w.model, input="hello there", store=False)
        assert answer.output_text.endswith("hello there")
        async with w.openai.responses.stream(model=w.model, input="hello there") as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert final.output_text.endswith("hello there")
        assert final.status == "completed"


@pytest.mark.parametrize("kind", KINDS)
async def test_anthropic_messages(tmp_path: Path, kind: str) -> None:
    async with world(tmp_path, kind) as w:
        message = await w.anthropic.messages.create(
            model=w.model,
            max_tokens=50,
            system="Be brief.",
            messages=[{"role": "user", "content": "hello there"}],
        )
        [block] = message.content
        assert block.type == "text"
        assert block.text.endswith("hello there")
        assert message.stop_reason == "end_turn"
        async with w.anthropic.messages.stream(
            model=w.model, max_tokens=50, messages=[{"role": "user", "content": "hello there"}]
        ) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text.endswith("hello there")
        record = [await w.gw.record(), await w.gw.record()][1]
        usage = final.usage
        cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
        assert record.prompt_tokens == usage.input_tokens + cached
        assert record.completion_tokens == usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", REMOTE)
async def test_an_openai_client_has_a_tool_called(tmp_path: Path, kind: str, stream: bool) -> None:
    async with world(tmp_path, kind) as w:
        w.mock.default = Script(text="Let me see.", tool_calls=(CALL,))
        messages: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
        asked: dict[str, Any] = {"model": w.model, "tools": [OPENAI_TOOL], "max_tokens": 50}
        if stream:
            async with w.openai.chat.completions.stream(messages=messages, **asked) as events:
                completion: Any = await events.get_final_completion()
        else:
            completion = await w.openai.chat.completions.create(messages=messages, **asked)
        message = completion.choices[0].message
        assert completion.choices[0].finish_reason == "tool_calls"
        [call] = message.tool_calls
        assert (call.id, call.function.name) == CALL[:2]
        assert call.function.arguments.replace(" ", "") == CALL[2].replace(" ", "")
        offered = w.sent["tools"][0]
        assert offered.get("input_schema", offered.get("function", {}).get("parameters")) == SCHEMA

        w.mock.default = Script(text="It rains.")
        messages += [message.model_dump(exclude_none=True, exclude={"parsed"})]
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        after = await w.openai.chat.completions.create(messages=messages, **asked)
        assert after.choices[0].message.content == "It rains."
        last = w.sent["messages"][-1]
        if kind == "anthropic":
            assert last["content"][0]["type"] == "tool_result"
            assert last["content"][0]["tool_use_id"] == CALL[0]
        else:
            assert (last["role"], last["tool_call_id"], last["content"]) == ("tool", CALL[0], "rain")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", REMOTE)
async def test_an_anthropic_client_has_a_tool_called(tmp_path: Path, kind: str, stream: bool) -> None:
    async with world(tmp_path, kind) as w:
        w.mock.default = Script(text="Let me see.", tool_calls=(CALL,))
        messages: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
        asked: dict[str, Any] = {"model": w.model, "tools": [ANTHROPIC_TOOL], "max_tokens": 50}
        if stream:
            async with w.anthropic.messages.stream(messages=messages, **asked) as events:
                message: Any = await events.get_final_message()
        else:
            message = await w.anthropic.messages.create(messages=messages, **asked)
        assert message.stop_reason == "tool_use"
        text, call = message.content
        assert text.text == "Let me see."
        assert (call.id, call.name, call.input) == (*CALL[:2], {"city": "Paris"})

        w.mock.default = Script(text="It rains.")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
        messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        after = await w.anthropic.messages.create(messages=messages, **asked)
        assert after.content[0].text == "It rains."
        if kind == "openai":
            assert w.sent["messages"][-1]["tool_call_id"] == CALL[0]


@pytest.mark.parametrize("kind", REMOTE)
async def test_images_are_passed_through(tmp_path: Path, kind: str) -> None:
    url = "https://example.org/a.png"
    async with world(tmp_path, kind) as w:
        parts: Any = [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        await w.openai.chat.completions.create(
            model=w.model, messages=[{"role": "user", "content": parts}], max_tokens=50
        )
        from_openai = w.sent["messages"][-1]["content"]
        blocks: Any = [
            {"type": "text", "text": "What is this?"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
            {"type": "image", "source": {"type": "url", "url": url}},
        ]
        await w.anthropic.messages.create(
            model=w.model, messages=[{"role": "user", "content": blocks}], max_tokens=50
        )
        from_anthropic = w.sent["messages"][-1]["content"]
        assert from_openai == from_anthropic == (parts if kind == "openai" else blocks)


async def test_an_image_the_engine_cannot_see_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path, engine=FakeBackend()) as gw:
        image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
        body = {"model": "fake", "messages": [{"role": "user", "content": [image]}]}
        answer = await gw.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unsupported_field"


@pytest.mark.parametrize("stream", [False, True])
async def test_cache_control_reaches_anthropic_and_its_usage_comes_back(tmp_path: Path, stream: bool) -> None:
    mark: Any = {"type": "ephemeral", "ttl": "5m"}
    system: Any = [{"type": "text", "text": "A long text.", "cache_control": mark}]
    tool: Any = {**ANTHROPIC_TOOL, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": mark}]}]
    usage = {
        "input_tokens": 3,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 20,
        "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 0},
        "output_tokens": 2,
    }
    async with world(tmp_path, "anthropic") as w:
        w.mock.default = Script(text="well then", usage=usage)
        asked: dict[str, Any] = {"model": w.model, "max_tokens": 9, "system": system, "tools": [tool]}
        if stream:
            async with w.anthropic.messages.stream(messages=messages, **asked) as events:
                message = await events.get_final_message()
        else:
            message = await w.anthropic.messages.create(messages=messages, **asked)
        assert w.sent["system"][0]["cache_control"] == mark
        assert w.sent["tools"][0]["cache_control"] == {"type": "ephemeral", "ttl": "1h"}
        assert w.sent["messages"][0]["content"][0]["cache_control"] == mark
        seen = message.usage
        assert (seen.input_tokens, seen.cache_read_input_tokens, seen.cache_creation_input_tokens) == (
            3,
            100,
            20,
        )
        record = await w.gw.record()
        assert (record.prompt_tokens, record.cached_tokens, record.written_tokens) == (123, 100, 20)
        assert (record.fresh_tokens, record.completion_tokens) == (23, 2)
        # To an OpenAI client the same usage is told in its own words.
        answer = await w.openai.chat.completions.create(
            model=w.model, messages=[{"role": "user", "content": "hi"}], max_tokens=9
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (123, 100)


async def test_cached_tokens_of_an_openai_backend_are_read_from_the_cache(tmp_path: Path) -> None:
    async with world(tmp_path, "openai") as w:
        w.mock.default = Script(cached_tokens=4)
        text = "one two three four five six"
        message = await w.anthropic.messages.create(
            model=w.model, max_tokens=9, messages=[{"role": "user", "content": text}]
        )
        assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (2, 4)


@pytest.mark.parametrize("kind", REMOTE)
async def test_errors_have_the_classes_of_the_clients(tmp_path: Path, kind: str) -> None:
    hello: Any = [{"role": "user", "content": "hi"}]
    async with world(tmp_path, kind) as w:
        with pytest.raises(openai.NotFoundError):
            await w.openai.chat.completions.create(model="nothing", messages=hello)
        with pytest.raises(anthropic.NotFoundError):
            await w.anthropic.messages.create(model="nothing", messages=hello, max_tokens=9)
        w.mock.default = Script(
            status=400, body={"error": {"message": "no", "type": "invalid_request_error"}}
        )
        with pytest.raises(openai.BadRequestError):
            await w.openai.chat.completions.create(model=w.model, messages=hello, max_tokens=9)
        with pytest.raises(anthropic.BadRequestError):
            await w.anthropic.messages.create(model=w.model, messages=hello, max_tokens=9)
        w.mock.default = Script(text="one two three", fault="error_event", fault_after=1)
        stream = await w.openai.chat.completions.create(
            model=w.model, messages=hello, max_tokens=9, stream=True
        )
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass
        with pytest.raises(anthropic.APIStatusError):
            async with w.anthropic.messages.stream(model=w.model, messages=hello, max_tokens=9) as events:
                await events.get_final_message()
        w.mock.default = Script(status=429, headers={"retry-after": "3"})
        with pytest.raises(openai.RateLimitError):
            await w.openai.chat.completions.create(model=w.model, messages=hello, max_tokens=9)
        with pytest.raises(anthropic.RateLimitError):
            await w.anthropic.messages.create(model=w.model, messages=hello, max_tokens=9)

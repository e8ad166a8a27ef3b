"""Tools, images and fields of remote backends: from the wire to the backend and back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import openai
import pytest

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.events import Completed, Delta, Event, Finished, Queued, Timings, ToolCallDelta, Usage
from stockpot.requests import (
    TOOLS,
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    OpaquePart,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}
CALL: dict[str, Any] = {
    "id": "call_7",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Rain?"}]


class RecordingBackend(FakeBackend):
    """Takes everything and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(FakeBehaviour(accepts_all=True))
        self.asked: list[ChatRequest | CompletionRequest] = []

    def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        self.asked.append(request)
        return super().generate(request)

    @property
    def chat(self) -> ChatRequest:
        """The last that was asked."""
        request = self.asked[-1]
        assert isinstance(request, ChatRequest)
        return request


class ScriptedBackend(FakeBackend):
    """Answers with the events it was given."""

    def __init__(self, *events: Event) -> None:
        super().__init__(FakeBehaviour(accepts_all=True))
        self._events = events

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        del request
        yield Queued(0)
        for event in self._events:
            yield event
        yield Completed(Usage(3, {}, 2), Timings(0.0, 0.1, 0.2))


@pytest.fixture(scope="module")
def remote() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture(scope="module")
def gateway(remote: RecordingBackend, serve: Serve) -> Generator[httpx2.Client, None, None]:
    """A client of a server over `remote`."""
    with serve(remote) as client:
        yield client


def chat(client: httpx2.Client, messages: Any = ASK, **fields: Any) -> httpx2.Response:
    body = {"model": "fake", "messages": messages, **fields}
    return client.post("/v1/chat/completions", json=body)


def refused(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    return response.json()["error"]


def chunks(response: httpx2.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_tools_reach_the_backend(gateway: httpx2.Client, remote: RecordingBackend) -> None:
    marked = {**WEATHER, "cache_control": {"type": "ephemeral"}}
    response = chat(gateway, tools=[WEATHER, marked], tool_choice="auto", parallel_tool_calls=False)
    assert response.status_code == 200, response.text
    function = WEATHER["function"]
    tool = Tool("weather", function["description"], function["parameters"], True)
    assert remote.chat.tools == (tool, tool)
    assert remote.chat.tool_choice == ToolChoice("auto")
    assert remote.chat.parallel_tool_calls is False
    assert remote.chat.boundaries == (CacheBoundary(TOOLS, 1, 300),)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_is_the_answer(gateway: httpx2.Client, choice: Any) -> None:
    body = chat(gateway, tools=[WEATHER], tool_choice=choice).json()["choices"][0]
    assert body["finish_reason"] == "tool_calls"
    assert body["message"]["content"] is None
    (call,) = body["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    # The answer goes back whole, with the tool's own answer behind it.
    turns = [*ASK, body["message"], {"role": "tool", "tool_call_id": call["id"], "content": "Rain."}]
    assert chat(gateway, turns, tools=[WEATHER]).status_code == 200


def test_a_streamed_call_comes_in_the_pieces_of_the_api(gateway: httpx2.Client) -> None:
    told = chunks(chat(gateway, tools=[WEATHER], tool_choice="required", stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in told]
    assert deltas[0] == {"role": "assistant", "content": None}
    first = {
        "index": 0,
        "id": "call_0",
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert deltas[1] == {"tool_calls": [first]}
    assert deltas[2] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}
    assert deltas[-1] == {}
    assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_official_client_puts_a_streamed_call_together(gateway: httpx2.Client) -> None:
    tool: Any = WEATHER
    messages: Any = ASK
    with (
        openai.OpenAI(base_url=f"{gateway.base_url}/v1", api_key="unused", max_retries=0) as official,
        official.chat.completions.stream(
            model="fake", messages=messages, tools=[tool], tool_choice="required"
        ) as stream,
    ):
        answer = stream.get_final_completion().choices[0].message
    assert answer.tool_calls is not None
    assert answer.tool_calls[0].function.name == "weather"
    assert answer.tool_calls[0].function.arguments == '{"city": "Paris"}'


def test_turns_with_calls_reach_the_backend(gateway: httpx2.Client, remote: RecordingBackend) -> None:
    turns = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}], "refusal": None},
        {"role": "tool", "tool_call_id": "call_7", "content": [{"type": "text", "text": "Rain."}]},
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "Again?"},
        {"role": "assistant", "content": None, "refusal": "No."},
    ]
    response = chat(gateway, turns)
    assert response.status_code == 200, response.text
    _, called, answered, again, declined = remote.chat.messages
    assert called.tool_calls == again.tool_calls == (ToolCall("call_7", "weather", '{"city": "Oslo"}'),)
    assert called.content == again.content == ""
    assert (answered.role, answered.content, answered.tool_call_id) == ("tool", "Rain.", "call_7")
    assert declined.content == "No."


def test_images_and_other_parts_reach_the_backend(gateway: httpx2.Client, remote: RecordingBackend) -> None:
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    content = [
        {"type": "text", "text": "What "},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/PNG;base64,iVBORw0KGgo="}},
        audio,
        {"type": "text", "text": "is this?", "cache_control": {"type": "ephemeral"}},
    ]
    assert chat(gateway, [{"role": "user", "content": content}]).status_code == 200
    (message,) = remote.chat.messages
    assert message.content == "What is this?"
    assert message.parts == (
        TextPart("What "),
        ImagePart(url="https://example.org/a.png", detail="low"),
        ImagePart(media_type="image/png", data="iVBORw0KGgo="),
        OpaquePart("openai", audio),
        TextPart("is this?"),
    )
    assert remote.chat.boundaries == (CacheBoundary(0, 13, 300),)


@pytest.mark.parametrize(
    "url", ["x", "ftp://example.org/a.png", "data:text/html;base64,AA", "data:image/png,A"]
)
def test_an_image_is_nowhere_else(gateway: httpx2.Client, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    error = refused(chat(gateway, [{"role": "user", "content": content}]))
    assert error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{**WEATHER, "speed": 1}]}, "tools[0].speed"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name",
        ),
        ({"functions": [WEATHER["function"]]}, "functions"),
        ({"function_call": {"name": "weather"}}, "function_call"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"no name": 1}, "no name"),
        ({"x" * 65: 1}, "x" * 65),
    ],
)
def test_what_nobody_understands_is_refused_at_the_edge(
    gateway: httpx2.Client, fields: dict[str, Any], param: str
) -> None:
    assert refused(chat(gateway, **{"messages": ASK, **fields}))["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_our_own_engine_refuses_what_it_cannot_do(
    client: httpx2.Client, fields: dict[str, Any], param: str
) -> None:
    error = refused(chat(client, **{"messages": ASK, **fields}))
    assert (error["param"], error["code"]) == (param, "unsupported_field")


def test_fields_of_remote_backends_reach_them_as_they_came(
    gateway: httpx2.Client, remote: RecordingBackend
) -> None:
    extras = {"reasoning_effort": "high", "service_tier": "flex", "metadata": {"a": "b"}, "guided_grammar": 7}
    assert chat(gateway, **extras).status_code == 200
    assert remote.chat.generation.extras == extras
    response = gateway.post("/v1/completions", json={"model": "fake", "prompt": "x", "suffix": "y"})
    assert response.status_code == 200
    assert remote.asked[-1].generation.extras == {"suffix": "y"}


def test_reasoning_and_refusals_are_told_apart_from_the_text(serve: Serve) -> None:
    script = (
        Delta(0, "", reasoning="Hmm, "),
        Delta(0, "", reasoning="no."),
        Delta(0, "", refusal="I will not."),
        Finished(0, "content_filter"),
    )
    with serve(ScriptedBackend(*script)) as client:
        choice = chat(client).json()["choices"][0]
        told = [chunk["choices"][0] for chunk in chunks(chat(client, stream=True))]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": "I will not.",
        "reasoning_content": "Hmm, no.",
    }
    assert choice["finish_reason"] == told[-1]["finish_reason"] == "content_filter"
    assert [one["delta"] for one in told[1:]] == [
        {"reasoning_content": "Hmm, "},
        {"reasoning_content": "no."},
        {"refusal": "I will not."},
        {},
    ]


def test_calls_of_one_choice_are_kept_apart(serve: Serve) -> None:
    pieces = (
        ToolCallDelta(0, "a", "f", "{"),
        ToolCallDelta(1, "b", "g", "["),
        ToolCallDelta(0, arguments="}"),
        ToolCallDelta(1, arguments="]"),
    )
    script = (
        Delta(0, "Both."),
        *(Delta(0, "", tool_calls=(piece,)) for piece in pieces),
        Finished(0, "tool_calls"),
    )
    with serve(ScriptedBackend(*script)) as client:
        message = chat(client).json()["choices"][0]["message"]
    assert message["content"] == "Both."
    calls = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message["tool_calls"]
    ]
    assert calls == [("a", "f", "{}"), ("b", "g", "[]")]

"""/v1/messages over HTTP: what the backend is asked, and what is refused, in the Anthropic API's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.events import Completed, Delta, Event, Finished, Queued, Started, Timings, Usage
from stockpot.requests import (
    TOOLS,
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    Message,
    OpaquePart,
    OutputFormat,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from stockpot.settings import AccessSettings
from stockpot.wire.shapes_anthropic import MessagesShape

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

PATH = "/v1/messages"
GOOD: dict[str, Any] = {
    "model": "fake",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "hi"}],
}
EPHEMERAL: dict[str, Any] = {"type": "ephemeral"}
HOUR: dict[str, Any] = {"type": "ephemeral", "ttl": "1h"}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
}


class RecordingBackend(FakeBackend):
    """Remembers what it was asked, takes everything, and answers one word."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[ChatRequest] = []

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        assert isinstance(request, ChatRequest)
        self.asked.append(request)
        yield Queued(0)
        yield Started(10, {}, 0.0)
        yield Delta(0, "Yes.", (1,))
        yield Finished(0, "stop")
        yield Completed(Usage(10, {}, 1), Timings(0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def recording() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture(scope="module")
def open_client(serve: Serve, recording: RecordingBackend) -> Generator[httpx2.Client, None, None]:
    """A client of a server whose backend takes everything."""
    with serve(recording) as client:
        yield client


@pytest.fixture
def ask(open_client: httpx2.Client, recording: RecordingBackend) -> Callable[..., ChatRequest]:
    """What the backend is asked for a body of these fields."""

    def ask(headers: dict[str, str] | None = None, **fields: Any) -> ChatRequest:
        response = open_client.post(PATH, json={**GOOD, **fields}, headers=headers)
        assert response.status_code == 200, response.text
        return recording.asked.pop()

    return ask


def refused(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """The error, whose shape is the API's; `code` and `param` are where the official client looks."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() <= {"type", "error", "request_id"}
    assert body["type"] == "error"
    error = body["error"]
    assert error.keys() == {"type", "message", "details"}
    return {**error, "code": error["details"]["error_code"], "param": error["details"].get("param")}


def test_sampling_and_bounds(ask: Callable[..., ChatRequest]) -> None:
    generation = ask(
        temperature=0.5, top_p=0.9, top_k=40, stop_sequences=["END"], timeout=20, metadata={"user_id": "u-1"}
    ).generation
    assert (generation.sampling.temperature, generation.sampling.top_p) == (0.5, 0.9)
    assert (generation.sampling.top_k, generation.max_tokens, generation.stop) == (40, 64, ("END",))
    assert (generation.dialect, generation.stream, generation.deadline_s) == ("anthropic", False, 20)
    assert (generation.user, generation.session) == ("u-1", "u-1")
    assert generation.extras == {"metadata": {"user_id": "u-1"}}


def test_attribution_comes_from_headers(ask: Callable[..., ChatRequest]) -> None:
    generation = ask(
        {"x-stockpot-session": "s-1", "x-stockpot-task": "t-1", "x-stockpot-priority": "high"},
        metadata={"user_id": "u-1"},
    ).generation
    assert (generation.session, generation.task, generation.priority) == ("s-1", "t-1", "high")


def test_texts_join_and_the_system_prompt_comes_first(ask: Callable[..., ChatRequest]) -> None:
    asked = ask(
        system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "c", "citations": None}]},
            {"role": "system", "content": "From now on in French."},
            {"role": "user", "content": "d"},
        ],
    )
    assert list(asked.messages) == [
        Message("system", "Be brief."),
        Message("user", "ab"),
        Message("assistant", "c"),
        Message("system", "From now on in French."),
        Message("user", "d"),
    ]


def test_tools_their_calls_and_their_results(ask: Callable[..., ChatRequest]) -> None:
    asked = ask(
        tools=[WEATHER, {**WEATHER, "name": "other", "type": "custom", "strict": True}],
        tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
        messages=[
            {"role": "user", "content": "Paris? Rome?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"place": "Paris"}},
                    {
                        "type": "tool_use",
                        "id": "t2",
                        "name": "get_weather",
                        "input": {},
                        "caller": {"type": "direct"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "Sun"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no "}, {"type": "text", "text": "place"}],
                    },
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
    )
    schema = WEATHER["input_schema"]
    assert asked.tools == (
        Tool("get_weather", "Weather of a place.", schema),
        Tool("other", "Weather of a place.", schema, strict=True),
    )
    assert asked.tool_choice == ToolChoice("named", "get_weather")
    assert asked.parallel_tool_calls is False
    assert list(asked.messages[1:]) == [
        Message(
            "assistant",
            "Let me see.",
            tool_calls=(
                ToolCall("t1", "get_weather", '{"place":"Paris"}'),
                ToolCall("t2", "get_weather", "{}"),
            ),
        ),
        Message("tool", "Sun", tool_call_id="t1"),
        Message("tool", "no place", tool_call_id="t2", tool_failed=True),
        Message("user", "And now?"),
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none")],
)
def test_choices_of_tools(ask: Callable[..., ChatRequest], choice: dict[str, Any], expected: Any) -> None:
    asked = ask(tools=[WEATHER], tool_choice=choice)
    assert asked.tool_choice == ToolChoice(expected)
    assert asked.parallel_tool_calls is None


def test_what_is_no_text_stands_in_order_among_the_parts(ask: Callable[..., ChatRequest]) -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "abc"}
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
    upload = {"type": "image", "source": {"type": "file", "file_id": "f"}}
    asked = ask(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
                    {"type": "text", "text": "and"},
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"},
                    },
                    {**document, "cache_control": EPHEMERAL},
                    upload,
                ],
            },
            {"role": "assistant", "content": [thinking, {"type": "text", "text": "Two."}]},
            {"role": "user", "content": "Go on."},
        ]
    )
    user, assistant, _ = asked.messages
    assert (user.content, assistant.content) == ("and", "Two.")
    assert user.parts == (
        ImagePart(url="https://example.org/a.png"),
        TextPart("and"),
        ImagePart(media_type="image/png", data="iVBO"),
        OpaquePart("anthropic", document),
        OpaquePart("anthropic", upload),
    )
    assert assistant.parts == (OpaquePart("anthropic", thinking), TextPart("Two."))
    assert asked.boundaries == (CacheBoundary(0, 3, 300),)


def test_boundaries_stand_where_the_client_put_them(ask: Callable[..., ChatRequest]) -> None:
    asked = ask(
        tools=[WEATHER, {**WEATHER, "name": "other", "cache_control": HOUR}],
        system=[
            {"type": "text", "text": "Rules.", "cache_control": {**HOUR, "scope": "shared", "tags": ["t"]}},
            {"type": "text", "text": "More."},
        ],
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": "x", "cache_control": EPHEMERAL},
                    {"type": "text", "text": "hi"},
                ],
            }
        ],
        cache_control={**EPHEMERAL, "document": "d"},
    )
    assert asked.boundaries == (
        CacheBoundary(TOOLS, 1, 3600),
        CacheBoundary(0, 6, 3600, shared=True, tags=frozenset({"t"})),
        CacheBoundary(1, None, 300),
        CacheBoundary(2, None, 300, tags=frozenset({"document:d"})),
    )


def test_what_is_not_read_here_goes_on_as_it_came(ask: Callable[..., ChatRequest]) -> None:
    generation = ask(
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        service_tier="standard_only",
        container=None,
        context_management={"edits": []},
    ).generation
    assert generation.output_format == OutputFormat("json_schema", {"type": "object"}, strict=True)
    assert generation.extras == {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low"},
        "service_tier": "standard_only",
        "context_management": {"edits": []},
    }
    assert ask(thinking={"type": "disabled"}).generation.extras == {}


_CALL: dict[str, Any] = {"type": "tool_use", "id": "t", "name": "n", "input": {}}
_RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "t"}


def _said(role: str, *blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "7"),
        (_said("user", {"text": "x"}), "messages[0].content[0].type", "missing"),
        (_said("user", 7), "messages[0].content[0]", "object"),
        (_said("user", {"type": "text"}), "messages[0].content[0].text", "missing"),
        (_said("user", {"type": "text", "text": "x", "size": 1}), "messages[0].content[0].size", "supported"),
        (_said("user", {"type": "image"}), "messages[0].content[0].source", "missing"),
        (
            _said("user", {"type": "image", "source": {"type": "base64", "media_type": "a/b", "data": "x"}}),
            "messages[0].content[0].source.media_type",
            "a/b",
        ),
        (
            _said("user", {"type": "image", "source": {"type": "url", "url": "file:///etc"}}),
            "messages[0].content[0].source.url",
            "https",
        ),
        (_said("user", _CALL), "messages[0].content[0].type", "'user'"),
        (_said("assistant", _RESULT), "messages[0].content[0].type", "'assistant'"),
        (_said("system", {"type": "document"}), "messages[0].content[0].type", "'system'"),
        (_said("assistant", {**_CALL, "input": "{}"}), "messages[0].content[0].input", "'{}'"),
        (
            _said("user", {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "2h"}}),
            "messages[0].content[0].cache_control.ttl",
            "2h",
        ),
        (
            _said("user", *[{"type": "text", "text": "x", "cache_control": EPHEMERAL}] * 5),
            "cache_control",
            "5",
        ),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": None}, "max_tokens", "null"),
        ({"temperature": 1.5}, "temperature", "at most 1"),
        ({"top_k": -1}, "top_k", "at least 0"),
        ({"stop_sequences": "END"}, "stop_sequences", "list"),
        ({"system": 7}, "system", "7"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "missing"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "tools"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name", "'x'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name", "both"),
        ({"timeout": 61.0}, "timeout", "60"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type", "xml"),
    ],
)
def test_values_that_do_not_fit(
    open_client: httpx2.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(open_client.post(PATH, json={**GOOD, **fields}))
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"banana": 1}, "banana"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"metadata": {"tenant": "x"}}, "metadata.tenant"),
    ],
)
def test_fields_that_cannot_be_honoured(
    open_client: httpx2.Client, fields: dict[str, Any], param: str
) -> None:
    error = refused(open_client.post(PATH, json={**GOOD, **fields}))
    assert (error["param"], error["code"]) == (param, "unsupported_field")


def test_bodies_keys_and_paths_are_refused_in_this_shape(serve: Serve) -> None:
    access = AccessSettings.model_validate({"tenants": {"ours": {"key": "k" * 20}}})
    with serve(FakeBackend(), access=access, max_body_bytes=1024) as client:
        nobody = client.post(PATH, json=GOOD)
        assert refused(nobody, 401)["type"] == "authentication_error"
        assert nobody.json()["request_id"] == nobody.headers["x-request-id"]
        assert refused(client.post(f"{PATH}/count_tokens", json=GOOD), 401)
        client.headers["x-api-key"] = "k" * 20
        assert client.post(PATH, json=GOOD).status_code == 200
        text = client.post(PATH, content="{", headers={"content-type": "application/json"})
        assert refused(text)["code"] == "invalid_json"
        big = client.post(PATH, json={**GOOD, "system": "x" * 2000})
        assert refused(big, 413)["type"] == "request_too_large"
        assert refused(client.get(f"{PATH}/batches"), 404)["type"] == "not_found_error"
        assert refused(client.get(PATH), 405)["type"] == "invalid_request_error"
        unknown = client.post(PATH, json={**GOOD, "model": "other", "stream": True})
        assert refused(unknown, 404)["type"] == "not_found_error"


def test_an_error_inside_a_stream_is_an_event(serve: Serve) -> None:
    with serve(FakeBackend(FakeBehaviour(fail_after_tokens=1))) as client:
        response = client.post(PATH, json={**GOOD, "stream": True})
    assert response.status_code == 200
    *_, last, end = response.text.split("\n\n")
    assert end == ""
    name, data = last.split("\n")
    assert name == "event: error"
    body = json.loads(data.removeprefix("data: "))
    assert (body["type"], body["error"]["type"]) == ("error", "api_error")
    assert "[DONE]" not in response.text


def test_a_stream_ends_with_message_stop(client: httpx2.Client) -> None:
    response = client.post(PATH, json={**GOOD, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    names = [line.removeprefix("event: ") for line in response.text.split("\n") if line.startswith("event: ")]
    assert names == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "[DONE]" not in response.text


def test_tokens_are_counted(client: httpx2.Client) -> None:
    fields = {name: value for name, value in GOOD.items() if name != "max_tokens"}
    response = client.post(f"{PATH}/count_tokens", json=fields)
    assert response.json() == {"input_tokens": len("<user>hi\n")}
    assert refused(client.post(f"{PATH}/count_tokens", json=GOOD))["param"] == "max_tokens"
    assert refused(client.post(f"{PATH}/count_tokens", json={**fields, "model": "x"}), 404)


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
_TYPES = st.sampled_from(["text", "image", "tool_use", "tool_result", "thinking", "url", "base64"])
_ANYTHING = st.recursive(
    _SCALARS | _TYPES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["type", "text", "source", "content", "input", "role"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    fields=st.dictionaries(st.sampled_from(list(MessagesShape.model_fields)), _ANYTHING, max_size=3),
    blocks=st.lists(_ANYTHING, max_size=3),
)
def test_no_json_whatever_makes_the_server_fail(
    open_client: httpx2.Client, fields: dict[str, Any], blocks: list[Any]
) -> None:
    for body in ({**GOOD, **fields}, {**GOOD, **_said("user", *blocks)}):
        response = open_client.post(PATH, content=json.dumps(body, allow_nan=False), headers=_JSON)
        assert response.status_code in {200, 400}, response.text


_JSON = {"content-type": "application/json"}

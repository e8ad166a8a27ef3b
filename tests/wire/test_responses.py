"""/v1/responses: what the backend is asked, what comes back, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import pytest

from stockpot.backends.fake import FakeBackend
from stockpot.events import Completed, Delta, Event, Finished, Queued, Started, Timings, ToolCallDelta, Usage
from stockpot.requests import (
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

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

PATH = "/v1/responses"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}


class RecordingBackend(FakeBackend):
    """Remembers what it was asked, takes everything, and answers what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[ChatRequest] = []
        self.answer: Sequence[Delta | Finished] = (Delta(0, "yes"), Finished(0, "stop"))

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        assert isinstance(request, ChatRequest)
        self.asked.append(request)
        yield Queued(0)
        yield Started(7, {"ram": 3}, 0.0)
        for event in self.answer:
            yield event
        yield Completed(Usage(7, {"ram": 3}, 1, {300: 2}), Timings(0.0, 0.1, 0.2))


@pytest.fixture(scope="module")
def recording() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture(scope="module")
def asking(serve: Serve, recording: RecordingBackend) -> Generator[httpx2.Client, None, None]:
    with serve(recording) as client:
        yield client


@pytest.fixture
def ask(
    asking: httpx2.Client, recording: RecordingBackend
) -> Callable[..., tuple[ChatRequest, dict[str, Any]]]:
    """Sends fields; gives what the backend was asked and the answer's body."""

    def ask(headers: dict[str, str] | None = None, **fields: Any) -> tuple[ChatRequest, dict[str, Any]]:
        body = {"model": "fake", "input": "hi", **fields}
        response = asking.post(PATH, json=body, headers=headers)
        assert response.status_code == 200, response.text
        return recording.asked[-1], response.json()

    return ask


Ask = Callable[..., tuple[ChatRequest, dict[str, Any]]]


def test_a_text_and_instructions(ask: Ask) -> None:
    asked, answer = ask(instructions="Be brief.", max_output_tokens=9, temperature=0.5, top_p=0.9)
    assert asked.messages == (Message("developer", "Be brief."), Message("user", "hi"))
    assert asked.generation.max_tokens == 9
    assert (asked.generation.sampling.temperature, asked.generation.sampling.top_p) == (0.5, 0.9)
    assert answer["object"] == "response"
    assert answer["id"] == asked.generation.request_id
    assert answer["status"] == "completed"
    assert answer["store"] is False
    assert answer["instructions"] == "Be brief."
    assert answer["max_output_tokens"] == 9
    [item] = answer["output"]
    assert item["type"] == "message"
    assert item["status"] == "completed"
    assert item["content"] == [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}]
    assert answer["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
        "output_tokens": 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }
    assert answer["stockpot"]["cached_tokens"]["ram"] == 3


def test_items_become_turns(ask: Ask) -> None:
    """An answer and its calls are one turn; what this server answers can be sent back as it is."""
    asked, _ = ask(
        input=[
            {"role": "system", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [], "status": "completed"},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "Let me ", "annotations": [], "logprobs": []},
                    {"type": "output_text", "text": "see."},
                ],
            },
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "c1",
                "name": "get_weather",
                "arguments": "{}",
            },
            {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "sun"}],
            },
            {"role": "assistant", "content": "Mixed."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
            {"role": "user", "content": "thanks"},
        ]
    )
    assert asked.messages == (
        Message("system", "Be brief."),
        Message("user", "Weather?"),
        Message(
            "assistant",
            "Let me see.",
            tool_calls=(ToolCall("c1", "get_weather", "{}"), ToolCall("c2", "get_weather", "{}")),
        ),
        Message("tool", "rain", tool_call_id="c1"),
        Message("tool", "sun", tool_call_id="c2"),
        Message("assistant", "Mixed."),
        Message("assistant", "No more."),
        Message("user", "thanks"),
    )


def test_images_files_and_sound(ask: Ask) -> None:
    sound = {"data": "AAAA", "format": "wav"}
    asked, _ = ask(
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What is "},
                    {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "low"},
                    {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"},
                    {"type": "input_file", "file_data": "BBBB", "filename": "b.pdf"},
                    {"type": "input_audio", "input_audio": sound},
                    {"type": "input_text", "text": "this?"},
                ],
            }
        ]
    )
    [message] = asked.messages
    assert message.content == "What is this?"
    assert message.parts == (
        TextPart("What is "),
        ImagePart(url="https://example.com/a.png", detail="low"),
        ImagePart(media_type="image/png", data="AAAA", detail="auto"),
        OpaquePart("openai", {"type": "file", "file": {"file_data": "BBBB", "filename": "b.pdf"}}),
        OpaquePart("openai", {"type": "input_audio", "input_audio": sound}),
        TextPart("this?"),
    )


def test_tools(ask: Ask) -> None:
    asked, answer = ask(
        tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"}, parallel_tool_calls=False
    )
    assert asked.tools == (Tool("get_weather", "Weather of a place.", WEATHER["parameters"], True),)
    assert asked.tool_choice == ToolChoice("named", "get_weather")
    assert asked.parallel_tool_calls is False
    assert answer["tools"] == [WEATHER]
    assert answer["tool_choice"] == {"type": "function", "name": "get_weather"}
    asked, answer = ask(tools=[WEATHER], tool_choice="required")
    assert asked.tool_choice == ToolChoice("required")
    assert answer["tool_choice"] == "required"


def test_the_format_of_the_text(ask: Ask) -> None:
    schema = {"type": "object"}
    given = {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}
    asked, answer = ask(text={"format": given})
    assert asked.generation.output_format == OutputFormat("json_schema", schema, "thing", True)
    assert answer["text"] == {"format": given}
    asked, answer = ask(text={"format": {"type": "json_object"}})
    assert asked.generation.output_format == OutputFormat("json_object")
    asked, answer = ask()
    assert asked.generation.output_format == OutputFormat()
    assert answer["text"] == {"format": {"type": "text"}}


def test_annotations_and_what_goes_on_to_backends_of_the_same_dialect(ask: Ask) -> None:
    asked, answer = ask(
        {"x-stockpot-task": "t-1", "x-stockpot-tags": "a, b"},
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low"},
        metadata={"topic": "demo"},
        user="u1",
        prompt_cache_key="chat-7",
        service_tier="flex",
        safety_identifier="s1",
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        store=False,
        background=False,
        previous_response_id=None,
    )
    generation = asked.generation
    assert generation.extras == {
        "prompt_cache_key": "chat-7",
        "safety_identifier": "s1",
        "service_tier": "flex",
        "user": "u1",
        "reasoning_effort": "low",
        "verbosity": "low",
    }
    assert (generation.session, generation.user, generation.task) == ("chat-7", "u1", "t-1")
    assert generation.caller.tags == ("a", "b")
    assert answer["metadata"] == {"topic": "demo"}
    assert answer["reasoning"] == {"effort": "low", "summary": None}


def test_log_probabilities(client: httpx2.Client) -> None:
    asking: dict[str, Any] = {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    answer = client.post(PATH, json={"model": "fake", "input": "hi", **asking}).json()
    [part] = answer["output"][0]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == ["You ", "said: ", "hi"]
    assert len(part["logprobs"][0]["top_logprobs"]) == 2


def test_reasoning_text_and_calls_are_items_of_their_own(ask: Ask, recording: RecordingBackend) -> None:
    before = recording.answer
    recording.answer = (
        Delta(0, "", reasoning="hmm"),
        Delta(0, "Let me see."),
        Delta(0, "", tool_calls=(ToolCallDelta(0, "c1", "get_weather"), ToolCallDelta(0, arguments="{}"))),
        Delta(0, "", tool_calls=(ToolCallDelta(1, "c2", "get_weather", '{"a":1}'),)),
        Finished(0, "tool_calls"),
    )
    try:
        _, answer = ask(tools=[WEATHER])
    finally:
        recording.answer = before
    reasoning, message, one, two = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hmm"}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "Let me see."
    assert (one["call_id"], one["name"], one["arguments"]) == ("c1", "get_weather", "{}")
    assert (two["call_id"], two["name"], two["arguments"]) == ("c2", "get_weather", '{"a":1}')
    assert len({item["id"] for item in answer["output"]}) == 4
    # All of it can be sent back.
    outputs = [{"type": "function_call_output", "call_id": call, "output": "ok"} for call in ("c1", "c2")]
    asked, _ = ask(input=[{"role": "user", "content": "hi"}, *answer["output"], *outputs])
    assert [message.role for message in asked.messages] == ["user", "assistant", "tool", "tool"]


@pytest.mark.parametrize(
    ("reason", "why"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_cut_off(ask: Ask, recording: RecordingBackend, reason: Any, why: str) -> None:
    before = recording.answer
    recording.answer = (Delta(0, "ye"), Finished(0, reason))
    try:
        _, answer = ask()
    finally:
        recording.answer = before
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": why}
    assert answer["completed_at"] is None
    assert answer["output"][0]["status"] == "incomplete"


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(content)}]}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"store": True}, "store", "keeps no answers"),
    ({"background": True}, "background", "send false"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
    ({"conversation": {"id": "conv_1"}}, "conversation", "whole conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "keeps no prompts"),
    ({"truncation": "auto"}, "truncation", "'disabled'"),
    ({"surprise": 1}, "surprise", "not supported"),
    ({"input": []}, "input", "at least 1 item"),
    ({"input": 3}, "input", "valid string"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "nothing is stored"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", "message"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
    ({"input": [{"role": "judge", "content": "x"}]}, "input[0].role", "'user'"),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f"}]},
        "input[0].arguments",
        "missing",
    ),
    (
        {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
        "input[0].encrypted_content",
        "provider that made it",
    ),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input", "nothing but reasoning"),
    (user({"type": "input_image", "file_id": "file-1"}), "input[0].content[0].file_id", "image_url"),
    (user({"type": "input_image"}), "input[0].content[0].image_url", "missing"),
    (
        user({"type": "input_image", "image_url": "data:text/plain,x"}),
        "input[0].content[0].image_url",
        "base64",
    ),
    (user({"type": "input_file", "file_url": "x"}), "input[0].content[0].file_url", "file_data"),
    (user({"type": "hologram"}), "input[0].content[0].type", "hologram"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "provider itself runs"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
    ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading", "remove it"),
    ({"tool_choice": "required"}, "tool_choice", "no 'tools'"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name", "not among"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "'function'"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "missing"),
    ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema", "go together"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "'auto'"),
    ({"include": ["file_search_call.results"]}, "include[0]", "logprobs"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "'stream': true"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"timeout": 3600}, "timeout", "at most 60"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    # What the backend, and not the wire, cannot do.
    ({"tools": [WEATHER]}, "tools", "not supported"),
    ({"reasoning": {"effort": "high"}}, "reasoning_effort", "none"),
    ({"service_tier": "flex"}, "service_tier", "one tier"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_refusals(client: httpx2.Client, fields: dict[str, Any], param: str, words: str) -> None:
    response = client.post(PATH, json={"model": "fake", "input": "hi", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_an_unknown_model(client: httpx2.Client) -> None:
    response = client.post(PATH, json={"model": "other", "input": "hi", "stream": True})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "resp_1"), ("DELETE", "resp_1"), ("POST", "resp_1/cancel"), ("GET", "resp_1/input_items")],
)
def test_nothing_is_stored(client: httpx2.Client, method: str, path: str) -> None:
    response = client.request(method, f"{PATH}/{path}")
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "response_not_stored"
    assert "keeps no answers" in error["message"]

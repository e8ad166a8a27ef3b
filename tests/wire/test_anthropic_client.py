"""The official Anthropic client, as users have it: the server's root as its base URL, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import anthropic
import httpx2
import pytest

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.events import (
    Completed,
    Delta,
    Event,
    Finished,
    Queued,
    Started,
    Timings,
    ToolCallDelta,
    Usage,
)
from stockpot.requests import ChatRequest, CompletionRequest
from stockpot.settings import AccessSettings

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
}


class CallingBackend(FakeBackend):
    """Thinks, says a word and calls a tool; once it has a result, repeats it."""

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        assert isinstance(request, ChatRequest)
        last = request.messages[-1]
        yield Queued(0)
        yield Started(40, {"ram": 8}, 0.0)
        if last.role == "tool":
            yield Delta(0, f"The tool says: {last.content}", (1,))
            yield Finished(0, "stop")
        else:
            yield Delta(0, "", (1,), reasoning="A place is named.")
            yield Delta(0, "", signature="c2lnbmVk")
            yield Delta(0, "Let me ", (2,))
            yield Delta(0, "see.", (3,))
            yield Delta(0, "", (4,), tool_calls=(ToolCallDelta(0, "toolu_1", "get_weather", '{"pla'),))
            yield Delta(0, "", (5,), tool_calls=(ToolCallDelta(0, arguments='ce": "Paris"}'),))
            yield Finished(0, "tool_calls")
        promised = {300: 12} if request.boundaries else None
        yield Completed(Usage(40, {"ram": 8}, 5, promised), Timings(0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def official(client: httpx2.Client) -> Generator[anthropic.Anthropic, None, None]:
    with _official(client) as official:
        yield official


@pytest.fixture(scope="module")
def calling(serve: Serve) -> Generator[anthropic.Anthropic, None, None]:
    with serve(CallingBackend()) as client, _official(client) as official:
        yield official


def _official(client: httpx2.Client, key: str = "unused") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=str(client.base_url), api_key=key, max_retries=0)


def _asked(official: anthropic.Anthropic, **fields: Any) -> anthropic.types.Message:
    """The answer to a message of these fields, the rest as it always is."""
    wanted: dict[str, Any] = {
        "model": "fake",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "x"}],
        **fields,
    }
    create: Any = official.messages.create
    return create(**wanted)


def test_message(official: anthropic.Anthropic) -> None:
    message = official.messages.create(
        model="fake", max_tokens=64, system="Be brief.", messages=[{"role": "user", "content": "hello there"}]
    )
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
    [block] = message.content
    assert block.type == "text"
    assert block.text == "You said: hello there"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == 4
    assert message.usage.cache_creation_input_tokens == 0
    assert message.model_extra is not None
    assert message.model_extra["stockpot"]["total_ms"] >= 0


def test_length(official: anthropic.Anthropic) -> None:
    message = official.messages.create(
        model="fake", max_tokens=2, messages=[{"role": "user", "content": "hello there"}]
    )
    assert message.stop_reason == "max_tokens"


def test_stream(official: anthropic.Anthropic) -> None:
    words = "hello there, how are you"
    with official.messages.stream(
        model="fake", max_tokens=64, messages=[{"role": "user", "content": words}]
    ) as stream:
        assert "".join(stream.text_stream) == f"You said: {words}"
        message = stream.get_final_message()
    usage = message.usage
    assert (usage.input_tokens + (usage.cache_read_input_tokens or 0)) == len(f"<user>{words}\n")
    assert (message.stop_reason, usage.output_tokens) == ("end_turn", 7)


def test_events(official: anthropic.Anthropic) -> None:
    events = official.messages.create(
        model="fake", max_tokens=64, messages=[{"role": "user", "content": "x"}], stream=True
    )
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_a_tool_is_called_and_its_result_sent_back(calling: anthropic.Anthropic) -> None:
    turns: list[Any] = [{"role": "user", "content": "Paris?"}]
    whole = _asked(calling, tools=[WEATHER], messages=turns)
    with calling.messages.stream(model="fake", max_tokens=64, tools=[WEATHER], messages=turns) as stream:
        streamed = stream.get_final_message()
    messages: tuple[anthropic.types.Message, ...] = (whole, streamed)
    for message in messages:
        assert message.stop_reason == "tool_use"
        thinking, text, call = message.content
        assert thinking.type == "thinking"
        assert (thinking.thinking, thinking.signature) == ("A place is named.", "c2lnbmVk")
        assert text.type == "text"
        assert text.text == "Let me see."
        assert call.type == "tool_use"
        assert (call.id, call.name, call.input) == ("toolu_1", "get_weather", {"place": "Paris"})
        # As the client's own examples do: the answer's content goes back as it is.
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
        again: list[Any] = [
            *turns,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        answer = _asked(calling, tools=[WEATHER], messages=again)
        assert answer.content[0].type == "text"
        assert answer.content[0].text == "The tool says: sun"


def test_what_a_boundary_kept_is_counted(calling: anthropic.Anthropic) -> None:
    marked: Any = {**WEATHER, "cache_control": {"type": "ephemeral"}}
    message = calling.messages.create(
        model="fake",
        max_tokens=64,
        tools=[marked],
        system=[{"type": "text", "text": "Rules.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        messages=[{"role": "user", "content": "Paris?"}],
    )
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (
        20,
        8,
        12,
    )
    assert usage.cache_creation is not None
    assert usage.cache_creation.ephemeral_5m_input_tokens == 12


def test_tokens_are_counted(official: anthropic.Anthropic) -> None:
    count = official.messages.count_tokens(model="fake", messages=[{"role": "user", "content": "hi"}])
    assert count.input_tokens == len("<user>hi\n")


def test_errors_have_their_classes(official: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        _asked(official, model="other")
    assert (unknown.value.type, unknown.value.error_code) == ("not_found_error", "model_not_found")
    with pytest.raises(anthropic.BadRequestError) as long:
        _asked(official, messages=[{"role": "user", "content": "x" * 5000}])
    assert (long.value.type, long.value.error_code) == ("invalid_request_error", "context_length_exceeded")
    assert "4096" in (long.value.api_message or "")
    with pytest.raises(anthropic.BadRequestError) as field:
        _asked(official, extra_body={"banana": 1})
    assert field.value.error_code == "unsupported_field"


@pytest.mark.parametrize("how", ["api_key", "auth_token"])
def test_keys(serve: Serve, how: str) -> None:
    """The client sends `api_key` as x-api-key and `auth_token` as a bearer."""
    access = AccessSettings.model_validate({"tenants": {"ours": {"key": "k" * 20}}})
    with serve(FakeBackend(), access=access) as client:
        for key, known in (("k" * 20, True), ("w" * 20, False)):
            given: Any = {how: key}
            with anthropic.Anthropic(base_url=str(client.base_url), max_retries=0, **given) as official:
                if known:
                    assert _asked(official).stop_reason == "end_turn"
                    continue
                with pytest.raises(anthropic.AuthenticationError) as refused:
                    _asked(official)
                assert refused.value.type == "authentication_error"


def test_a_failure_in_the_middle_of_a_stream_is_raised(serve: Serve) -> None:
    behaviour = replace(FakeBehaviour(), fail_after_tokens=2)
    with serve(FakeBackend(behaviour)) as client, _official(client) as official:
        texts: list[str] = []
        with (
            pytest.raises(anthropic.APIStatusError, match="engine failed") as failed,
            official.messages.stream(
                model="fake", max_tokens=64, messages=[{"role": "user", "content": "hello there"}]
            ) as stream,
        ):
            for text in stream.text_stream:
                texts.append(text)
        assert "".join(texts) == "You said: "
        assert failed.value.type == "api_error"


def test_a_full_queue_is_a_rate_limit(serve: Serve) -> None:
    good: Any = {"model": "fake", "max_tokens": 64, "messages": [{"role": "user", "content": "x"}]}
    backend = FakeBackend(FakeBehaviour(max_running=1, queue_limit=0, token_delay_s=30))
    with (
        serve(backend) as client,
        _official(client) as official,
        client.stream("POST", "/v1/messages", json={**good, "stream": True}),
        pytest.raises(anthropic.RateLimitError) as full,
    ):
        _asked(official)
    assert full.value.type == "rate_limit_error"

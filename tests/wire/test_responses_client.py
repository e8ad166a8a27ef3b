"""/v1/responses through the official client, as users have it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager

import httpx2
import openai
import pytest
from openai.types.responses import FunctionToolParam, ResponseFunctionToolCall
from openai.types.responses.response_input_param import ResponseInputParam
from pydantic import BaseModel

from stockpot.backends.fake import FakeBackend, FakeBehaviour

Serve = Callable[..., AbstractContextManager[httpx2.Client]]
Official = Callable[[FakeBehaviour], AbstractContextManager[openai.OpenAI]]

WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


class Nothing(BaseModel):
    """The object the fake gives where an object is asked for."""


@pytest.fixture(scope="module")
def official(client: httpx2.Client) -> Generator[openai.OpenAI, None, None]:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as official:
        yield official


@pytest.fixture(scope="module")
def tool_user(serve: Serve) -> Generator[openai.OpenAI, None, None]:
    """A client of a server whose backend takes tools."""
    with (
        serve(FakeBackend(FakeBehaviour(accepts_all=True))) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as official,
    ):
        yield official


def test_a_response(official: openai.OpenAI) -> None:
    answer = official.responses.create(model="fake", input="hello there", instructions="Be brief.")
    assert answer.output_text == "You said: hello there"
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens >= 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + 4
    assert answer.completed_at is not None


def test_plain_streaming(official: openai.OpenAI) -> None:
    stream = official.responses.create(model="fake", input="hello there", stream=True)
    events = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == "You said: hello there"


def test_the_streaming_helper(official: openai.OpenAI) -> None:
    with official.responses.stream(model="fake", input="hello there") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "You said: hello there"


def test_parsed_output(official: openai.OpenAI) -> None:
    answer = official.responses.parse(model="fake", input="an object", text_format=Nothing)
    assert answer.output_parsed == Nothing()
    with official.responses.stream(model="fake", input="an object", text_format=Nothing) as stream:
        assert stream.get_final_response().output_parsed == Nothing()


def test_an_answer_cut_off(official: openai.OpenAI) -> None:
    answer = official.responses.create(model="fake", input="a b c d e", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_a_tool_is_called_and_its_output_sent_back(tool_user: openai.OpenAI) -> None:
    conversation: ResponseInputParam = [{"role": "user", "content": "Weather in Paris?"}]
    answer = tool_user.responses.create(
        model="fake", input=conversation, tools=[WEATHER], tool_choice="required"
    )
    [call] = answer.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Paris"}')
    conversation.append(call.to_dict())  # type: ignore[arg-type] # as the documentation does it
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    assert tool_user.responses.create(model="fake", input=conversation, tools=[WEATHER]).output_text


def test_a_tool_is_called_in_a_stream(tool_user: openai.OpenAI) -> None:
    with tool_user.responses.stream(
        model="fake", input="Weather?", tools=[WEATHER], tool_choice="required"
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        [call] = stream.get_final_response().output
    assert isinstance(call, ResponseFunctionToolCall)
    assert "".join(pieces) == call.arguments == '{"city": "Paris"}'


def test_errors_have_their_classes(official: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        official.responses.create(model="other", input="x")
    with pytest.raises(openai.BadRequestError, match="keeps no answers"):
        official.responses.create(model="fake", input="x", store=True)
    with pytest.raises(openai.NotFoundError, match="keeps no answers"):
        official.responses.retrieve("resp_1")


def test_a_failure_in_the_middle_of_a_stream(serve: Serve) -> None:
    with (
        serve(FakeBackend(FakeBehaviour(fail_after_tokens=2))) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as official,
    ):
        events = list(official.responses.create(model="fake", input="hello there", stream=True))
        last = events[-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert "engine failed" in last.response.error.message
        assert last.response.output_text == "You said: "

"""The official client, as users have it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager

import httpx2
import openai
import pytest

from stockpot.backends.fake import FakeBackend, FakeBehaviour

Serve = Callable[..., AbstractContextManager[httpx2.Client]]


@pytest.fixture(scope="module")
def official(client: httpx2.Client) -> Generator[openai.OpenAI, None, None]:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as official:
        yield official


def test_chat(official: openai.OpenAI) -> None:
    answer = official.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hello there"}], logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "You said: hello there"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].token == "You "


def test_chat_stream(official: openai.OpenAI) -> None:
    stream = official.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hello there"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "You said: hello there"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_completions(official: openai.OpenAI) -> None:
    whole = official.completions.create(model="fake", prompt="Once", seed=3, logprobs=1)
    assert whole.choices[0].text == " and so on, 3"
    streamed = official.completions.create(model="fake", prompt="Once", seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == " and so on, 3"


def test_models(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["fake"]
    assert official.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        official.models.retrieve("other/model")


def test_errors_have_their_classes(official: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        official.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        official.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x" * 5000}])
    assert long.value.code == "context_length_exceeded"
    assert "4096" in str(long.value)


def test_a_failure_in_the_middle_of_a_stream_is_raised(serve: Serve) -> None:
    with (
        serve(FakeBackend(FakeBehaviour(fail_after_tokens=2))) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as official,
    ):
        stream = official.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hello there"}], stream=True
        )
        texts: list[str] = []
        with pytest.raises(openai.APIError, match="engine failed"):
            for chunk in stream:
                texts.append(chunk.choices[0].delta.content or "")
        assert "".join(texts) == "You said: "

"""What an answer says of the caches of answers: headers, also of streams, and the `stockpot` object."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from stockpot.backends.fake import FakeBackend
from stockpot.errors import NotCached
from stockpot.events import (
    Completed,
    Delivery,
    Delta,
    Event,
    Finished,
    Queued,
    Recalled,
    Started,
    Timings,
    Usage,
)
from stockpot.requests import ChatRequest, CompletionRequest

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

ENTRY = "0123456789abcdef" * 2
HIT = Recalled(
    "semantic",
    "evidence",
    entry=ENTRY,
    age_s=61.9,
    similarity=0.97346,
    error_upper=0.0041,
    saved_prompt_tokens=12,
    saved_completion_tokens=2,
    saved_nanousd=3_500,
    saved_s=1.25,
)
MISS = Recalled("miss", "error", similarity=0.81, error_upper=0.2)
TURNS: Any = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "fake", "messages": TURNS},
    "/v1/completions": {"model": "fake", "prompt": "hi"},
    "/v1/responses": {"model": "fake", "input": "hi", "store": False},
    "/v1/messages": {"model": "fake", "max_tokens": 8, "messages": TURNS},
}
STREAMING_EXTRAS = {
    "/v1/chat/completions": {"stream_options": {"include_usage": True}},
    "/v1/completions": {"stream_options": {"include_usage": True}},
}


class Recalling(FakeBackend):
    """Answers as the gateway does: `first` is known when the request begins, `last` at its end."""

    def __init__(self, first: Recalled | None, last: Recalled | None) -> None:
        super().__init__()
        self._first = first
        self._last = last

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        is_hit = self._last is not None and self._last.is_hit
        usage = Usage(12, {"answer": 12} if is_hit else {}, 2)
        yield Queued(0, self._first)
        yield Started(12, usage.cached_tokens, 0.0)
        yield Delta(0, "Yes", (1,))
        yield Delta(0, ".", (2,))
        yield Finished(0, "stop")
        way = Delivery(
            "fake", "kept" if is_hit else "east", 0 if is_hit else 1, 0, "none", recalled=self._last
        )
        yield Completed(usage, Timings(0.0, 0.0, 0.001), way)


def asked(client: httpx2.Client, path: str, *, stream: bool) -> tuple[httpx2.Response, dict[str, Any]]:
    """The response, and the object that has `stockpot` and `usage`."""
    body = {**BODIES[path], "stream": stream, **(STREAMING_EXTRAS.get(path, {}) if stream else {})}
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    if not stream:
        return response, response.json()
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(each) for each in data if each != "[DONE]"]
    told = [event.get("response", event) for event in events]
    return response, next(each for each in reversed(told) if each.get("stockpot"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_an_answer_that_was_kept_says_so(serve: Serve, path: str, stream: bool) -> None:
    with serve(Recalling(HIT, HIT)) as client:
        response, told = asked(client, path, stream=stream)
    headers = response.headers
    assert headers["x-stockpot-recall"] == "semantic"
    assert headers["x-stockpot-recall-reason"] == "evidence"
    assert headers["x-stockpot-recall-entry"] == ENTRY
    assert headers["x-stockpot-recall-similarity"] == "0.9735"
    assert headers["age"] == "61"
    assert told["stockpot"]["cached_tokens"]["answer"] == 12
    assert told["stockpot"]["cost_usd"] == 0
    assert told["stockpot"]["recall"] == {
        "outcome": "semantic",
        "reason": "evidence",
        "entry": ENTRY,
        "age_s": 61.9,
        "similarity": 0.97346,
        "error_upper": 0.0041,
        "saved": {"prompt_tokens": 12, "completion_tokens": 2, "usd": 3.5e-06, "seconds": 1.25},
    }


@pytest.mark.parametrize("path", BODIES)
def test_usage_of_a_kept_answer_is_all_cached(serve: Serve, path: str) -> None:
    with serve(Recalling(HIT, HIT)) as client:
        usage = asked(client, path, stream=False)[1]["usage"]
    if path == "/v1/messages":
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (0, 12)
    elif path == "/v1/responses":
        assert usage["input_tokens_details"]["cached_tokens"] == usage["input_tokens"] == 12
    else:
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] == 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_miss_says_why_and_what_was_kept(serve: Serve, stream: bool) -> None:
    kept = Recalled("miss", "error", entry=ENTRY, similarity=0.81, error_upper=0.2, would="f" * 32)
    with serve(Recalling(MISS, kept)) as client:
        response, told = asked(client, "/v1/chat/completions", stream=stream)
    assert response.headers["x-stockpot-recall"] == "miss"
    assert response.headers["x-stockpot-recall-reason"] == "error"
    assert "age" not in response.headers
    # A stream's headers leave before there is an entry; its last event knows it.
    assert response.headers.get("x-stockpot-recall-entry") == (None if stream else ENTRY)
    recall = told["stockpot"]["recall"]
    assert (recall["entry"], recall["would"], recall["outcome"]) == (ENTRY, "f" * 32, "miss")
    assert "saved" not in recall
    assert "age_s" not in recall


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_where_nothing_is_kept_nothing_is_said(serve: Serve, path: str, stream: bool) -> None:
    with serve(Recalling(None, None)) as client:
        response, told = asked(client, path, stream=stream)
    assert not [name for name in response.headers if name == "age" or name.startswith("x-stockpot-recall")]
    assert "recall" not in told["stockpot"]


def test_a_reason_ends_no_line(serve: Serve) -> None:
    odd = Recalled("bypass", "sampled\r\nx-evil: 1", entry="é")
    for stream in (False, True):
        with serve(Recalling(odd, odd)) as client:
            response, _ = asked(client, "/v1/chat/completions", stream=stream)
        assert response.headers["x-stockpot-recall-reason"] == "sampled??x-evil: 1"
        assert response.headers["x-stockpot-recall-entry"] == "?"


@pytest.mark.parametrize("stream", [False, True])
def test_no_kept_answer_is_a_504_in_every_dialect(serve: Serve, stream: bool) -> None:
    class Empty(FakeBackend):
        async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
            raise NotCached("No answer to this request is kept (not_kept).")
            yield Queued(0)

    with serve(Empty()) as client:
        for path, body in BODIES.items():
            response = client.post(
                path, json={**body, "stream": stream}, headers={"cache-control": "only-if-cached"}
            )
            assert response.status_code == 504
            error = response.json()["error"]
            code = error["details"]["error_code"] if path == "/v1/messages" else error["code"]
            assert code == "not_cached"


def test_the_official_clients_read_it(serve: Serve) -> None:
    with serve(Recalling(HIT, HIT)) as client:
        url = str(client.base_url).rstrip("/")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as theirs:
            raw = theirs.chat.completions.with_raw_response.create(model="fake", messages=TURNS)
            assert raw.headers["x-stockpot-recall"] == "semantic"
            answer = raw.parse()
            assert answer.choices[0].message.content == "Yes."
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == 12
        with anthropic.Anthropic(base_url=url, api_key="unused") as other:
            message = other.messages.create(model="fake", max_tokens=8, messages=TURNS)
            assert message.usage.cache_read_input_tokens == 12
            with other.messages.stream(model="fake", max_tokens=8, messages=TURNS) as stream:
                assert stream.response.headers["age"] == "61"
                assert stream.get_final_message().usage.cache_read_input_tokens == 12

"""`cache_control`, from the wire to the request the backend is given, and back in `usage`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest

from stockpot.backends.fake import FakeBackend
from stockpot.events import Completed, Event
from stockpot.requests import CacheBoundary, ChatRequest, CompletionRequest

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

EPHEMERAL: dict[str, Any] = {"type": "ephemeral"}


class RecordingBackend(FakeBackend):
    """Remembers what it was asked, and says of each request with boundaries that it kept some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[ChatRequest | CompletionRequest] = []

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event, None]:
        self.asked.append(request)
        async for event in super().generate(request):
            if isinstance(event, Completed):
                kept = {300: 7, 3600: 5} if request.boundaries else None
                event = replace(event, usage=replace(event.usage, promised_tokens=kept))
            yield event


@pytest.fixture(scope="module")
def recording() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture(scope="module")
def recorded(recording: RecordingBackend, serve: Serve) -> Generator[httpx2.Client, None, None]:
    """A client of a server over `recording`."""
    with serve(recording) as client:
        yield client


def chat(client: httpx2.Client, *messages: dict[str, Any], **fields: Any) -> httpx2.Response:
    return client.post("/v1/chat/completions", json={"model": "fake", "messages": messages, **fields})


def part(text: str, **control: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **({"cache_control": control} if control else {})}


def refused(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_boundaries_stand_behind_their_part_or_message(
    recorded: httpx2.Client, recording: RecordingBackend
) -> None:
    shared = {"scope": "shared", "tags": ["v2", "law"], "document": "Code of 1804"}
    system = [part("one", ttl="1h", **EPHEMERAL, **shared), part("four"), part("", **EPHEMERAL)]
    user = {"role": "user", "content": "whole", "cache_control": {"type": "ephemeral", "scope": "private"}}
    assert chat(recorded, {"role": "system", "content": system}, user).status_code == 200
    request = recording.asked[-1]
    assert isinstance(request, ChatRequest)
    assert [message.content for message in request.messages] == ["onefour", "whole"]
    assert request.boundaries == (
        CacheBoundary(0, 3, 3600, True, frozenset({"v2", "law", "document:Code of 1804"})),
        CacheBoundary(0, 7, 300),
        CacheBoundary(1, None, 300),
    )


def test_a_plain_prompt_has_one_at_its_end(recorded: httpx2.Client, recording: RecordingBackend) -> None:
    body = {"model": "fake", "prompt": "Once", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    assert recorded.post("/v1/completions", json=body).status_code == 200
    assert recording.asked[-1].boundaries == (CacheBoundary(0, None, 3600),)
    assert recorded.post("/v1/completions", json={**body, "cache_control": None}).status_code == 200
    assert recording.asked[-1].boundaries == ()


@pytest.mark.parametrize(
    ("control", "where", "words"),
    [
        ("ephemeral", "", "object"),
        ({}, ".type", "missing"),
        ({"type": "eternal"}, ".type", "'ephemeral'"),
        ({**EPHEMERAL, "ttl": "2h"}, ".ttl", "'5m' or '1h'"),
        ({**EPHEMERAL, "ttl": 300}, ".ttl", "'5m' or '1h'"),
        ({**EPHEMERAL, "scope": "public"}, ".scope", "'private' or 'shared'"),
        ({**EPHEMERAL, "tokens": 5}, ".tokens", "not supported"),
        ({**EPHEMERAL, "tags": "v2"}, ".tags", "list"),
        ({**EPHEMERAL, "tags": ["x"] * 17}, ".tags", "16"),
        ({**EPHEMERAL, "tags": ["fine", ""]}, ".tags[1]", "1 to 64 printable ASCII"),
        ({**EPHEMERAL, "tags": ["x" * 65]}, ".tags[0]", "1 to 64 printable ASCII"),
        ({**EPHEMERAL, "tags": ["a\nb"]}, ".tags[0]", "1 to 64 printable ASCII"),
        ({**EPHEMERAL, "tags": ["document:x"]}, ".tags[0]", "'document'"),
        ({**EPHEMERAL, "document": "naïve"}, ".document", "1 to 64 printable ASCII"),
    ],
)
@pytest.mark.parametrize("on_part", [True, False])
def test_what_does_not_fit_is_refused(
    client: httpx2.Client, control: Any, where: str, words: str, on_part: bool
) -> None:
    content: Any = [{"type": "text", "text": "x", "cache_control": control}] if on_part else "x"
    message = {"role": "user", "content": content, **({} if on_part else {"cache_control": control})}
    error = refused(chat(client, message))
    assert error["param"] == f"messages[0]{'.content[0]' if on_part else ''}.cache_control{where}"
    assert words in error["message"]


def test_at_most_four_boundaries(client: httpx2.Client) -> None:
    four = [part("x", **EPHEMERAL) for _ in range(4)]
    assert chat(client, {"role": "user", "content": four}).status_code == 200
    five = {"role": "user", "content": four, "cache_control": EPHEMERAL}
    error = refused(chat(client, five))
    assert "5 boundaries" in error["message"]
    assert error["param"] == "messages"


def test_a_chat_has_none_at_the_top(client: httpx2.Client) -> None:
    error = refused(chat(client, {"role": "user", "content": "x"}, cache_control=EPHEMERAL))
    assert (error["param"], error["code"]) == ("cache_control", "unsupported_field")


def test_messages_with_boundaries_have_the_same_tokens(client: httpx2.Client) -> None:
    plain, marked = (
        client.post("/tokenize", json={"model": "fake", "messages": [{"role": "user", "content": content}]})
        for content in ("abc", [part("ab", **EPHEMERAL), part("c")])
    )
    assert plain.json() == marked.json()


def test_usage_says_what_was_read_and_what_is_kept(recorded: httpx2.Client) -> None:
    message = {"role": "user", "content": "read and kept", "cache_control": EPHEMERAL}
    chat(recorded, message)
    body = chat(recorded, message).json()
    _check_counts(body["usage"])
    streamed = chat(recorded, message, stream=True, stream_options={"include_usage": True}).text
    _check_counts(json.loads(streamed.split("data: ")[-2])["usage"])
    plain = {"model": "fake", "prompt": "Once", "cache_control": EPHEMERAL}
    assert recorded.post("/v1/completions", json=plain).json()["usage"]["cache_creation_input_tokens"] == 12


def _check_counts(usage: dict[str, Any]) -> None:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached == usage["prompt_tokens"] - 1
    assert usage["cache_read_input_tokens"] == cached
    assert usage["cache_creation_input_tokens"] == 12
    assert usage["cache_creation"] == {"ephemeral_5m_input_tokens": 7, "ephemeral_1h_input_tokens": 5}


def test_usage_without_boundaries_is_as_it_was(recorded: httpx2.Client) -> None:
    usage = chat(recorded, {"role": "user", "content": "x"}).json()["usage"]
    assert usage.keys() == {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}


def test_the_official_client_sends_it_as_an_extra_field(
    recorded: httpx2.Client, recording: RecordingBackend
) -> None:
    content: Any = [part("one", **EPHEMERAL)]
    with openai.OpenAI(base_url=f"{recorded.base_url}/v1", api_key="unused", max_retries=0) as official:
        answer = official.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": content}]
        )
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["cache_creation_input_tokens"] == 12
    assert recording.asked[-1].boundaries == (CacheBoundary(0, 3, 300),)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_backend_knows_the_clients_id_of_the_request(
    recorded: httpx2.Client, recording: RecordingBackend, path: str
) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
    body = body if "chat" in path else {"model": "fake", "prompt": "x"}
    answer = recorded.post(path, json=body, headers={"x-request-id": "mine-7"})
    generation = recording.asked[-1].generation
    assert (generation.client_request_id, generation.request_id) == ("mine-7", answer.json()["id"])
    answer = recorded.post(path, json=body)
    assert recording.asked[-1].generation.client_request_id == answer.headers["x-request-id"]
    assert recording.asked[-1].generation.tenant == ""

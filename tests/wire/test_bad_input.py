"""What is wrong is refused with a sentence that names it, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.backends.refusals import CHAT as CHAT_TOLERATED
from stockpot.events import Delta, Event
from stockpot.requests import ChatRequest, CompletionRequest
from stockpot.wire.shapes_chat import ChatShape
from stockpot.wire.shapes_completion import CompletionShape, TokenizeShape

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}
PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(autouse=True)
def still_answers(client: httpx2.Client) -> Iterator[None]:
    yield
    assert client.post(CHAT, json=GOOD).status_code == 200


def refused(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """The error's detail, whose shape is the API's."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b'{"model": ', "invalid_json"),
        (b"[]", "invalid_json"),
        (b"nonsense", "invalid_json"),
        (b'{"model":"fake"} trailing', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"temperature": Infinity}', "invalid_json"),
        (b'{"temperature": 1e999}', "invalid_json"),
        (b'{"model":"\\ud800"}', "invalid_json"),
        (b'{"model":"\xff\xfe"}', "invalid_utf8"),
        (b'{"model":"\xed\xa0\x80"}', "invalid_utf8"),
    ],
)
def test_bodies_that_are_no_json(client: httpx2.Client, body: bytes, code: str) -> None:
    error = refused(client.post(CHAT, content=body, headers=JSON))
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"


def test_a_body_of_another_content_type(client: httpx2.Client) -> None:
    response = client.post(CHAT, content=json.dumps(GOOD), headers={"content-type": "text/plain"})
    assert "application/json" in refused(response)["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": None}, "messages", "null"),
        ({"messages": [7]}, "messages[0]", "7"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "7"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "wizard"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "messages[0].tool_calls",
            "tool",
        ),
        ({"messages": [{"role": "user", "content": "x", "size": 1}]}, "messages[0].size", "not supported"),
        ({"model": 7}, "model", "string"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": 2.5}, "temperature", "at least 0 and at most 2"),
        ({"temperature": True}, "temperature", "true"),
        ({"top_p": 0}, "top_p", "above 0 and at most 1"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "one of them"),
        ({"n": 17}, "n", "at most 16"),
        ({"seed": 10**30}, "seed", "at most"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": [""]}, "stop[0]", "at least 1"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "both"),
        ({"timeout": 61.0}, "timeout", "60"),
        ({"timeout": 0}, "timeout", "above 0"),
    ],
)
def test_values_that_do_not_fit(
    client: httpx2.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(client.post(CHAT, json={**GOOD, **fields}))
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"banana": 1}, "banana"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "weight": 2}]}]},
            "messages[0].content[0].weight",
        ),
        ({"response_format": {"type": "text", "extra": 1}}, "response_format.extra"),
    ],
)
def test_fields_that_cannot_be_honoured(client: httpx2.Client, fields: dict[str, Any], param: str) -> None:
    error = refused(client.post(CHAT, json={**GOOD, **fields}))
    assert (error["param"], error["code"]) == (param, "unsupported_field")


def test_a_schema_that_is_no_schema(client: httpx2.Client) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "unheard-of"}}}
    error = refused(client.post(CHAT, json={**GOOD, "response_format": schema}))
    assert error["code"] == "invalid_schema"


def test_a_model_that_is_not_served(client: httpx2.Client) -> None:
    assert refused(client.post(CHAT, json={**GOOD, "model": "other"}), 404)["code"] == "model_not_found"
    streamed = client.post(CHAT, json={**GOOD, "model": "other", "stream": True})
    assert refused(streamed, 404)["param"] == "model"
    assert refused(client.get("/v1/models/org/other"), 404)["code"] == "model_not_found"


def test_a_prompt_beyond_the_context(client: httpx2.Client) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "x" * 5000}]}
    error = refused(client.post(CHAT, json=body))
    assert error["code"] == "context_length_exceeded"
    assert "5007" in error["message"]
    assert "4096" in error["message"]


def test_a_body_too_large_whether_announced_or_not(client: httpx2.Client) -> None:
    big = json.dumps({**GOOD, "user": "x" * 2**20}).encode()
    assert refused(client.post(CHAT, content=big, headers=JSON), 413)["code"] == "body_too_large"
    pieces = (big[start : start + 50_000] for start in range(0, len(big), 50_000))
    assert refused(client.post(CHAT, content=pieces, headers=JSON), 413)["code"] == "body_too_large"


def test_a_body_that_does_not_come(serve: Serve) -> None:
    with serve(FakeBackend(), body_timeout_s=0.2) as client:
        port = client.base_url.port
        assert port is not None
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(head.encode() + b'{"model"')
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408")
            while b"body_too_slow" not in answer:
                more = connection.recv(65536)
                assert more
                answer += more


def test_headers_that_do_not_come(serve: Serve) -> None:
    with serve(FakeBackend(), headers_timeout_s=0.3) as client:
        port = client.base_url.port
        assert port is not None
        for start in (b"", b"GET /health HTTP/1.1\r\nHost"):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(start)
                assert connection.recv(65536) == b""
        assert client.get("/health").status_code == 200


def test_routes_and_methods_that_do_not_exist(client: httpx2.Client) -> None:
    assert refused(client.get("/v1/nothing"), 404)["code"] == "not_found"
    response = client.get(CHAT)
    assert refused(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    backend = FakeBackend(FakeBehaviour(max_running=1, queue_limit=1, token_delay_s=30))
    with serve(backend) as client:
        body = {**GOOD, "stream": True}
        with client.stream("POST", CHAT, json=body), client.stream("POST", CHAT, json=body):
            response = client.post(CHAT, json=GOOD)
    assert refused(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "2"


def test_a_deadline_that_passes(serve: Serve) -> None:
    with serve(FakeBackend(FakeBehaviour(token_delay_s=0.05))) as client:
        response = client.post(CHAT, json={**GOOD, "timeout": 0.01})
        assert refused(response, 408)["code"] == "deadline_exceeded"
        assert response.headers["x-should-retry"] == "false"
        streamed = client.post(CHAT, json={**GOOD, "timeout": 0.01, "stream": True})
    assert streamed.status_code == 200
    assert '"deadline_exceeded"' in streamed.text
    assert "[DONE]" not in streamed.text


def test_an_engine_that_fails(serve: Serve) -> None:
    with serve(FakeBackend(FakeBehaviour(fail_after_tokens=0))) as client:
        response = client.post(CHAT, json=GOOD)
        assert refused(response, 503)["code"] == "engine_failed"
        assert client.get("/health").status_code == 200


def test_an_answer_that_fails(serve: Serve) -> None:
    with serve(FakeBackend(FakeBehaviour(error_after_tokens=1))) as client:
        assert refused(client.post(CHAT, json=GOOD), 500)["code"] == "generation_failed"


def test_a_failure_nobody_foresaw_leaks_nothing(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode() -> None:
        raise ZeroDivisionError("secret of the house")

    backend = FakeBackend()
    monkeypatch.setattr(backend, "models", explode)
    with serve(backend) as client:
        response = client.get("/v1/models", headers={"x-request-id": "trace-me"})
    error = refused(response, 500)
    assert error["code"] == "internal_error"
    assert "trace-me" in error["message"]
    assert "secret" not in response.text
    assert "secret of the house" in caplog.text
    assert "trace-me" in caplog.text


def test_a_failure_nobody_foresaw_in_a_stream_ends_the_connection(serve: Serve) -> None:
    class Broken(FakeBackend):
        async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event, None]:
            async for event in super().generate(request):
                if isinstance(event, Delta) and "said" in event.text:
                    raise ZeroDivisionError("secret of the house")
                yield event

    with serve(Broken()) as client:
        with pytest.raises(httpx2.RemoteProtocolError):
            client.post(CHAT, json={**GOOD, "stream": True})
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("sent", ["abc-123", "x" * 128])
def test_a_request_id_comes_back(client: httpx2.Client, sent: str) -> None:
    assert client.get("/health", headers={"x-request-id": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "tab\there", b"caf\xc3\xa9"])
def test_a_strange_request_id_is_replaced(client: httpx2.Client, sent: str | bytes) -> None:
    response = client.get(
        "/health", headers={b"x-request-id": sent if isinstance(sent, bytes) else sent.encode()}
    )
    assert len(response.headers["x-request-id"]) == 32


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
_ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    [*ChatShape.model_fields, *CompletionShape.model_fields, *TokenizeShape.model_fields, *CHAT_TOLERATED]
)


@settings(max_examples=150)
@given(
    path=st.sampled_from([CHAT, "/v1/completions", "/tokenize"]),
    fields=st.dictionaries(_NAMES, _ANYTHING, max_size=4),
)
def test_no_json_whatever_makes_the_server_fail(
    client: httpx2.Client, path: str, fields: dict[str, Any]
) -> None:
    try:
        body = json.dumps({**GOOD, **fields}, allow_nan=False).encode()
    except ValueError:
        return
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code in {200, 400, 404}, response.text

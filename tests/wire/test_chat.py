"""/v1/chat/completions as raw HTTP: shapes, usage, streams."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two three"}]


def chat(client: httpx2.Client, **fields: Any) -> httpx2.Response:
    return client.post("/v1/chat/completions", json={"model": "fake", "messages": MESSAGES, **fields})


def events(response: httpx2.Response) -> list[Any]:
    """The stream's JSON; it must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer_has_the_shape_of_the_api(client: httpx2.Client) -> None:
    response = chat(client)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "You said: one two three", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 5


def test_a_repeated_prompt_reports_all_but_its_last_token_as_cached(client: httpx2.Client) -> None:
    chat(client)
    body = chat(client).json()
    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == body["usage"]["prompt_tokens"] - 1
    assert body["stockpot"]["cached_tokens"] == {"context": 0, "ram": cached, "disk": 0, "redis": 0}
    assert 0 <= body["stockpot"]["queue_ms"] <= body["stockpot"]["ttft_ms"] <= body["stockpot"]["total_ms"]


def test_a_stream_tells_role_text_end_and_usage_in_order(client: httpx2.Client) -> None:
    response = chat(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == "You said: one two three"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert chunks[-1]["stockpot"]["ttft_ms"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_without_usage_has_none(client: httpx2.Client) -> None:
    chunks = events(chat(client, stream=True))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_every_choice_is_told(client: httpx2.Client) -> None:
    body = chat(client, n=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    chunks = events(chat(client, n=3, stream=True))
    roles = [chunk["choices"][0] for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    assert [choice["index"] for choice in roles] == [0, 1, 2]
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(choice["index"] for choice in ends) == [0, 1, 2]


def test_logprobs_name_tokens_bytes_and_alternatives(client: httpx2.Client) -> None:
    body = chat(client, logprobs=True, top_logprobs=2).json()
    first = body["choices"][0]["logprobs"]["content"][0]
    assert bytes(first["bytes"]).decode() == first["token"] == "You "
    assert len(first["top_logprobs"]) == 2
    alone = chat(client, logprobs=True, stream=True)
    entries = [
        entry
        for chunk in events(alone)
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert len(entries) == 5
    assert all(entry["top_logprobs"] == [] for entry in entries)


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"max_tokens": 2}, "You said: ", "length"),
        ({"max_completion_tokens": 3}, "You said: one ", "length"),
        ({"stop": "two"}, "You said: one ", "stop"),
        ({"stop": ["three", "said"]}, "You ", "stop"),
        ({"ignore_eos": True, "max_tokens": 7}, "You said: one two threeYou said: ", "length"),
        ({"response_format": {"type": "json_object"}}, "{}", "stop"),
    ],
)
def test_fields_reach_the_backend(
    client: httpx2.Client, fields: dict[str, Any], text: str, reason: str
) -> None:
    choice = chat(client, **fields).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


def test_text_parts_are_joined(client: httpx2.Client) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    body = chat(client, messages=[{"role": "user", "content": parts}]).json()
    assert body["choices"][0]["message"]["content"] == "You said: one two"


def test_an_answer_of_ours_may_be_sent_back_whole(client: httpx2.Client) -> None:
    answer = chat(client).json()["choices"][0]["message"]
    more = [*MESSAGES, {**answer, "tool_calls": None}, {"role": "user", "content": "more"}]
    assert chat(client, messages=more).status_code == 200


def test_fields_at_their_neutral_value_are_welcome(client: httpx2.Client) -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "tools": [],
        "tool_choice": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "user": "somebody",
        "metadata": {"job": "7"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "logit_bias": {},
        "logprobs": False,
        "stop": None,
        "stream_options": None,
        "response_format": {"type": "text"},
        "top_k": -1,
        "seed": -5,
    }
    response = chat(client, **neutral)
    assert response.status_code == 200, response.text


def test_ten_thousand_messages_are_read(client: httpx2.Client) -> None:
    messages = [{"role": ("user", "assistant")[index % 2], "content": ""} for index in range(10_000)]
    response = chat(client, messages=messages)
    # The fake's context is small, so this is its refusal, not the wire's.
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_other_languages_pass_unharmed(client: httpx2.Client) -> None:
    text = 'Grüße, 世界, 🫕 \u2028 \\ " \x07'
    body = chat(client, messages=[{"role": "user", "content": text}]).json()
    assert body["choices"][0]["message"]["content"] == f"You said: {text}"
    chunks = events(chat(client, messages=[{"role": "user", "content": text}], stream=True))
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == f"You said: {text}"

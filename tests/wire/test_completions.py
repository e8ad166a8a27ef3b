"""/v1/completions as raw HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest


def complete(client: httpx2.Client, **fields: Any) -> httpx2.Response:
    return client.post("/v1/completions", json={"model": "fake", **fields})


@pytest.mark.parametrize("prompt", ["Once", ["Once"], [79, 110, 99, 101], [[79, 110, 99, 101]]])
def test_a_prompt_is_text_or_token_ids(client: httpx2.Client, prompt: Any) -> None:
    body = complete(client, prompt=prompt, echo=True).json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "Once and so on, 0"
    assert body["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [[1], [2]], [1, "a"], [-1], [1.5], [True], 7, None])
def test_other_prompts_are_refused(client: httpx2.Client, prompt: Any) -> None:
    response = complete(client, prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_logprobs_come_as_parallel_lists(client: httpx2.Client) -> None:
    logprobs = complete(client, prompt="Once", logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [" and ", "so ", "on, ", "0"]
    assert logprobs["text_offset"] == [0, 5, 8, 12]
    assert all(-1 < value < 0 for value in logprobs["token_logprobs"])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_echo_with_logprobs_is_refused(client: httpx2.Client) -> None:
    response = complete(client, prompt="Once", echo=True, logprobs=0)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "echo"


def test_a_stream_has_the_same_text_and_offsets(client: httpx2.Client) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 0}
    response = complete(client, prompt="Once", **options)
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == " and so on, 0"
    offsets = [
        offset
        for chunk in chunks[:-1]
        if chunk["choices"][0]["logprobs"]
        for offset in chunk["choices"][0]["logprobs"]["text_offset"]
    ]
    assert offsets == [0, 5, 8, 12]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 4

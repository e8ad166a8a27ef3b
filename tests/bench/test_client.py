"""The client against the real wire over a fake model, and against what the other servers send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from stockpot.bench.chat_run import run_chat
from stockpot.bench.client import BenchClient
from stockpot.bench.sizing import text_of_tokens
from stockpot.bench.workload import ChatShape, write_script
from stockpot.errors import ServerUnreachable

pytestmark = pytest.mark.anyio

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Stub = Callable[[Handler], AbstractAsyncContextManager[str]]


async def test_answer_of_our_own_server(url: str) -> None:
    client = BenchClient(url, "fake")
    first = await client.chat([{"role": "user", "content": "one two three four five six"}], max_tokens=5)
    again = await client.chat([{"role": "user", "content": "one two three four five six"}], max_tokens=5)
    assert first.completion_tokens == 5
    assert len(first.arrivals_s) == 5
    assert first.arrivals_s[0] == first.ttft_s <= first.total_s
    assert len(first.inter_token_s) == 4
    assert first.time_per_output_token_s is not None
    assert first.server is not None
    assert first.server.ttft_ms is not None
    assert first.cached_tokens == 0
    assert again.cached_tokens
    assert again.computed_tokens == again.prompt_tokens - again.cached_tokens
    assert again.text == first.text


async def test_completion_of_our_own_server(url: str) -> None:
    answer = await BenchClient(url, "fake").complete("one two three", max_tokens=2)
    assert answer.completion_tokens == 2
    assert answer.prompt_tokens == len(b"one two three")


async def test_what_the_server_refuses_is_said(url: str) -> None:
    with pytest.raises(ServerUnreachable, match=r"404.*not served here"):
        await BenchClient(url, "another").complete("text", max_tokens=2)
    with pytest.raises(ServerUnreachable, match="answered 404"):
        await BenchClient(url, "fake").get("/nowhere")


async def test_chat_run_keeps_every_prompt(url: str) -> None:
    shape = ChatShape(sessions=3, turns=2, concurrency=2, system_words=20, user_words=4, answer_tokens=3)
    script = write_script(shape)
    seen: list[tuple[str, int, int | None]] = []

    def progress(description: str, done: int, total: int | None, /) -> None:
        seen.append((description, done, total))

    run = await run_chat(BenchClient(url, "fake"), script, label="x", progress=progress)
    assert [len(turn) for turn in run.answers] == [3, 3]
    assert len(run.prompts) == 6
    assert [len(prompt) for prompt in run.prompts] == [2, 2, 2, 4, 4, 4]
    assert all(prompt[0]["content"] == script.system_text for prompt in run.prompts)
    assert run.completion_tokens == 18
    assert 0 < run.computed_tokens <= run.prompt_tokens
    assert seen[-1] == ("x", 6, 6)


async def test_a_failed_request_ends_the_run_as_itself(url: str) -> None:
    script = write_script(ChatShape(sessions=3, turns=1, concurrency=3, system_words=5))
    with pytest.raises(ServerUnreachable):
        await run_chat(BenchClient(url, "another"), script)


def _saying(*events: Any) -> Handler:
    """Streams these events."""
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    body = "".join(f"data: {line}\n\n" for line in lines).encode()

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + body)
        await writer.drain()

    return say


def _text(content: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]}


async def test_the_role_chunk_is_no_first_token(stub: Stub) -> None:
    """vLLM's form: role first, usage in a chunk of its own, cached tokens in the details."""
    usage = {
        "prompt_tokens": 40,
        "completion_tokens": 2,
        "total_tokens": 42,
        "prompt_tokens_details": {"cached_tokens": 32},
    }
    end: dict[str, Any] = {"choices": [], "usage": usage}
    async with stub(_saying(_text(""), _text("He"), _text("llo"), end, "[DONE]")) as url:
        answer = await BenchClient(url, "bench").chat([{"role": "user", "content": "?"}], max_tokens=2)
    assert answer.text == "Hello"
    assert len(answer.arrivals_s) == 2
    assert (answer.prompt_tokens, answer.cached_tokens, answer.computed_tokens) == (40, 32, 8)
    assert answer.server is None


async def test_llama_server_says_cached_tokens_in_its_timings(stub: Stub) -> None:
    last: dict[str, Any] = {
        "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 40, "completion_tokens": 1},
        "timings": {"cache_n": 30, "prompt_n": 10},
    }
    async with stub(_saying(_text(None), _text("Hi"), last, "[DONE]")) as url:
        answer = await BenchClient(url, "bench").chat([{"role": "user", "content": "?"}], max_tokens=1)
    assert answer.cached_tokens == 30
    assert answer.time_per_output_token_s is None
    assert answer.decode_step_s is None


async def test_an_error_in_the_stream_is_raised(stub: Stub) -> None:
    async with stub(_saying(_text("Hi"), {"error": {"message": "out of luck"}})) as url:
        with pytest.raises(ServerUnreachable, match="out of luck"):
            await BenchClient(url, "bench").chat([{"role": "user", "content": "?"}], max_tokens=1)


@pytest.mark.parametrize("tokens_per_word", [1, 3])
async def test_text_of_wanted_length(tokens_per_word: int) -> None:
    async def count(text: str) -> int:
        return len(text.split()) * tokens_per_word + 5

    text = await text_of_tokens(500, count, seed=1)
    assert abs(await count(text) - 500) < tokens_per_word


async def test_text_of_wanted_length_in_uneven_tokens() -> None:
    async def count(text: str) -> int:
        return len(text)

    text = await text_of_tokens(2000, count, seed=1)
    assert abs(len(text) - 2000) <= 10

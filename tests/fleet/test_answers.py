"""vLLM and llama-server answer through the gateway as the official client expects; the ledger adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam
from tests.fleet.official import official

from stockpot.bench.fleet import ledger_rows
from stockpot.bench.fleet_servers import CHAT, SMALL, Worker, running_gateway
from stockpot.bench.workload import WordSource

pytestmark = pytest.mark.anyio

BACKENDS = {CHAT: {"vllm-1", "vllm-2"}, SMALL: {"llama"}}
WEATHER: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def messages(seed: int, words: int = 300) -> list[ChatCompletionMessageParam]:
    return [
        {"role": "system", "content": WordSource(seed).text(words)},
        {"role": "user", "content": "Say something about this."},
    ]


def cached(usage: CompletionUsage | None) -> int:
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return usage.prompt_tokens_details.cached_tokens or 0


def extension(answer: Any) -> dict[str, Any]:
    return answer.model_extra["stockpot"]


async def test_every_model_is_listed(client: AsyncOpenAI) -> None:
    assert {model.id async for model in client.models.list()} == {CHAT, SMALL}


@pytest.mark.parametrize("model", [CHAT, SMALL])
async def test_an_answer_at_once_and_again_from_the_cache(client: AsyncOpenAI, model: str) -> None:
    seed = 100 + len(model)
    answers = [
        await client.chat.completions.create(
            model=model, messages=messages(seed), max_tokens=12, temperature=0
        )
        for _ in range(2)
    ]
    for answer in answers:
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 300
        assert 0 < answer.usage.completion_tokens <= 12
        assert extension(answer)["backend"] in BACKENDS[model]
    assert cached(answers[0].usage) < 64  # the template's own, at most
    assert cached(answers[1].usage) > 250
    assert extension(answers[0])["backend"] == extension(answers[1])["backend"]


@pytest.mark.parametrize("model", [CHAT, SMALL])
async def test_a_stream_is_whole(client: AsyncOpenAI, model: str) -> None:
    stream = await client.chat.completions.create(
        model=model,
        messages=messages(200 + len(model)),
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    usage = chunks[-1].usage
    assert text
    assert len(reasons) == 1
    assert reasons[0] in {"stop", "length"}
    assert usage is not None
    assert 0 < usage.completion_tokens <= 12
    assert cached(usage) < usage.prompt_tokens


async def test_a_tool_is_passed_and_its_call_comes_back(client: AsyncOpenAI) -> None:
    """Named, so that a model of this size has no choice."""
    answer = await client.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=64,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls or []
    functions = [call.function for call in calls if call.type == "function"]
    assert [function.name for function in functions] == ["get_weather"]
    assert functions[0].arguments  # vLLM holds them to no schema; what it wrote is passed on


async def test_a_tool_is_passed_and_its_call_comes_back_in_pieces(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": "What is the weather in Rome?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    pieces = [
        piece
        async for chunk in stream
        for choice in chunk.choices
        for piece in choice.delta.tool_calls or ()
        if piece.function is not None
    ]
    assert [piece.function.name for piece in pieces if piece.function and piece.function.name] == [
        "get_weather"
    ]
    assert any(piece.function.arguments for piece in pieces if piece.function)


async def test_an_image_is_refused_by_who_cannot_see(client: AsyncOpenAI) -> None:
    """The engine's own words reach the client, as an error of the request."""
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    with pytest.raises(APIStatusError, match=r"(?i)image|multimodal") as refused:
        await client.chat.completions.create(
            model=CHAT,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{dot}"}},
                    ],
                }
            ],
            max_tokens=8,
        )
    assert refused.value.status_code == 400


async def test_a_prompt_beyond_the_context_is_refused_as_such(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        await client.chat.completions.create(model=CHAT, messages=messages(400, 9000), max_tokens=8)
    assert "context" in (refused.value.code or "")


async def test_the_ledger_adds_up_to_what_clients_were_told(
    workers: tuple[Worker, ...], llama: Worker, tmp_path: Path
) -> None:
    told = {CHAT: [0, 0, 0, 0], SMALL: [0, 0, 0, 0]}
    async with running_gateway((*workers, llama), tmp_path) as running, official(running.url) as client:
        for number in range(8):
            model = (CHAT, SMALL)[number % 2]
            usage = await (asked_at_once if number < 4 else asked_in_pieces)(client, model)
            fresh = usage.prompt_tokens - cached(usage)
            sums = (1, fresh, cached(usage), usage.completion_tokens)
            told[model] = [have + more for have, more in zip(told[model], sums, strict=True)]
        rows = await ledger_rows(running.url, requests=8)
    kept = {CHAT: [0, 0, 0, 0], SMALL: [0, 0, 0, 0]}
    for row in rows:
        model = next(model for model, names in BACKENDS.items() if row.backend in names)
        sums = (row.requests, row.fresh_tokens, row.cached_tokens, row.output_tokens)
        kept[model] = [have + more for have, more in zip(kept[model], sums, strict=True)]
    assert kept == told
    assert all(model[2] > 0 for model in kept.values())


async def asked_at_once(client: AsyncOpenAI, model: str) -> CompletionUsage:
    answer = await client.chat.completions.create(model=model, messages=messages(500, 100), max_tokens=5)
    assert answer.usage is not None
    return answer.usage


async def asked_in_pieces(client: AsyncOpenAI, model: str) -> CompletionUsage:
    stream = await client.chat.completions.create(
        model=model,
        messages=messages(500, 100),
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    usages = [chunk.usage async for chunk in stream if chunk.usage is not None]
    assert len(usages) == 1
    return usages[0]

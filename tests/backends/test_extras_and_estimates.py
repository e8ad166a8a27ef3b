"""Extra fields that may not reach a backend, and what is counted where one does not count."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from tests.mock_upstream import MockUpstream, Script

from stockpot.backends.open_remote import open_remote
from stockpot.backends.openai_compatible import OpenAIBackend
from stockpot.clock import SystemClock
from stockpot.errors import UnsupportedField, UpstreamError
from stockpot.events import Completed
from stockpot.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Generation, Message, Tool
from stockpot.settings_gateway import BackendSettings

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(url: str, **settings: Any) -> AsyncGenerator[OpenAIBackend]:
    given: Any = {"url": url, "models": {"m": "m"}, **settings}
    backend = open_remote("b", BackendSettings(**given), clock=SystemClock())
    assert isinstance(backend, OpenAIBackend)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop(drain=False)


def chat(**extras: Any) -> ChatRequest:
    return ChatRequest(Generation("m", "r", extras=extras), (Message("user", "Hi"),))


async def completed(backend: OpenAIBackend, request: ChatRequest | CompletionRequest) -> Completed:
    last = [event async for event in backend.generate(request)][-1]
    assert isinstance(last, Completed)
    return last


@pytest.mark.parametrize(
    ("server", "name", "value"),
    [
        ("generic", "best_of", 8),
        ("generic", "service_tier", "priority"),
        ("generic", "web_search_options", {}),
        ("generic", "models", ["dearer"]),
        ("vllm", "priority", -100),
        ("vllm", "request_id", "another's"),
        ("vllm", "kv_transfer_params", {"remote": 1}),
        ("vllm", "use_beam_search", True),
        ("llama-server", "n_predict", 100_000),
        ("llama-server", "id_slot", 0),
        ("llama-server", "lora", [{"id": 0, "scale": 1}]),
        ("sglang", "rid", "another's"),
        ("stockpot", "best_of", True),
    ],
)
async def test_what_changes_the_bill_or_the_queue_is_refused_unless_allowed(
    server: str, name: str, value: Any
) -> None:
    async with MockUpstream("m") as mock:
        async with serving(mock.url, server=server) as backend:
            asked = Generation("m", "r", extras={name: value})
            for request in (chat(**{name: value}), CompletionRequest(asked, "Hi")):
                with pytest.raises(UnsupportedField) as caught:
                    await completed(backend, request)
                assert caught.value.param == name and "allow_extras" in str(caught.value)
            with pytest.raises(UnsupportedField):
                await backend.embed(EmbeddingRequest(asked, ("Hi",)))
        assert not mock.requests
        async with serving(mock.url, server=server, allow_extras=[name]) as backend:
            await completed(backend, chat(**{name: value}))
        assert mock.requests[-1].body[name] == value


async def test_what_asks_for_nothing_and_what_is_not_known_passes() -> None:
    extras = {
        "service_tier": "auto",
        "best_of": 1,
        "priority": 0,
        "reasoning_effort": "low",
        "guided_regex": "a",
    }
    async with MockUpstream("m") as mock, serving(mock.url, server="vllm") as backend:
        await completed(backend, chat(**extras))
        assert extras.items() <= mock.requests[0].body.items()


async def test_a_prompt_the_backend_did_not_count_is_estimated_with_its_tools() -> None:
    async with MockUpstream("m") as mock, serving(mock.url) as backend:
        mock.default = Script(usage=False)
        tools = (Tool("f", "x" * 4_000),)
        request = ChatRequest(Generation("m", "r"), (Message("user", "y" * 400),), tools=tools)
        usage = (await completed(backend, request)).usage
        assert usage.estimated and 1_100 <= usage.prompt_tokens < 1_200


@pytest.mark.parametrize("vector", ["!!!!", "AAA", base64.b64encode(b"12345").decode(), ""])
async def test_an_embedding_that_is_no_vector_is_a_fault_of_the_backend(vector: str) -> None:
    given = [vector]

    async def embeddings(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"index": 0, "embedding": given[0]}]})

    app = web.Application()
    app.router.add_post("/v1/embeddings", embeddings)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with serving(f"http://127.0.0.1:{runner.addresses[0][1]}/v1") as backend:
            request = EmbeddingRequest(Generation("m", "r"), ("Hi",), "base64")
            with pytest.raises(UpstreamError) as caught:
                await backend.embed(request)
            assert caught.value.cause == "format"
            given[0] = base64.b64encode(b"1234" * 3).decode()
            assert (await backend.embed(request)).vectors == given
    finally:
        await runner.cleanup()

"""A waiting client of a stream sees why it waits; a silent stream is kept alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import openai
import pytest

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.events import Completed, Delta, Event, Finished, Progress, Queued, Started, Timings, Usage
from stockpot.requests import ChatRequest, CompletionRequest
from stockpot.wire.chat_answer import ChatNarrator
from stockpot.wire.delivery import StreamedAnswer

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

WAITING: tuple[Event, ...] = (
    Queued(3),
    Queued(3),
    Queued(1),
    Queued(0),
    Started(2048, {}, 0.5),
    Progress(512, 2048),
    Progress(2048, 2048),
)
ANSWER: tuple[Event, ...] = (
    Delta(0, "Well."),
    Finished(0, "stop"),
    Completed(Usage(2048, {}, 1), Timings(0.5, 0.6, 0.7)),
)


class Waiter(FakeBackend):
    """Every request waits, and says so."""

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        del request
        for event in (*WAITING, *ANSWER):
            yield event


def chat(client: httpx2.Client, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], **fields}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def test_comments_say_why_a_stream_waits(serve: Serve) -> None:
    with serve(Waiter()) as client:
        parts = chat(client, stream=True).text.split("\n\n")
        whole = chat(client)
    assert parts[:5] == [
        ": queued position=3",
        ": queued position=1",
        ": queued position=0",
        ": prefill 512/2048",
        ": prefill 2048/2048",
    ]
    assert parts[5].startswith("data: {")
    assert whole.json()["choices"][0]["message"]["content"] == "Well."


def test_events_say_it_where_they_are_asked_for(serve: Serve) -> None:
    with serve(Waiter()) as client:
        by_header = chat(client, {"x-stockpot-events": "1"}, stream=True).text.split("\n\n")
        by_field = chat(client, stream=True, stream_options={"include_progress": True}).text.split("\n\n")
        neither = chat(client, {"x-stockpot-events": "0"}, stream=True).text
        wrong = chat(client, {"x-stockpot-events": "yes"}, stream=True)
    assert by_header[:5] == by_field[:5]
    assert by_header[0] == 'event: stockpot.progress\ndata: {"state":"queued","position":3}'
    assert by_header[4] == 'event: stockpot.progress\ndata: {"state":"prefill","done":2048,"total":2048}'
    assert "event:" not in neither
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "x-stockpot-events"


def test_the_official_client_passes_over_comments(serve: Serve) -> None:
    with (
        serve(Waiter()) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0) as official,
    ):
        stream = official.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "x"}], stream=True
        )
        texts = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(text or "" for text in texts) == "Well."


def test_the_fake_tells_its_prefill(serve: Serve) -> None:
    with serve(FakeBackend(FakeBehaviour(prefill_steps=2))) as client:
        parts = chat(client, stream=True).text.split("\n\n")
    assert parts[:2] == [": prefill 4/8", ": prefill 8/8"]


@pytest.mark.anyio
async def test_a_silent_stream_is_kept_alive_until_it_ends() -> None:
    heard = asyncio.Event()
    sent: list[bytes] = []

    async def events() -> AsyncGenerator[Event]:
        yield Queued(0)
        await heard.wait()
        for event in ANSWER:
            yield event

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if sent.count(b": keep-alive\n\n") == 2:
            heard.set()

    narrator = ChatNarrator(id="c", created=0, model="m", usage=False)
    answer = StreamedAnswer(events(), narrator, keep_alive_s=0.01)
    async with asyncio.timeout(20):
        await answer({"type": "http"}, receive, send)
    assert sent[-1].endswith(b"data: [DONE]\n\n")
    told = len(sent)
    await asyncio.sleep(0.05)
    assert len(sent) == told

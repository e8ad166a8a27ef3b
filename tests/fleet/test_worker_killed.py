"""A worker is killed under load: requests not begun are answered elsewhere, and no answer is spliced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from openai import APIError, AsyncOpenAI
from tests.fleet.official import official

from stockpot.bench.fleet import ledger_rows
from stockpot.bench.fleet_servers import CHAT, VllmWorkers, Worker, running_gateway
from stockpot.bench.workload import WordSource

pytestmark = pytest.mark.anyio

REQUESTS = 32
AT_ONCE = 8
ANSWER_TOKENS = 48
RESILIENCE = "[resilience]\nbreaker_failures = 2\nbreaker_open_s = 600"


@dataclass(slots=True)
class Seen:
    """One stream as its client saw it."""

    pieces: list[str] = field(default_factory=list[str])
    reasons: list[str] = field(default_factory=list[str])
    tokens: int | None = None
    backend: str = ""
    error: APIError | None = None
    over: bool = False


@pytest.fixture
async def doomed(vllm: VllmWorkers) -> AsyncIterator[Worker]:
    """A worker of this test's own, to be killed."""
    async with vllm.worker(3) as worker:
        yield worker


async def ask(client: AsyncOpenAI, number: int, seen: Seen, places: asyncio.Semaphore) -> None:
    text = f"{number}. {WordSource(900 + number).text(60)}"
    async with places:
        try:
            stream = await client.chat.completions.create(
                model=CHAT,
                messages=[{"role": "user", "content": text}],
                max_tokens=ANSWER_TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                seen.pieces += [each.delta.content for each in chunk.choices if each.delta.content]
                seen.reasons += [each.finish_reason for each in chunk.choices if each.finish_reason]
                if chunk.usage is not None:
                    seen.tokens = chunk.usage.completion_tokens
                    seen.backend = (chunk.model_extra or {})["stockpot"]["backend"]
        except APIError as error:
            seen.error = error
        seen.over = True


def metric(text: str, line: str) -> float:
    return next(float(each.rsplit(" ", 1)[1]) for each in text.splitlines() if each.startswith(line))


async def test_a_worker_is_killed_under_load(
    workers: tuple[Worker, ...], doomed: Worker, tmp_path: Path
) -> None:
    survivor = workers[0]
    both = (survivor, doomed)
    async with (
        # In turn, so that each of them has streams when the one dies.
        running_gateway(both, tmp_path, policy="round-robin", settings=RESILIENCE) as running,
        official(running.url) as client,
    ):
        seen = [Seen() for _ in range(REQUESTS)]
        places = asyncio.Semaphore(AT_ONCE)
        asking = [asyncio.create_task(ask(client, number, each, places)) for number, each in enumerate(seen)]
        # All that are under way have begun, on both workers; many have not been sent yet.
        while sum(bool(each.pieces) and not each.over for each in seen) < AT_ONCE - 1:
            assert not all(task.done() for task in asking), "too fast to be killed in the middle"
            await asyncio.sleep(0.01)
        begun = [bool(each.pieces) for each in seen]
        await doomed.running.kill()
        await asyncio.wait_for(asyncio.gather(*asking), 300)
        async with httpx2.AsyncClient(base_url=running.url) as plain:
            metrics = (await plain.get("/metrics")).text
        rows = await ledger_rows(running.url, requests=REQUESTS)

    broken = [each for each in seen if each.error is not None]
    whole = [each for each in seen if each.error is None]
    assert broken, "nothing was streaming on the worker that was killed"
    assert all(each.pieces for each in broken), "a request failed that had not begun to stream"
    assert all(not each.reasons and each.tokens is None for each in broken), "an error came after the end"
    assert len(whole) >= REQUESTS - AT_ONCE
    for each in whole:
        assert each.reasons == ["length"]
        assert each.tokens == ANSWER_TOKENS
        assert len(each.pieces) <= ANSWER_TOKENS  # spliced, there would be more
    later = [each for each, had_begun in zip(seen, begun, strict=True) if not had_begun]
    assert later
    assert {each.backend for each in later if each.error is None} == {survivor.name}
    breaker = "stockpot_gateway_backend_breaker"
    assert metric(metrics, f'{breaker}{{backend="{doomed.name}",state="open"}}') == 1
    assert metric(metrics, f'{breaker}{{backend="{survivor.name}",state="closed"}}') == 1
    assert sum(row.requests for row in rows) == REQUESTS
    assert sum(row.failures for row in rows) == len(broken)
    told = sum(each.tokens or 0 for each in whole)
    assert sum(row.output_tokens for row in rows) >= told

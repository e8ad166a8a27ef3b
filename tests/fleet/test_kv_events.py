"""What vLLM publishes of its cache is read as it is meant, and the gateway goes by it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tests.fleet.official import official

from stockpot.bench.client import BenchClient
from stockpot.bench.fleet_servers import CHAT, Worker, running_gateway
from stockpot.bench.workload import WordSource
from stockpot.routing.kv_event_follower import KvEventFollower
from stockpot.routing.prefix_index import PrefixIndex, TokenChain

pytestmark = pytest.mark.anyio

THERE = "bench"
BLOCK_TOKENS = 32


def messages(seed: int) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": WordSource(seed).text(400)}]


async def until(true: Callable[[], bool]) -> None:
    """The bound says "never" on any machine."""
    deadline_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline_s, "it does not come about"
        await anyio.sleep(0.05)


async def warm(worker: Worker, seed: int) -> int:
    """Have a prompt computed behind the gateway's back; how many tokens it has."""
    async with official(worker.running.url) as client:
        answer = await client.chat.completions.create(model=THERE, messages=messages(seed), max_tokens=1)
    assert answer.usage is not None
    return answer.usage.prompt_tokens


@pytest.fixture
async def index(workers: tuple[Worker, ...]) -> AsyncIterator[PrefixIndex]:
    """Of the first worker, whose cache was emptied before."""
    worker = workers[0]
    await worker.reset_cache()
    index = PrefixIndex(100_000)
    assert worker.kv_events is not None
    follower = KvEventFollower(worker.name, worker.kv_events, worker.kv_replay, index)
    follower.start()
    await until(lambda: follower.live)
    yield index
    stats = follower.stats()
    await follower.stop()
    assert (stats.garbage, stats.unknown, stats.gaps) == (0, 0, 0)
    assert (stats.index.orphans, stats.index.refused) == (0, 0)


async def test_the_index_holds_what_the_worker_holds(workers: tuple[Worker, ...], index: PrefixIndex) -> None:
    worker = workers[0]
    tokens = await warm(worker, 1)
    asked: dict[str, Any] = {"model": THERE, "messages": messages(1), "add_generation_prompt": True}
    prompt = (await BenchClient(worker.running.url, THERE).post("/tokenize", asked))["tokens"]
    assert len(prompt) == tokens
    whole_blocks = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    await until(lambda: index.match(TokenChain(prompt), THERE) == whole_blocks)
    assert index.match(TokenChain([*prompt[:100], 0, *prompt[101:]]), THERE) == 96
    await worker.reset_cache()
    await warm(worker, 2)  # it says that it forgot with the next it has to say
    await until(lambda: index.match(TokenChain(prompt), THERE) == 0)


async def test_the_gateway_finds_what_others_had_computed(
    workers: tuple[Worker, ...], tmp_path: Path
) -> None:
    """It never saw these prompts: only the events, or their replay, can tell it where they are. By chance it
    would be right once in 64 times."""
    for worker in workers:
        await worker.reset_cache()
    seeds = {worker.name: range(10 * number, 10 * number + 3) for number, worker in enumerate(workers, 1)}
    for worker in workers:
        await warm(worker, seeds[worker.name][0])
    async with running_gateway(workers, tmp_path) as running, official(running.url) as client:
        for worker in workers:
            for seed in seeds[worker.name][1:]:
                await warm(worker, seed)
        await anyio.sleep(1)
        found: dict[int, str] = {}
        for seed in (seed for of_worker in seeds.values() for seed in of_worker):
            answer = await client.chat.completions.create(model=CHAT, messages=messages(seed), max_tokens=1)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > 300, seed
            found[seed] = (answer.model_extra or {})["stockpot"]["backend"]
    assert found == {seed: name for name, of_worker in seeds.items() for seed in of_worker}

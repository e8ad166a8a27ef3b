"""An agent of 30 turns on the real engine: built with `Context`, nearly all of its prompts is cached; written
the usual way it shows the loss that the doctor predicts from its requests alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx2
import msgspec
import pytest

from stockpot.bench.stockpot_server import StockpotServer, stockpot_server
from stockpot.bench.workload import WordSource
from stockpot.context import Context, open_counter
from stockpot.doctor.doctor import Options, examine
from stockpot.doctor.exchange import Exchange
from stockpot.doctor.readers.files import ReadCounts, read_lines
from stockpot.doctor.report import Report

TURNS = 30
Ask = Callable[[dict[str, Any]], str]


def words() -> WordSource:
    return WordSource(77)


def cached_agent(model: str, ask: Ask) -> None:
    """Stable sections first; the time and the state are told at the end."""
    source = words()
    context = Context(system=f"You are an agent. {source.text(1300)}")
    for turn in range(TURNS):
        context.fact("time", f"2026-11-25T10:{turn:02}:07Z")
        context.state.set(f"seen.step-{turn}", {"done": turn % 2 == 0, "note": source.text(3)})
        context.user(f"Go on with {source.text(8)}.")
        context.assistant(ask(context.openai(model)))


def usual_agent(model: str, ask: Ask) -> None:
    """The time on top, and the state as JSON behind it, pretty and rewritten each turn."""
    source = words()
    rules, history = f"You are an agent. {source.text(1300)}", list[dict[str, Any]]()
    state: dict[str, Any] = {}
    for turn in range(TURNS):
        state[f"step-{turn}"] = {"done": turn % 2 == 0, "note": source.text(3)}
        system = (
            f"Current time: 2026-11-25T10:{turn:02}:07Z\n{rules}\nState:\n{json.dumps(state, indent=2)}\n"
        )
        history.append({"role": "user", "content": f"Go on with {source.text(8)}."})
        answer = ask({"model": model, "messages": [{"role": "system", "content": system}, *history]})
        history.append({"role": "assistant", "content": answer})


def run(server: StockpotServer, agent: Callable[[str, Ask], None], session: str) -> None:
    def ask(body: dict[str, Any]) -> str:
        answer = httpx2.post(
            f"{server.running.url}/v1/chat/completions",
            timeout=120,
            json={**body, "max_tokens": 8, "temperature": 0, "ignore_eos": True},
            headers={"x-stockpot-session": session},
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    agent(server.client.model, ask)


def recorded(server: StockpotServer, session: str) -> list[Exchange]:
    """As the server kept them."""
    content = httpx2.get(f"{server.running.url}/admin/requests").content
    lines = msgspec.json.decode(content, type=dict[str, list[msgspec.Raw]])["requests"]
    read = read_lines([bytes(line) for line in lines], "live", ReadCounts())
    return [exchange for exchange in read if exchange.session == session]


def totals(exchanges: list[Exchange]) -> tuple[int, int]:
    usages = [exchange.usage for exchange in exchanges if exchange.usage is not None]
    assert len(usages) == TURNS
    return sum(usage.prompt_tokens for usage in usages), sum(usage.cached_tokens or 0 for usage in usages)


def predicted(exchanges: list[Exchange]) -> Report:
    """From the requests alone: without what the server counted."""
    bare = [msgspec.structs.replace(exchange, usage=None, ttft_s=None) for exchange in exchanges]
    return examine(bare, Options(counter=open_counter("smollm2-135m-instruct")))


async def test_thirty_turns_built_for_the_cache_and_not() -> None:
    settings = {"accounts": {"enabled": False}}
    async with stockpot_server(settings) as server:
        run(server, cached_agent, "cached")
        run(server, usual_agent, "usual")
        right, wrong = recorded(server, "cached"), recorded(server, "usual")

    prompt, cached = totals(right)
    assert cached / prompt >= 0.95, f"{cached} of {prompt}"
    report = predicted(right)
    assert not report.causes
    assert report.prompt_tokens == pytest.approx(prompt, rel=0.1)
    assert report.cached_tokens == pytest.approx(cached, rel=0.1)

    prompt, cached = totals(wrong)
    assert cached / prompt < 0.1, f"{cached} of {prompt}"
    report = predicted(wrong)
    assert {each.cause for each in report.causes} == {"timestamp"}
    assert sum(each.count for each in report.causes) == TURNS - 1
    usages = [exchange.usage for exchange in wrong if exchange.usage is not None]
    # All of the prompt before could have been read, had nothing in it been changed.
    lost = sum(earlier.prompt_tokens - (later.cached_tokens or 0) for earlier, later in pairwise(usages))
    assert report.tokens_lost == pytest.approx(lost, rel=0.1), f"{report.tokens_lost} predicted, {lost} lost"

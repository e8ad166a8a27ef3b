"""What looking for a kept answer, and keeping the new one, adds to a generation that had to be made: the same
questions to two servers with the real model, one of which keeps answers."""

from __future__ import annotations

import tempfile
import time
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field

import msgspec

from stockpot.bench.http_stream import EventSplitter, stream
from stockpot.bench.progress import BenchProgress
from stockpot.bench.stockpot_server import StockpotServer, stockpot_server
from stockpot.bench.workload import WordSource
from stockpot.errors import ServerUnreachable
from stockpot.recall.questions.question import read_question
from stockpot.recall.questions.refusals import refusal_of

_SYSTEM = "You are a patient assistant. You answer in whole sentences, and say what you are sure of."
_TOKENS_MAX = 48
_WARM_UP = 3


@dataclass(slots=True)
class MissTimes:
    """Seconds until the first text, and until the end; a place for each question. `kept` is how many answers
    the one server kept, `hits` how many it gave: none must be."""

    off_first_s: list[float] = field(default_factory=list[float])
    off_total_s: list[float] = field(default_factory=list[float])
    on_first_s: list[float] = field(default_factory=list[float])
    on_total_s: list[float] = field(default_factory=list[float])
    kept: int = 0
    hits: int = 0


async def time_misses(questions: int, words: int, progress: BenchProgress) -> MissTimes:
    """Questions of `words` words, and a few more that stay the same. None comes twice; who is asked first
    changes each time. Raises ServerUnreachable."""
    times = MissTimes()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stockpot-bench-"))
        recall = {"exact": True, "semantic": {"mode": "on"}}
        off = await stack.enter_async_context(stockpot_server({}))
        # Data of its own: what an earlier run kept would be found again.
        on = await stack.enter_async_context(stockpot_server({"data_dir": folder, "recall": recall}))  # pyright: ignore[reportArgumentType]
        source = WordSource(31 + words)
        for number in range(questions + _WARM_UP):
            text = _question(source, words)
            answers = {server: await _ask(server, text) for server in ((off, on), (on, off))[number % 2]}
            if number >= _WARM_UP:
                times.off_first_s.append(answers[off].first_s)
                times.off_total_s.append(answers[off].total_s)
                times.on_first_s.append(answers[on].first_s)
                times.on_total_s.append(answers[on].total_s)
                times.kept += answers[on].kept
                times.hits += answers[on].hit
            progress(f"misses, {words} words", number + 1, questions + _WARM_UP)
    return times


@dataclass(frozen=True, slots=True)
class _Answer:
    first_s: float
    total_s: float
    hit: bool
    kept: bool


def _question(source: WordSource, words: int) -> str:
    """One that is looked for by meaning: some words make it one about a time, for example."""
    while True:
        text = f"Say in one sentence what these words have in common: {source.text(words)}."
        if not refusal_of(read_question(text)):
            return text


class _Recall(msgspec.Struct):
    outcome: str = ""
    entry: str = ""


class _Extension(msgspec.Struct):
    recall: _Recall | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    stockpot: _Extension | None = None


async def _ask(server: StockpotServer, text: str) -> _Answer:
    content = {
        "model": server.client.model,
        "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}],
        "max_tokens": _TOKENS_MAX,
        "stop": ["."],  # an answer that was cut off is not kept
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},  # what recall did is told beside it
    }
    events = EventSplitter()
    started_s = time.perf_counter()
    first_s, told = 0.0, _Recall()
    chunks = msgspec.json.Decoder(_Chunk)
    url = server.running.url + "/v1/chat/completions"
    async with aclosing(stream(url, content=content)) as parts:
        async for status, part in parts:
            if status != 200:
                raise ServerUnreachable(f"{url} answered {status}: {part[:200]!r}.")
            for event in events.feed(part):
                if event == b"[DONE]":
                    continue
                chunk = chunks.decode(event)
                if not first_s and any(choice.delta.content for choice in chunk.choices):
                    first_s = time.perf_counter() - started_s
                if chunk.stockpot is not None:
                    told = chunk.stockpot.recall or told
    total_s = time.perf_counter() - started_s
    hit = told.outcome in ("exact", "semantic")
    return _Answer(first_s or total_s, total_s, hit, kept=bool(told.entry) and not hit)

"""How long it takes to decide about a question at 100,000 kept ones, its embedding included."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stockpot.bench.progress import BenchProgress
from stockpot.bench.recall.labelled import embed_all
from stockpot.bench.recall.policies import key_of
from stockpot.bench.recall.semantic_run import SemanticRun
from stockpot.bench.workload import WordSource
from stockpot.clock import SystemClock
from stockpot.recall.evidence.evidence import Evidence
from stockpot.recall.questions.question import read_question
from stockpot.recall.questions.refusals import refusal_of
from stockpot.recall.stores.open_store import open_store
from stockpot.recall.vectors.embedder import Embedder
from stockpot.recall.vectors.index import Near, VectorIndex
from stockpot.settings_recall import RecallSettings, SemanticSettings

_WORDS = 7
_EMBEDDED = 2_000
_NOISE = 0.6
"""Length of what is added to a unit vector: the cosine with it becomes 0.86."""
_WARM_UP = 50
_BATCH = 200


@dataclass(slots=True)
class DecisionTimes:
    """Seconds: of whole decisions, and of two of their parts."""

    whole_s: list[float] = field(default_factory=list[float])
    embedding_s: list[float] = field(default_factory=list[float])
    search_s: list[float] = field(default_factory=list[float])


async def time_decisions(
    entries: int,
    decisions: int,
    embedder: Embedder,
    index: VectorIndex,
    progress: BenchProgress,
) -> DecisionTimes:
    """One partition with `entries` questions in the real store and index; `decisions` new ones, one after the
    other. Both parts are started."""
    source = WordSource(11)
    texts = list(dict.fromkeys(_question(source) for _ in range(entries)))
    vectors = await _vectors(texts, embedder, progress)
    settings = SemanticSettings(mode="on")
    times = DecisionTimes()
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as folder:
        clock = SystemClock()
        store = open_store(RecallSettings(), Path(folder), clock)
        await store.start()
        try:
            evidence = Evidence(settings)
            timed_index = _TimedIndex(index, times)
            filling = SemanticRun(settings, embedder, evidence, index=timed_index, store=store, clock=clock)
            await _fill(filling, texts, vectors, progress)
            timed = _TimedEmbedder(embedder, times)
            run = SemanticRun(settings, timed, evidence, index=timed_index, store=store, clock=clock)
            asked = WordSource(12)
            for number in range(decisions + _WARM_UP):
                question = _question(asked)
                started_s = time.perf_counter()
                await run.ask([("user", question)])
                times.whole_s.append(time.perf_counter() - started_s)
                if number == _WARM_UP - 1:
                    times.whole_s.clear()
                    times.embedding_s.clear()
                    times.search_s.clear()
                    progress("decide", 0, 1)
            progress("decide", 1, 1)
        finally:
            await store.close()
    return times


async def _fill(
    run: SemanticRun, texts: Sequence[str], vectors: NDArray[np.float32], progress: BenchProgress
) -> None:
    """As if each had been asked and answered, without the looking."""
    first = await run.ask([("user", texts[0])])
    assert first.asked is not None
    for number, text in enumerate(texts):
        asked = replace(first.asked, question=read_question(text), vector=vectors[number])
        run.keep(replace(first, asked=asked), key_of(number))
        if number % _BATCH == 0:
            await run.settled()
            await run.store.flush()  # it loses what comes faster than it can be written
            progress("fill the cache", number, len(texts))
    await run.quiet()
    progress("fill the cache", len(texts), len(texts))


def _question(source: WordSource) -> str:
    """One that is answered by meaning: some words make it one about a time, for example."""
    while True:
        text = f"How do I get the {source.text(_WORDS)}?"
        if not refusal_of(read_question(text)):
            return text


async def _vectors(texts: Sequence[str], embedder: Embedder, progress: BenchProgress) -> NDArray[np.float32]:
    """Those of the first 2,000 texts; the others get one of these each with noise, for embedding them all
    would take minutes."""
    real = await embed_all(texts[:_EMBEDDED], embedder, progress=progress)
    random = np.random.default_rng(5)
    noise = random.standard_normal((len(texts) - len(real), real.shape[1])).astype(np.float32)
    noise *= _NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
    made = real[np.arange(len(noise)) % len(real)] + noise
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return np.concatenate([real, made])


class _TimedEmbedder(Embedder):
    def __init__(self, inner: Embedder, times: DecisionTimes) -> None:
        self._inner = inner
        self._times = times

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def dimensions(self) -> int | None:
        return self._inner.dimensions

    def fits(self, text: str) -> bool:
        return self._inner.fits(text)

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        started_s = time.perf_counter()
        vectors = await self._inner.embed(texts)
        self._times.embedding_s.append(time.perf_counter() - started_s)
        return vectors


class _TimedIndex(VectorIndex):
    def __init__(self, inner: VectorIndex, times: DecisionTimes) -> None:
        self._inner = inner
        self._times = times

    async def add(self, partition: bytes, key: bytes, vector: NDArray[np.float32]) -> None:
        await self._inner.add(partition, key, vector)

    async def search(self, partition: bytes, vector: NDArray[np.float32], count: int) -> Sequence[Near]:
        started_s = time.perf_counter()
        found = await self._inner.search(partition, vector, count)
        self._times.search_s.append(time.perf_counter() - started_s)
        return found

    async def remove(self, partition: bytes, key: bytes) -> None:
        await self._inner.remove(partition, key)

    async def settled(self) -> None:
        await self._inner.settled()

    def __len__(self) -> int:
        return len(self._inner)

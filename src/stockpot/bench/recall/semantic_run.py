"""The semantic cache as the server runs it, without the server: the same classes, asked directly."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stockpot.bench.recall.labelled import LabelledTexts
from stockpot.bench.recall.policies import SCOPE, key_of, number_of
from stockpot.clock import Clock, SystemClock
from stockpot.errors import ConfigurationError
from stockpot.events import Completed, Delta, Event, Finished, Timings, Usage
from stockpot.recall.admissible import Scopes
from stockpot.recall.answer import pack
from stockpot.recall.entry import Entry, Selector, entry_id
from stockpot.recall.evidence.evidence import Evidence, Observation
from stockpot.recall.learning import Learner
from stockpot.recall.semantic import LookUp, Semantic
from stockpot.recall.stores.store import AnswerStore, StoreStats
from stockpot.recall.vectors.embedder import Embedder
from stockpot.recall.vectors.index import VectorIndex
from stockpot.recall.vectors.memory_index import MemoryIndex
from stockpot.requests import ChatRequest, Generation, Message, Sampling
from stockpot.routing.plan import RoutePlan, Step
from stockpot.settings_recall import SemanticSettings

_MODEL = "model"
_PLAN = RoutePlan(_MODEL, (Step(_MODEL),), "least-load")
_YEAR_S = 365 * 86_400.0

Turn = tuple[Literal["user", "assistant", "system"], str]


class HeldEntries(AnswerStore):
    """In memory, for as long as a benchmark runs; never full."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._learnt: list[Observation] = []

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def put(self, entry: Entry) -> None:
        self._entries[entry.id] = entry

    async def get(self, key: bytes) -> Entry | None:
        return self._entries.get(entry_id(key))

    async def by_id(self, id: str) -> Entry | None:
        return self._entries.get(id)

    async def remove(self, selector: Selector) -> Sequence[Entry]:
        gone = [entry for entry in self._entries.values() if selector.fits(entry)]
        for entry in gone:
            del self._entries[entry.id]
        return gone

    async def entries(self, *, partitioned: bool = False, limit: int | None = None) -> AsyncIterator[Entry]:
        for entry in list(reversed(self._entries.values()))[:limit]:
            if entry.partition or not partitioned:
                yield entry

    async def existing(self, keys: Collection[bytes]) -> set[bytes]:
        return {key for key in keys if entry_id(key) in self._entries}

    def learn(self, observation: Observation) -> None:
        self._learnt.append(observation)

    async def observations(self) -> Sequence[Observation]:
        return self._learnt

    async def flush(self) -> None:
        """Nothing waits."""

    def stats(self) -> StoreStats:
        return StoreStats(len(self._entries), sum(entry.size_bytes for entry in self._entries.values()))


class KnownVectors(Embedder):
    """Gives vectors that `embedder` made before."""

    def __init__(self, embedder: Embedder, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        self._embedder = embedder
        self._vectors = vectors

    @property
    def name(self) -> str:
        return self._embedder.name

    @property
    def dimensions(self) -> int | None:
        return self._embedder.dimensions

    def fits(self, text: str) -> bool:
        return not text or (text in self._vectors and self._embedder.fits(text))

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self._vectors[text] for text in texts])


class SemanticRun:
    """One cache and its evidence, empty at first."""

    def __init__(
        self,
        settings: SemanticSettings,
        embedder: Embedder,
        evidence: Evidence,
        *,
        index: VectorIndex | None = None,
        store: AnswerStore | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = SystemClock() if clock is None else clock
        self.store = HeldEntries() if store is None else store
        self.semantic = Semantic(
            settings,
            store=self.store,
            embedder=embedder,
            index=MemoryIndex() if index is None else index,
            evidence=evidence,
            clock=self.clock,
        )
        self._kept = 0

    async def ask(self, turns: Sequence[Turn]) -> LookUp:
        """What the server would find for a chat that ends in a question."""
        return await self.semantic.look_up(_PLAN, "", _request(turns), Scopes(SCOPE, (SCOPE,)))

    def keep(self, look_up: LookUp, key: bytes, answer: bytes = b"") -> None:
        """The answer to what was just asked, as an entry."""
        if look_up.asked is None:
            return
        now = self.clock.wall()
        entry = Entry(key, SCOPE, SCOPE, "", _MODEL, now, now + _YEAR_S, answer, 0, 0, 0, 0.0)
        self.store.put(self.semantic.indexed(entry, look_up))
        self._kept += 1

    async def settled(self) -> None:
        """Until what was kept can be found: the index adds it behind the request."""
        while len(self.semantic.index) < self._kept:  # noqa: ASYNC110  an index has no event for it
            await asyncio.sleep(0)

    async def quiet(self) -> None:
        """Until nothing goes on behind the requests: no graph is being made, no entry waits to be written."""
        await self.settled()
        await self.semantic.index.settled()
        await self.store.flush()


async def through_semantic(
    data: LabelledTexts, order: Sequence[int], settings: SemanticSettings, embedder: Embedder, seed: int
) -> list[tuple[int, int]]:
    """The hits of `policies.ours` on the same stream, found and learnt from by the server's classes.
    `embedder` is the one that made the vectors of `data`; an answer is its label."""
    vectors = dict(zip(data.texts, data.vectors, strict=True))
    evidence = Evidence(settings)
    run = SemanticRun(settings, KnownVectors(embedder, vectors), evidence)
    asked = 0

    async def judge(model: str, instruction: str, text: str) -> str:
        raise ConfigurationError(f"No judge is set, but {model} was asked: {instruction} {text}")

    async def regenerate(request: ChatRequest) -> AsyncGenerator[Event]:
        del request
        for event in _answer(int(data.labels[asked])):
            yield event

    learner = Learner(
        *(settings, run.store, run.semantic.embedder, evidence, run.clock),
        ask=judge,
        regenerate=regenerate,
        chance=random.Random(seed).random,
    )
    await learner.start()
    hits: list[tuple[int, int]] = []
    try:
        for asked in order:
            turns: list[Turn] = [("user", data.texts[asked])]
            look_up = await run.ask(turns)
            if look_up.hit is not None:
                hits.append((asked, number_of(look_up.hit.key)))
                evidence.served(SCOPE, look_up.hit.judgement)
                learner.audit(_request(turns), look_up, look_up.hit)
            else:
                answer = pack(_answer(int(data.labels[asked])))
                run.keep(look_up, key_of(asked), answer)
                await run.settled()
                learner.explored(look_up, answer, made=key_of(asked), writer="")
            await learner.settled()
    finally:
        await learner.close()
    return hits


def _answer(label: int) -> tuple[Event, ...]:
    """One word, and no two labels' are alike."""
    text = hashlib.blake2b(str(label).encode(), digest_size=8).hexdigest()
    usage = Usage(1, {}, 1)
    return (Delta(0, text), Finished(0, "stop"), Completed(usage, Timings(0.0, 0.0, 0.0)))


def _request(turns: Sequence[Turn]) -> ChatRequest:
    generation = Generation(_MODEL, "bench", Sampling(temperature=0.0), tenant=SCOPE)
    return ChatRequest(generation, tuple(Message(role, text) for role, text in turns))

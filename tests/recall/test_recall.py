"""Recall as one part: the verifier, untrusted writers, conversations by meaning, judges, and what fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stockpot.caller import Caller
from stockpot.clock import VirtualClock
from stockpot.errors import NotCached, UpstreamError
from stockpot.events import Completed, Delta, Event, Finished, Queued, Recalled, Started, Timings, Usage
from stockpot.recall.entry import Selector
from stockpot.recall.evidence.evidence import Evidence
from stockpot.recall.learning import Learner
from stockpot.recall.recall import Recall
from stockpot.recall.semantic import Semantic
from stockpot.recall.stores.open_store import open_store
from stockpot.recall.vectors.embedder import Embedder, Vectors
from stockpot.recall.vectors.memory_index import MemoryIndex
from stockpot.records import Attempt
from stockpot.requests import ChatRequest, Generation, Message, RecallControl, Sampling
from stockpot.routing.plan import RoutePlan, Step
from stockpot.settings_recall import RecallSettings

PLAN = RoutePlan("m", (Step("m"),), "prefix")
QUESTION, REWORDED, OTHER = "How do I reset it?", "how do i reset it ?!", "Where is the manual?"


class Letters(Embedder):
    """How often each letter comes: enough for questions that differ in form alone to be near."""

    def __init__(self) -> None:
        self.fails = False

    @property
    def name(self) -> str:
        return "letters"

    @property
    def dimensions(self) -> int:
        return 27

    async def embed(self, texts: Sequence[str]) -> Vectors:
        if self.fails:
            raise UpstreamError("no", cause="connect", backend="e")
        rows = np.zeros((len(texts), 27), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for letter in text.lower():
                if "a" <= letter <= "z":
                    row[ord(letter) - 97] += 1
            row[26] = 0.1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass
class Way:
    """A request's journey, as far as recall knows it."""

    arrived_s: float = 0.0
    model: str = ""
    backend: str = ""
    recalled: Recalled | None = None
    attempts: list[Attempt] = field(default_factory=list[Attempt])


class World:
    """Recall before a model that says `says`, or fails."""

    def __init__(self, folder: Path, settings: RecallSettings) -> None:
        self.clock = VirtualClock()
        self.says = "Hold the button."
        self.made = 0
        self.judged: list[str] = []
        self.judge_says = "SAME"
        self.embedder = Letters()
        store = open_store(settings, folder, self.clock)
        evidence = Evidence(settings.semantic)
        semantic = Semantic(
            settings.semantic,
            store=store,
            embedder=self.embedder,
            index=MemoryIndex(),
            evidence=evidence,
            clock=self.clock,
        )
        self.learner = Learner(
            settings.semantic,
            store,
            self.embedder,
            evidence,
            self.clock,
            ask=self._judge,
            regenerate=lambda _: self._make(Way()),
            chance=lambda: 0.0,
        )
        self.recall = Recall(
            settings,
            store,
            self.clock,
            version=lambda _: "1",
            price=lambda _: 7,
            semantic=semantic,
            learner=self.learner,
        )

    async def _judge(self, model: str, instruction: str, text: str) -> str:
        del model, instruction
        self.judged.append(text)
        return self.judge_says

    async def _make(self, journey: Way) -> AsyncGenerator[Event]:
        self.made += 1
        journey.model = "m"
        yield Queued(0)
        yield Started(5, {}, 0.0)
        yield Delta(0, self.says)
        yield Finished(0, "stop")
        yield Completed(Usage(5, {}, 3), Timings(0.0, 0.0, 0.0))

    async def ask(
        self, *said: str, control: RecallControl | None = None, caller: Caller | None = None
    ) -> tuple[str, Recalled]:
        """The answer to the last of what was said, by turns, and what recall did."""
        roles = ("user", "assistant")
        messages = [Message(roles[turn % 2], text) for turn, text in enumerate(said)]
        caller = caller or Caller(tenant="t", key_id="k")
        generation = Generation(
            "m",
            f"r{self.made}",
            sampling=Sampling(temperature=0),
            tenant=caller.tenant,
            caller=caller,
            recall=control or RecallControl(),
        )
        way, text = Way(self.clock.monotonic()), ""
        events = self.recall.answer(PLAN, ChatRequest(generation, messages), self._make, way)
        async for event in events:
            if isinstance(event, Delta):
                text += event.text
        assert way.recalled is not None
        return text, way.recalled


@asynccontextmanager
async def world(folder: Path, **semantic: Any) -> AsyncGenerator[World]:
    top = {name: semantic.pop(name) for name in ("untrusted_tags", "scope", "exact") if name in semantic}
    settings = RecallSettings.model_validate(
        {"exact": True, **top, "semantic": {"mode": "on", "audit_share": 0.0, **semantic}}
    )
    made = World(folder, settings)
    await made.recall.start()
    await made.recall.rebuilt()
    try:
        yield made
    finally:
        await made.recall.close()


def agrees(first: str, second: str) -> float:
    return 1.0 if first and second else 0.0


def doubts(first: str, second: str) -> float:
    del first, second
    return 0.2


def breaks(first: str, second: str) -> float:
    raise RuntimeError(f"{first} {second}")


@pytest.mark.parametrize(("verifier", "hit"), [("agrees", True), ("doubts", False), ("breaks", False)])
async def test_the_verifier_has_the_last_word_and_fails_closed(
    tmp_path: Path, verifier: str, hit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, Callable[[str, str], float]] = {"agrees": agrees, "doubts": doubts, "breaks": breaks}
    monkeypatch.setattr("stockpot.recall.semantic.load_verifier", known.__getitem__)
    async with world(tmp_path, verifier=verifier) as w:
        await w.ask(QUESTION)
        await asyncio.sleep(0)
        _, told = await w.ask(REWORDED)
        assert told.is_hit == hit


async def test_what_an_untrusted_key_causes_it_alone_gets(tmp_path: Path) -> None:
    trusted = Caller(tenant="t", key_id="a")
    doubtful = Caller(tenant="t", key_id="b", tags=("public",))
    another = replace(doubtful, key_id="c")
    async with world(tmp_path, untrusted_tags=["public"]) as w:
        w.says = "poison"
        await w.ask(QUESTION, caller=doubtful)
        await asyncio.sleep(0)
        w.says = "right"
        for caller in (trusted, another):
            for question in (QUESTION, REWORDED):
                text, _ = await w.ask(question, caller=caller)
                assert text == "right"
        for question in (QUESTION, REWORDED):
            text, told = await w.ask(question, caller=doubtful)
            assert told.is_hit
            assert text == "poison"
        made = w.made
        assert (await w.ask(QUESTION, caller=replace(another, key_id="d")))[0] == "right"
        assert w.made == made, "an untrusted caller may be given what the tenant's others made"


async def test_conversations_by_meaning(tmp_path: Path) -> None:
    async with world(tmp_path, conversations="embedded") as w:
        await w.ask("My lamp is broken.", "I see.", QUESTION)
        await asyncio.sleep(0)
        assert (await w.ask("my lamp is broken", "I see.", REWORDED))[1].is_hit
        assert not (await w.ask("My phone is broken.", "I see.", QUESTION))[1].is_hit
        assert not (await w.ask(REWORDED))[1].is_hit


async def test_an_embedder_that_fails_is_a_miss_and_the_exact_answer_is_there(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.embedder.fails = True
        _, told = await w.ask(QUESTION)
        assert (told.outcome, told.reason) == ("miss", "embedder")
        assert (await w.ask(QUESTION))[1].outcome == "exact"


async def test_the_index_is_rebuilt_from_the_store(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ask(QUESTION)
    async with world(tmp_path) as w:
        assert (await w.ask(REWORDED))[1].outcome == "semantic"
        assert not w.made


async def test_what_was_invalidated_is_not_found_by_meaning(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ask(QUESTION)
        await asyncio.sleep(0)
        removed = await w.recall.invalidate(Selector(tenant="t"))
        assert len(removed) == 1
        assert not (await w.ask(REWORDED))[1].is_hit


async def test_a_judge_says_whether_answers_agree_that_texts_leave_open(tmp_path: Path) -> None:
    async with world(tmp_path, judge="m", audit_share=1.0) as w:
        w.says = "Hold the round button at the back of it until it blinks."
        await w.ask(QUESTION)
        await asyncio.sleep(0)
        w.says = "Something rather different is said now about the very same matter."
        assert (await w.ask(REWORDED))[1].is_hit
        await w.learner.settled()
        assert w.learner.counts.audited == 1
        assert w.learner.counts.audited_wrong == 0
        assert len(w.judged) == 1


async def test_only_a_kept_answer_or_none(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        with pytest.raises(NotCached):
            await w.ask(QUESTION, control=RecallControl(only=True))
        await w.ask(QUESTION)
        assert (await w.ask(QUESTION, control=RecallControl(only=True)))[1].is_hit
        assert w.made == 1


async def test_a_caller_may_be_stricter_never_laxer(tmp_path: Path) -> None:
    async with world(tmp_path, max_error=0.02) as w:
        await w.ask(QUESTION)
        await asyncio.sleep(0)
        strict = await w.ask(REWORDED, control=RecallControl(max_error=0.0, store=False))
        assert not strict[1].is_hit
        assert not (await w.ask(REWORDED, control=RecallControl(semantic=False, store=False)))[1].is_hit
        assert not (await w.ask(OTHER, control=RecallControl(max_error=1.0, store=False)))[1].is_hit
        assert (await w.ask(REWORDED, control=RecallControl(max_error=1.0, store=False)))[1].is_hit


async def test_kept_answers_expire(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ask(QUESTION)
        w.clock.advance(86_401)
        assert (await w.ask(QUESTION))[1].outcome == "miss"

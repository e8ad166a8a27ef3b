"""Finds a kept answer to a question that means the same: partition first, match after, then the evidence.

What must be equal is in the partition (`exact_key.partition_key`): tenant, model, instructions, tools,
format, sampling, and what was said before, unless that is compared by meaning too. Within it the nearest
questions are candidates; their words may rule an answer out (`question.compare`), and only what is known of
the error (`evidence.Evidence`) lets one be given.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from stockpot.clock import Clock
from stockpot.errors import ConfigurationError, StockpotError
from stockpot.events import Recalled, RecallOutcome
from stockpot.recall.admissible import Scopes
from stockpot.recall.entry import Entry, entry_id
from stockpot.recall.evidence.evidence import Evidence, Judgement
from stockpot.recall.exact_key import partition_key
from stockpot.recall.questions.question import Likeness, Question, compare, read_question
from stockpot.recall.questions.refusals import refusal_of
from stockpot.recall.stores.store import AnswerStore
from stockpot.recall.vectors.embedder import Embedder
from stockpot.recall.vectors.index import Near, VectorIndex
from stockpot.requests import ChatRequest, Message
from stockpot.routing.plan import RoutePlan
from stockpot.settings_recall import SemanticSettings

_LOG = logging.getLogger(__name__)

_EMBEDS_IN_S = 1.0
_SEARCHES_IN_S = 0.5
_VERIFIES_IN_S = 1.0
"""From here on it is a miss: looking must not take longer than making the answer."""
_QUESTIONS_KEPT = 20_000

Verifier = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as far as it may be answered by meaning: what it must share, and where it lies."""

    question: Question
    partitions: tuple[tuple[str, bytes], ...]
    """Scope and partition: first that of what is written, then those that are only read."""
    vector: NDArray[np.float32]
    context_vector: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kept question that is near, and what was decided about its answer."""

    key: bytes
    scope: str
    question: Question
    likeness: Likeness
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class LookUp:
    """What came of looking: `hit` may answer; `refused` are those that may not, the nearest first. `asked`
    None: the request is not one to answer by meaning, and `reason` says why."""

    reason: str
    asked: Asked | None = None
    hit: Candidate | None = None
    refused: tuple[Candidate, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The refused one to learn from: the nearest that is not ruled out by its words."""
        return next((each for each in self.refused if not each.likeness.conflict), None)

    def partition_of(self, candidate: Candidate) -> bytes:
        """Where it was found."""
        partitions = () if self.asked is None else self.asked.partitions
        return next((each for scope, each in partitions if scope == candidate.scope), b"")

    def told(self, outcome: RecallOutcome, *, reason: str = "", would: str = "") -> Recalled:
        """For the sender of the request."""
        shown = self.hit or self.best or next(iter(self.refused), None)
        if shown is None:
            return Recalled(outcome, reason or self.reason, would=would)
        return Recalled(
            outcome,
            reason or self.reason,
            similarity=round(shown.likeness.similarity, 4),
            error_upper=round(shown.judgement.error_upper, 5),
            would=would,
        )


@dataclass(frozen=True, slots=True)
class _Known:
    """A kept question: read once, and let go when others have come."""

    question: Question
    scope: str
    partition: bytes
    context_vector: NDArray[np.float32] | None
    created_at: float


class Semantic:
    """On the event loop only. The parts are started and closed by whoever made them."""

    def __init__(
        self,
        settings: SemanticSettings,
        *,
        store: AnswerStore,
        embedder: Embedder,
        index: VectorIndex,
        evidence: Evidence,
        clock: Clock,
    ) -> None:
        self.settings = settings
        self.evidence = evidence
        self.index = index
        self.embedder = embedder
        self._store = store
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._adding: set[asyncio.Task[None]] = set()
        self._verifier = None if settings.verifier is None else load_verifier(settings.verifier)

    @property
    def is_on(self) -> bool:
        return self.settings.mode != "off"

    @property
    def serves(self) -> bool:
        return self.settings.mode == "on"

    def take(self, settings: SemanticSettings) -> None:
        """From now on by these; what was opened (embedder, index) stays."""
        if settings.verifier != self.settings.verifier:
            self._verifier = None if settings.verifier is None else load_verifier(settings.verifier)
        self.settings = settings
        self.evidence.take(settings)

    async def start(self) -> None:
        """Open embedder and index. Raises StockpotError."""
        await self.embedder.start()
        await self.index.start()

    async def close(self) -> None:
        """Let go of them. Idempotent."""
        if self._adding:
            await asyncio.wait(tuple(self._adding))
        await self.index.close()
        await self.embedder.close()

    async def rebuild(self) -> None:
        """Index and calibration from the store of truth. Meanwhile what is not there yet is a miss."""
        await self.relearn()
        async for entry in self._store.entries(partitioned=True):
            vector = np.frombuffer(entry.vector, dtype="<f4")
            if entry.context:  # whose vector follows
                vector = vector[: len(vector) // 2]
            if self.index.lasts:
                # The latest come first: where one is known, those before it are.
                near = await self.index.search(entry.partition, vector, 1)
                if near and near[0].key == entry.key:
                    break
            await self.index.add(entry.partition, entry.key, vector)

    async def relearn(self) -> None:
        """The calibration anew from what the store has, made in a thread; meanwhile the old one decides."""
        observations = await self._store.observations()
        fresh = Evidence(self.settings)
        await asyncio.to_thread(fresh.rebuild, observations)
        self.evidence.adopt(fresh)

    async def look_up(self, plan: RoutePlan, version: str, request: ChatRequest, scopes: Scopes) -> LookUp:
        """The nearest kept question whose answer may be given."""
        refused = _refused(request)
        if refused:
            return LookUp(refused)
        text = request.messages[-1].content
        exact = self.settings.conversations == "exact"
        context = "" if exact else _context(request.messages[:-1])
        # Before they are read: reading takes longer, the longer they are.
        if not (self.embedder.fits(text) and self.embedder.fits(context)):
            return LookUp("too_long")
        question = read_question(text, context)
        kind = refusal_of(question)
        if kind and kind not in self.settings.allow:
            return LookUp(f"refused_{kind}")
        partitions: list[tuple[str, bytes]] = []
        for scope in dict.fromkeys((scopes.write, *scopes.read)):
            partition = partition_key(scope, plan, version, request, self.embedder.name, exact_context=exact)
            if partition is None:
                return LookUp("not_canonical")
            partitions.append((scope, partition))
        try:
            texts = [text, question.context] if question.context else [text]
            vectors = await asyncio.wait_for(self.embedder.embed(texts), _EMBEDS_IN_S)
        except (StockpotError, TimeoutError) as error:
            _LOG.warning("recall: a question got no vector, and is a miss (%s)", error or "timeout")
            return LookUp("embedder")
        asked = Asked(question, tuple(partitions), vectors[0], vectors[1] if question.context else None)
        return await self._decided(request, asked, scopes)

    async def _decided(self, request: ChatRequest, asked: Asked, scopes: Scopes) -> LookUp:
        refused: list[Candidate] = []
        control = request.generation.recall
        for scope, partition in asked.partitions:
            if scope not in scopes.read:
                continue
            nearest = await self._nearest(partition, asked.vector)
            # Together: each may be a read of the store.
            found = await asyncio.gather(*(self._known_in(scope, partition, each.key) for each in nearest))
            near = [
                (each, known)
                for each, known in zip(nearest, found, strict=True)
                if known is not None and not self._is_too_old(known, control.max_age_s)
            ]
            pairs = [(each.key, _likeness(asked, each, known)) for each, known in near]
            judged = self.evidence.judge_all(scope, pairs, max_error=control.max_error)
            for (key, likeness), (_, known), judgement in zip(pairs, near, judged, strict=True):
                candidate = Candidate(key, scope, known.question, likeness, judgement)
                if judgement.serve and await self._is_verified(asked, candidate):
                    return LookUp(judgement.reason, asked, hit=candidate, refused=tuple(refused))
                refused.append(candidate)
        return LookUp(
            refused[0].judgement.reason if refused else "nothing_near", asked, refused=tuple(refused)
        )

    async def _known_in(self, scope: str, partition: bytes, key: bytes) -> _Known | None:
        known = await self._question(key)
        if known is not None and known.scope == scope and known.partition == partition:
            return known
        if not await self._store.existing((key,)):  # and the store can be asked
            await self.index.remove(partition, key)
        return None

    def _is_too_old(self, known: _Known, max_age_s: float | None) -> bool:
        return max_age_s is not None and self._clock.wall() - known.created_at > max_age_s

    async def _nearest(self, partition: bytes, vector: NDArray[np.float32]) -> Sequence[Near]:
        try:
            return await asyncio.wait_for(
                self.index.search(partition, vector, self.settings.candidates), _SEARCHES_IN_S
            )
        except TimeoutError:
            return ()

    async def _is_verified(self, asked: Asked, candidate: Candidate) -> bool:
        """What the verifier says; True without one. One that fails or is slow has said no."""
        if self._verifier is None:
            return True
        told = asyncio.to_thread(self._verifier, candidate.question.text, asked.question.text)
        try:
            return float(await asyncio.wait_for(told, _VERIFIES_IN_S)) >= self.settings.verifier_threshold
        except Exception as error:  # noqa: BLE001  foreign code: whatever it raises, it has not agreed
            _LOG.warning(
                "recall: the verifier %r failed, and the answer %s is not given (%s: %s)",
                *(self.settings.verifier, entry_id(candidate.key), type(error).__name__, error),
            )
            return False

    def indexed(self, entry: Entry, look_up: LookUp) -> Entry:
        """The entry with what finds it by meaning; it is found from now on (nearly: the index adds it
        soon)."""
        asked = look_up.asked
        if asked is None:
            return entry
        vectors = [asked.vector] if asked.context_vector is None else [asked.vector, asked.context_vector]
        scope, partition = asked.partitions[0]
        assert scope == entry.scope
        known = _Known(asked.question, entry.scope, partition, asked.context_vector, entry.created_at)
        self._know(entry.key, known)
        task = asyncio.create_task(self.index.add(partition, entry.key, asked.vector))
        self._adding.add(task)
        task.add_done_callback(self._adding.discard)
        return replace(
            entry,
            partition=partition,
            question=asked.question.text,
            context=asked.question.context,
            vector=np.concatenate(vectors).astype("<f4").tobytes(),
        )

    async def forget(self, partition: bytes, key: bytes) -> None:
        """Of an entry that is gone."""
        self._known.pop(key, None)
        self.evidence.forget(key)
        if partition:
            await self.index.remove(partition, key)

    async def _question(self, key: bytes) -> _Known | None:
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        entry = await self._store.by_id(entry_id(key))
        if entry is None or entry.key != key:
            return None
        vector = np.frombuffer(entry.vector, dtype="<f4")
        return self._know(
            key,
            _Known(
                read_question(entry.question, entry.context),
                entry.scope,
                entry.partition,
                vector[len(vector) // 2 :] if entry.context else None,
                entry.created_at,
            ),
        )

    def _know(self, key: bytes, known: _Known) -> _Known:
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > _QUESTIONS_KEPT:
            self._known.popitem(last=False)
        return known


def _likeness(asked: Asked, near: Near, known: _Known) -> Likeness:
    before = 1.0
    if asked.context_vector is not None or known.context_vector is not None:
        before = 0.0
        if asked.context_vector is not None and known.context_vector is not None:
            before = float(asked.context_vector @ known.context_vector)
    return compare(asked.question, known.question, near.similarity, before)


def load_verifier(name: str) -> Verifier:
    """The function `module:function`. Raises ConfigurationError."""
    module, colon, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"The verifier {name!r} of recall cannot be loaded: {error}.") from error
    if found is None or not callable(found):
        raise ConfigurationError(f"The verifier {name!r} of recall is no function; give module:function.")
    return cast("Verifier", found)


def _refused(request: ChatRequest) -> str:
    """Why the request is not one to answer by meaning; "": it is."""
    generation, messages = request.generation, request.messages
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        return "no_question"
    if request.tools or any(message.tool_calls or message.role == "tool" for message in messages):
        return "refused_tools"
    if any(message.parts for message in messages):
        return "refused_parts"
    if generation.choices > 1 or generation.logprobs is not None:
        return "refused_details"
    return ""


def _context(messages: Sequence[Message]) -> str:
    """What was said before, without instructions (those are in the partition)."""
    return "\n".join(
        f"{message.role}: {message.content}"
        for message in messages
        if message.role not in ("system", "developer")
    )

"""Learns, behind the requests, whether kept answers would have been or were right for other questions.

A question that was answered anew though one like it was near shows whether that one's answer would have done
(explored). Of the answers that were given by meaning a share is made again, to see if it agrees (audited).
Answers that cannot be told to agree count as different: a bound on the error may be too high, never too low.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import blake3

from stockpot.caller import Limits
from stockpot.clock import Clock
from stockpot.errors import StockpotError
from stockpot.events import Event
from stockpot.recall.answer import DamagedAnswer, Recorder, StoredAnswer, text_of, unpack
from stockpot.recall.evidence.evidence import Evidence, Observation, Source
from stockpot.recall.questions.comparison import same_answer
from stockpot.recall.semantic import Candidate, LookUp
from stockpot.recall.stores.store import AnswerStore
from stockpot.recall.vectors.embedder import Embedder
from stockpot.requests import NO_RECALL, ChatRequest
from stockpot.settings_recall import SemanticSettings

_LOG = logging.getLogger(__name__)

_WAITING_MAX = 256
"""Lessons that wait; more are left out, and counted."""
_AUDIT_BYTES_MAX = 2**20
_ALIKE_TRIED = 3
_AUDIT_SHARE_MIN = 0.01
"""One audit stands for no more than its inverse: rarer ones would swing the estimate."""
_COMPARED_CHARACTERS = 4_000
_JUDGE = (
    "You compare two answers to one question. Say SAME if whoever asked would learn the same from both, and"
    " nothing in one contradicts the other; else say DIFFERENT. Answer with that one word."
)

Ask = Callable[[str, str, str], Awaitable[str]]
"""A model's answer: model, instruction, text."""
Regenerate = Callable[[ChatRequest], AsyncGenerator[Event]]
"""Has a request made anew, on nobody's allowance. Closing it ends it."""


@dataclass(frozen=True, slots=True)
class _Lesson:
    """`fresh` is a packed answer, or the request that has one made."""

    look_up: LookUp
    candidate: Candidate
    fresh: bytes | ChatRequest
    source: Source
    writer: str
    made: bytes = b""


@dataclass(slots=True)
class LearnerCounts:
    """Since the start. `undecided` of the learnt could not be told to agree, and count as different."""

    explored: int = 0
    audited: int = 0
    audited_wrong: int = 0
    undecided: int = 0
    failed: int = 0
    dropped: int = 0


class Learner:
    """On the event loop only; one lesson at a time, in a task of its own."""

    def __init__(
        self,
        settings: SemanticSettings,
        store: AnswerStore,
        embedder: Embedder,
        evidence: Evidence,
        clock: Clock,
        *,
        ask: Ask,
        regenerate: Regenerate,
        chance: Callable[[], float] | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._embedder = embedder
        self._evidence = evidence
        self._clock = clock
        self._ask = ask
        self._regenerate = regenerate
        # Not a matter of security: who could foresee what is audited gains nothing.
        self._chance = chance or random.Random().random
        self._waiting: deque[_Lesson] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self.counts = LearnerCounts()

    def take(self, settings: SemanticSettings) -> None:
        """From now on by these."""
        self._settings = settings

    async def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """What waits is left out: an answer made for it would hold up the end. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._waiting.clear()
        self._idle.set()

    async def settled(self) -> None:
        """Until nothing waits to be learnt."""
        await self._idle.wait()

    def explored(self, look_up: LookUp, fresh: bytes, *, made: bytes, writer: str) -> None:
        """A request was answered anew with `fresh`, kept by the entry `made`, though there was a candidate.
        In shadow mode it may be one that would have been given: that is an audit."""
        candidate = look_up.hit or look_up.best
        if candidate is not None:
            source: Source = "explored" if look_up.hit is None else "audited"
            self._put(_Lesson(look_up, candidate, fresh, source, writer, made))

    def audit(self, request: ChatRequest, look_up: LookUp, hit: Candidate) -> None:
        """`hit`'s answer was given to `request`; now and then it is made again."""
        if self._chance() >= self._settings.audit_share:
            return
        caller = request.generation.caller
        generation = replace(
            request.generation,
            request_id=f"audit-{uuid.uuid4().hex}",
            client_request_id="",
            caller=replace(caller, limits=Limits(), team_limits=Limits()),
            task="recall-audit",
            priority="low",
            stream=False,
            deadline_s=None,
            recall=NO_RECALL,
        )
        again = replace(request, generation=generation)
        self._put(_Lesson(look_up, hit, again, "audited", generation.caller.key_id))

    def _put(self, lesson: _Lesson) -> None:
        if self._task is None or len(self._waiting) >= _WAITING_MAX:
            self.counts.dropped += 1
            return
        self._waiting.append(lesson)
        self._idle.clear()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            while self._waiting:
                lesson = self._waiting.popleft()
                try:
                    await self._learn(lesson)
                except (StockpotError, DamagedAnswer, TimeoutError) as error:
                    self.counts.failed += 1
                    _LOG.warning("recall: an answer could not be compared, nothing is learnt (%s)", error)
                except Exception:  # noqa: BLE001  what one lesson does must not end the others
                    self.counts.failed += 1
                    _LOG.exception("recall: learning from an answer failed")
            self._idle.set()
            await self._wake.wait()

    async def _learn(self, lesson: _Lesson) -> None:
        candidate, asked = lesson.candidate, lesson.look_up.asked
        kept = await self._text_of(candidate)
        if kept is None or asked is None:
            return
        fresh = lesson.fresh
        answer = await self._made(fresh) if isinstance(fresh, ChatRequest) else unpack(fresh)
        if answer is None:
            self.counts.failed += 1
            return
        question, text = asked.question.text, text_of(answer)
        same = await self._is_same(question, kept, text)
        alike = b""
        if same is None:
            self.counts.undecided += 1
        if lesson.source == "audited":
            self.counts.audited += 1
            self.counts.audited_wrong += not same
        else:
            self.counts.explored += 1
        if not same and lesson.made:
            alike = await self._alike(lesson, question, text)
        self.learn(
            candidate, question, lesson.source, lesson.writer, same=bool(same), made=lesson.made, alike=alike
        )
        await self._evidence.refit_if_due(candidate.scope)

    async def _alike(self, lesson: _Lesson, question: str, text: str) -> bytes:
        """Another entry near whose answer agrees."""
        others = [each for each in lesson.look_up.refused if each.key != lesson.candidate.key]
        for other in others[:_ALIKE_TRIED]:
            kept = None if other.likeness.conflict else await self._text_of(other)
            if kept is not None and await self._is_same(question, kept, text):
                return other.key
        return b""

    async def _text_of(self, candidate: Candidate) -> str | None:
        entry = await self._store.get(candidate.key)
        return None if entry is None or entry.scope != candidate.scope else text_of(unpack(entry.answer))

    def learn(
        self,
        candidate: Candidate,
        question: str,
        source: Source,
        writer: str,
        *,
        same: bool,
        made: bytes = b"",
        alike: bytes = b"",
    ) -> None:
        """One piece of evidence, kept."""
        # In shadow mode all are compared that would be given; else those audited stand for the others.
        is_sample = source == "audited" and self._settings.mode == "on"
        observation = Observation(
            at=self._clock.wall(),
            scope=candidate.scope,
            entry=candidate.key,
            question=blake3.blake3(question.encode("utf-8", "surrogatepass")).digest(8),
            likeness=candidate.likeness,
            same=same,
            source=source,
            writer=writer,
            support=candidate.judgement.support,
            made=made,
            alike=alike,
            stands_for=1 / max(self._settings.audit_share, _AUDIT_SHARE_MIN) if is_sample else 1.0,
        )
        self._evidence.learn(observation)
        self._store.learn(observation)

    async def _made(self, request: ChatRequest) -> StoredAnswer | None:
        recorder = Recorder(_AUDIT_BYTES_MAX)
        async with aclosing(self._regenerate(request)) as events:
            async for event in events:
                recorder.saw(event)
        answer = recorder.answer()
        return None if answer is None else unpack(answer)

    async def _is_same(self, question: str, kept: str, fresh: str) -> bool | None:
        """None: it cannot be told."""
        if kept == fresh:
            return True
        similarity: float | None = None
        if self._embedder.fits(kept) and self._embedder.fits(fresh):
            vectors = await self._embedder.embed([kept, fresh])
            similarity = float(vectors[0] @ vectors[1])
        same = same_answer(kept, fresh, similarity)
        if self._settings.judge is None or same:
            return same
        text = (
            f"Question:\n{question[:_COMPARED_CHARACTERS]}\n\n"
            f"First answer:\n{kept[:_COMPARED_CHARACTERS]}\n\n"
            f"Second answer:\n{fresh[:_COMPARED_CHARACTERS]}"
        )
        said = (await self._ask(self._settings.judge, _JUDGE, text)).strip().upper()
        if said.startswith("SAME"):
            return True
        return False if said.startswith("DIFFERENT") else None

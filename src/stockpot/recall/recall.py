"""Step 5 of the path: gives an answer that is kept, or has one made and keeps it.

    same request? --> replay          means the same, and the evidence allows? --> replay, some are audited
          `-- no ------------------------------`-- no --> make it, keep it, learn from it

It stands inside a single flight, so that of identical requests one looks and one is made: what is made is
kept before its last event is passed on, and whoever asks after that finds it. Whatever fails here (a store
out of reach, an embedder that is slow) is a miss, with its reason, and never an error of the request.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from stockpot.clock import Clock
from stockpot.errors import NotCached, StockpotError
from stockpot.events import Completed, Event, Queued, Recalled, RecallOutcome
from stockpot.recall.admissible import Scopes, exact_refusal, scopes_of
from stockpot.recall.answer import DamagedAnswer, Recorder, StoredAnswer, replay, unpack
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.exact_key import exact_key
from stockpot.recall.learning import Learner
from stockpot.recall.semantic import LookUp, Semantic
from stockpot.recall.stores.store import AnswerStore
from stockpot.records import Attempt
from stockpot.requests import NO_RECALL, ChatRequest, GenerationRequest, RecallControl
from stockpot.routing.plan import RoutePlan
from stockpot.settings_recall import RecallSettings

_LOG = logging.getLogger(__name__)

_BREATHE_EVERY = 64
"""Events of a replay between two turns of the event loop."""
_GIVEN_REMEMBERED = 10_000
"""Answers given for which feedback may name the request instead of the entry."""

KEPT = "kept"
"""Whose answer it is, where no backend was asked."""


class Way(Protocol):
    """What recall needs of a request's journey (`gateway.journey.Journey`)."""

    arrived_s: float
    model: str
    backend: str
    recalled: Recalled | None
    attempts: list[Attempt]


Make = Callable[..., AsyncGenerator[Event]]
"""Has the request made: given the journey, its events."""


@dataclass(frozen=True, slots=True)
class Given:
    """An answer that was given: what feedback about the request is about. Another may be kept under its key
    by now: `created_at` tells them apart."""

    scope: str
    key: bytes
    created_at: float
    recalled: Recalled
    look_up: LookUp | None


@dataclass(frozen=True, slots=True)
class _Case:
    """One request that is looked up."""

    plan: RoutePlan
    request: GenerationRequest
    journey: Way
    version: str
    scopes: Scopes

    @property
    def control(self) -> RecallControl:
        return self.request.generation.recall


@dataclass(frozen=True, slots=True)
class _Found:
    """An entry that may be given, with its answer; else why there is none."""

    reason: str
    entry: Entry | None = None
    answer: StoredAnswer | None = None


@dataclass(slots=True)
class Counts:
    """Since the start. Reasons are words of this package, and so few."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    reasons: Counter[str] = field(default_factory=Counter[str])
    not_kept: Counter[str] = field(default_factory=Counter[str])
    would: int = 0
    kept: int = 0
    feedback_right: int = 0
    feedback_wrong: int = 0
    saved_prompt_tokens: int = 0
    saved_completion_tokens: int = 0
    saved_nanousd: int = 0
    saved_s: float = 0.0


class Recall:
    """On the event loop only. `version` names the version of a model on its backends, `price` says what
    attempts cost, in billionths of a dollar. The parts it is given are its own from then on."""

    def __init__(
        self,
        settings: RecallSettings,
        store: AnswerStore,
        clock: Clock,
        *,
        version: Callable[[str], str],
        price: Callable[[Sequence[Attempt]], int],
        semantic: Semantic | None = None,
        learner: Learner | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.semantic = semantic
        self.learner = learner
        self.counts = Counts()
        self._clock = clock
        self._version = version
        self._price = price
        self._given: OrderedDict[str, Given] = OrderedDict()
        self._rebuilding: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the parts. The index is filled meanwhile: what it does not have yet is a miss. Raises
        StockpotError where the operator must act."""
        await self.store.start()
        if self.semantic is not None:
            await self.semantic.start()
            self._rebuilding = asyncio.create_task(self._rebuild(self.semantic))
        if self.learner is not None:
            await self.learner.start()

    async def close(self) -> None:
        """Write what waits to be written, let go. Idempotent."""
        if self._rebuilding is not None:
            self._rebuilding.cancel()
            await asyncio.wait({self._rebuilding})
        if self.learner is not None:
            await self.learner.close()
        if self.semantic is not None:
            await self.semantic.close()
        await self.store.close()

    async def rebuilt(self) -> None:
        """Until the index has what the store has."""
        if self._rebuilding is not None:
            await asyncio.wait({self._rebuilding})

    async def _rebuild(self, semantic: Semantic) -> None:
        try:
            await semantic.rebuild()
        except StockpotError as error:
            _LOG.warning("recall: questions kept before are not found by meaning: %s", error)

    @property
    def shares_sampled(self) -> bool:
        """Whether identical requests get one answer though it is drawn at random."""
        return self.settings.sampled

    def sharing(self, request: GenerationRequest) -> bytes:
        """Equal for requests that may be given, and leave, the same kept answers."""
        scopes = scopes_of(request, self.settings)
        return repr((scopes.write, scopes.read)).encode("utf-8", "surrogatepass")

    def take(self, settings: RecallSettings) -> None:
        """From now on by these, as far as the parts that were opened allow."""
        self.settings = settings
        if self.semantic is not None:
            self.semantic.take(settings.semantic)
        if self.learner is not None:
            self.learner.take(settings.semantic)

    async def answer(
        self, plan: RoutePlan, request: GenerationRequest, make: Make, journey: Way
    ) -> AsyncGenerator[Event]:
        """The events of the answer. Raises what `make` raises, and NotCached where only a kept answer was
        wanted and there is none."""
        if request.generation.recall is NO_RECALL:
            async with aclosing(make(journey)) as made:
                async for event in made:
                    yield event
            return
        version = self._version(plan.steps[0].model)
        if plan.cascade is not None:
            version = f"{version}|{self._version(plan.cascade.to)}"
        scopes = scopes_of(request, self.settings)
        case = _Case(plan, request, journey, version, scopes)
        async with aclosing(self._answered(case, make)) as events:
            async for event in events:
                yield event

    async def _answered(self, case: _Case, make: Make) -> AsyncGenerator[Event]:
        refused = exact_refusal(case.request, self.settings)
        if not (case.control.read or case.control.store):
            refused = "no_cache"
        key = None if refused else exact_key(case.scopes.write, case.plan, case.version, case.request)
        look_up: LookUp | None = None
        if key is None:
            self._tell(case.journey, Recalled("bypass", refused or "not_canonical"))
        else:
            found = await self._by_key(case, key)
            told = Recalled("exact", "same_request")
            if found.entry is None:
                look_up = await self._looked_up(case)
                found, told = await self._by_meaning(case, look_up, found)
            if found.entry is not None and told.is_hit:
                for event in self._replayed(case, found, told, look_up):
                    if event is None:
                        await asyncio.sleep(0)
                    else:
                        yield event
                return
            self._tell(case.journey, told)
        async with aclosing(self._made(case, make, key, look_up)) as events:
            async for event in events:
                yield event

    async def _by_key(self, case: _Case, key: bytes) -> _Found:
        """What is kept of the same request."""
        if not case.control.read:
            return _Found("no_cache")
        if not self.settings.exact:
            return _Found("exact_off")
        found = _Found("not_kept")
        for scope in case.scopes.read:
            same: bytes | None = key
            if scope != case.scopes.write:
                same = exact_key(scope, case.plan, case.version, case.request)
            entry = None if same is None else await self.store.get(same)
            if entry is not None and entry.scope == scope:
                found = self._usable(entry, case.control.max_age_s)
                if found.entry is not None:
                    break
        return found

    async def _looked_up(self, case: _Case) -> LookUp | None:
        semantic = self.semantic
        if semantic is None or not semantic.is_on or not isinstance(case.request, ChatRequest):
            return None
        return await semantic.look_up(case.plan, case.version, case.request, case.scopes)

    async def _by_meaning(
        self, case: _Case, look_up: LookUp | None, found: _Found
    ) -> tuple[_Found, Recalled]:
        """What is kept that means the same, and what to tell of it. In shadow mode it is told as a miss."""
        semantic, control = self.semantic, case.control
        outcome: RecallOutcome = "miss" if control.read else "bypass"
        if semantic is None or look_up is None:
            return found, Recalled(outcome, found.reason)
        if not (control.read and control.semantic):
            return found, look_up.told(outcome, reason=found.reason)
        hit = look_up.hit
        if hit is None:
            return found, look_up.told(outcome)
        entry = await self.store.get(hit.key)
        found = _Found("evicted")
        if entry is None or entry.scope not in case.scopes.read:
            await semantic.forget(look_up.partition_of(hit), hit.key)
        else:
            found = self._usable(entry, control.max_age_s)
        if entry is None or found.entry is None:
            return found, look_up.told(outcome, reason=found.reason)
        semantic.evidence.served(hit.scope, hit.judgement)
        if semantic.serves:
            if self.learner is not None and isinstance(case.request, ChatRequest):
                self.learner.audit(case.request, look_up, hit)
            return found, look_up.told("semantic")
        self.counts.would += 1
        return found, look_up.told(outcome, reason="shadow", would=entry.id)

    async def _made(
        self, case: _Case, make: Make, key: bytes | None, look_up: LookUp | None
    ) -> AsyncGenerator[Event]:
        """The answer anew. It is kept before `Completed` goes out."""
        control, journey = case.control, case.journey
        if control.only:
            why = "" if journey.recalled is None else f" ({journey.recalled.reason})"
            raise NotCached(
                f"No answer to this request is kept{why}, and 'Cache-Control: only-if-cached' forbids making"
                " one; send it without."
            )
        recorder = None
        if key is not None and control.store:
            recorder = Recorder(self.settings.answer_bytes_max, case.request.generation.choices)
        told = False
        async with aclosing(make(journey)) as events:
            async for event in events:
                if not told and type(event) is Queued:
                    told, event = True, replace(event, recalled=journey.recalled)
                if recorder is not None and key is not None:
                    recorder.saw(event)
                    if type(event) is Completed:
                        self._keep(case, key, recorder, event, look_up)
                yield event

    def _keep(
        self, case: _Case, key: bytes, recorder: Recorder, completed: Completed, look_up: LookUp | None
    ) -> None:
        """Put the answer into the store, where it is one to keep."""
        journey, generation, plan = case.journey, case.request.generation, case.plan
        answer = recorder.answer()
        if answer is None:
            self.counts.not_kept[recorder.why_not] += 1
            return
        if journey.model not in (plan.steps[0].model, "") and plan.cascade is None:
            # Another model stood in; the one that was asked for would have answered otherwise.
            self.counts.not_kept["fallback"] += 1
            return
        now = self._clock.wall()
        entry = Entry(
            key=key,
            scope=case.scopes.write,
            tenant=generation.tenant,
            writer=generation.caller.key_id,
            model=journey.model or plan.steps[0].model,
            created_at=now,
            expires_at=now + self.settings.ttl_s,
            answer=answer,
            prompt_tokens=completed.usage.prompt_tokens,
            completion_tokens=completed.usage.completion_tokens,
            cost_nanousd=self._price(journey.attempts),
            duration_s=max(self._clock.monotonic() - journey.arrived_s, 0.0),
            tags=generation.recall.tags,
        )
        if look_up is not None and self.semantic is not None:
            entry = self.semantic.indexed(entry, look_up)
        self.store.put(entry)
        self.counts.kept += 1
        if journey.recalled is not None:
            journey.recalled = replace(journey.recalled, entry=entry.id)
        if look_up is not None and self.learner is not None:
            self.learner.explored(look_up, answer, made=key, writer=generation.caller.key_id)

    def _usable(self, entry: Entry, max_age_s: float | None) -> _Found:
        now = self._clock.wall()
        if entry.expires_at <= now:
            return _Found("expired")
        if max_age_s is not None and now - entry.created_at > max_age_s:
            return _Found("too_old")
        try:
            return _Found("", entry, unpack(entry.answer))
        except DamagedAnswer as error:
            _LOG.warning("recall: the kept answer %s is damaged, and left out (%s)", entry.id, error)
            return _Found("damaged")

    def _replayed(
        self, case: _Case, found: _Found, told: Recalled, look_up: LookUp | None
    ) -> Iterator[Event | None]:
        """The events; None now and then, where the event loop should have its turn."""
        entry, journey = found.entry, case.journey
        assert entry is not None
        assert found.answer is not None
        recalled = replace(
            told,
            entry=entry.id,
            age_s=max(self._clock.wall() - entry.created_at, 0.0),
            saved_prompt_tokens=entry.prompt_tokens,
            saved_completion_tokens=entry.completion_tokens,
            saved_nanousd=entry.cost_nanousd,
            saved_s=max(entry.duration_s - (self._clock.monotonic() - journey.arrived_s), 0.0),
        )
        journey.model, journey.backend = entry.model, KEPT
        self._tell(journey, recalled)
        self._given[case.request.generation.request_id] = Given(
            entry.scope, entry.key, entry.created_at, recalled, look_up
        )
        while len(self._given) > _GIVEN_REMEMBERED:
            self._given.popitem(last=False)
        for count, event in enumerate(replay(found.answer, case.request), 1):
            if count % _BREATHE_EVERY == 0:
                yield None
            yield replace(event, recalled=recalled) if type(event) is Queued else event

    def _tell(self, journey: Way, recalled: Recalled) -> None:
        journey.recalled = recalled
        counts = self.counts
        counts.outcomes[recalled.outcome] += 1
        if recalled.reason and not recalled.is_hit:
            counts.reasons[recalled.reason] += 1
        counts.saved_prompt_tokens += recalled.saved_prompt_tokens
        counts.saved_completion_tokens += recalled.saved_completion_tokens
        counts.saved_nanousd += recalled.saved_nanousd
        counts.saved_s += recalled.saved_s

    def given(self, request_id: str) -> Given | None:
        """The answer that was given to a request lately."""
        return self._given.get(request_id)

    async def invalidate(self, selector: Selector) -> Sequence[Entry]:
        """Take entries out, also of the index. Raises StockpotError where it could not be done."""
        removed = await self.store.remove(selector)
        if self.semantic is not None:
            for entry in removed:
                await self.semantic.forget(entry.partition, entry.key)
            if selector.writer is not None:
                # Its evidence has left the store with its entries.
                await self.semantic.relearn()
        return removed

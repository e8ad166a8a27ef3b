"""Which backend of a model is asked: in turn, the least loaded, by session, or where the prefix is cached.

`prefix`, the default, sends a request where its prompt costs least. For each candidate

    score = cached tokens expected - load_weight_tokens x requests there beyond the least loaded's

where a conversation that goes on is not charged for the first `SLACK` of these requests, and one whose home
is yet to be chosen (nobody has answered in it, or most of its prompt is cached nowhere) is also charged for

    tokens placed there of late beyond those of the least filled / `SPREAD`

The highest score wins; equal ones are ranked by rendezvous hashing of the session, or of the prompt's first
words. What follows from it:

- A conversation goes on where it was, since its own turns are cached nowhere else, until its home is busier
  by as many requests as the history is worth; where it went instead it is cached from then on too.
- A system prompt all share draws new conversations to its holder only until that one has taken `SPREAD` times
  the prompt's tokens more than the others. Then another computes it once, and from there on it counts for
  nobody: new ones go to the least loaded, and among equals to the least filled.
- A crowd with the same long beginning goes to one backend, up to the load at which computing it once more is
  cheaper.

Cached tokens are those the backend has told of in its KV events; or, where it tells nothing, those of
prompts sent there within ten minutes (`text_index`). What was sent a moment ago and is not told of yet counts
as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stockpot.clock import Clock
from stockpot.requests import AnyRequest, ChatRequest, EmbeddingRequest, GenerationRequest
from stockpot.routing.kv_event_follower import FollowerStats, KvEventFollower
from stockpot.routing.member import Member
from stockpot.routing.plan import Candidate
from stockpot.routing.prefix_index import PrefixIndex, TokenChain
from stockpot.routing.prompt_tokens import PromptTokens, PromptTokensStats
from stockpot.routing.rendezvous import ranked
from stockpot.routing.text_index import TextChain, TextIndex, chain_of
from stockpot.settings_gateway import Policy, RoutingSettings

SPREAD = 16
SLACK = 2
"""A difference of so many requests is chance, and gone before the next turn. To move for it would have a
history computed again, and the turns after it pulled to and fro."""
IDLE_S = 600.0
"""For how long a backend without events is taken to keep a prompt."""
UNTOLD_S = 10.0
"""For how long a prompt counts as cached before the backend's events have to say so."""
BOUND_RATIO = 1.25
BOUND_SPARE = 2
"""The favourite of a session is passed over when it has more requests than this ratio of the mean, and these
(consistent hashing with bounded loads: Mirrokni, Thorup and Zadimoghaddam 2018)."""
MODELS_MAX = 1024
RECENT_MAX = 64
BEGINNING = 256


@dataclass(frozen=True, slots=True)
class MemberKnowledge:
    """What is known of one backend's cache; `events` None where it publishes none."""

    links: int
    tokens: int
    events: FollowerStats | None


@dataclass(frozen=True, slots=True)
class PlacementStats:
    """A snapshot. `by_events` and `by_estimate` count the requests placed with one or the other."""

    members: Mapping[str, MemberKnowledge]
    prompts: PromptTokensStats
    by_events: int
    by_estimate: int


class _Knowledge:
    """Of one backend: what it was sent, and what it tells."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.source = _source(member)
        self.sent = TextIndex(0, idle_s=IDLE_S)
        address, replay = self.source
        self.follower = (
            KvEventFollower(member.name, address, replay, PrefixIndex(0)) if address is not None else None
        )

    @property
    def told(self) -> bool:
        return self.follower is not None and self.follower.live

    def limit(self, blocks_max: int) -> None:
        """At most so many blocks and links. What was sent needs a share only: a link is some 256 tokens."""
        if self.follower is None:
            self.sent.limit(blocks_max)
        else:
            self.sent.limit(blocks_max // 8)
            self.follower.index.limit(blocks_max - blocks_max // 8)

    def cached(self, model: str, text: TextChain, tokens: TokenChain | None, now_s: float) -> int:
        """Tokens of the prompt that are expected in the backend's cache."""
        if tokens is None or self.follower is None or not self.follower.live:
            return self.sent.match(text, now_s)
        there = self.member.settings.models.get(model, model) if self.member.settings else model
        return max(self.follower.index.match(tokens, there), self.sent.match(text, now_s, within_s=UNTOLD_S))


class PrefixPlacement:
    """`plan.Placement` for all policies. On one event loop; see the module for the rules."""

    def __init__(self, members: Sequence[Member], routing: RoutingSettings, clock: Clock) -> None:
        self._routing = routing
        self._clock = clock
        self._known: dict[str, _Knowledge] = {}
        self._prompts = PromptTokens(clock)
        self._turns: dict[str, int] = {}
        self._recent: dict[tuple[str, str], tuple[GenerationRequest, TextChain]] = {}
        self._started = False
        self._by_events = self._by_estimate = 0
        self._take(members)

    async def start(self) -> None:
        """Begin to follow the events of backends that have some."""
        self._started = True
        for knowledge in self._known.values():
            if knowledge.follower is not None:
                knowledge.follower.start()

    async def stop(self) -> None:
        """Leave off. Idempotent."""
        self._started = False
        for knowledge in self._known.values():
            if knowledge.follower is not None:
                await knowledge.follower.stop()
        await self._prompts.stop()

    async def reconfigure(self, members: Sequence[Member], routing: RoutingSettings | None = None) -> None:
        """Others are there now. What is known of those that stay is kept."""
        self._routing = routing or self._routing
        gone = self._take(members)
        for knowledge in gone:
            if knowledge.follower is not None:
                await knowledge.follower.stop()
        if self._started:
            await self.start()

    async def order(
        self, model: str, request: AnyRequest, candidates: Sequence[Candidate], policy: Policy
    ) -> Sequence[str]:
        """See `plan.Placement`."""
        if len(candidates) < 2:
            return [candidate.name for candidate in candidates]
        if policy == "round-robin":
            return [candidate.name for candidate in self._rotated(model, candidates)]
        if policy == "session" and (key := _session(request)):
            return _by_session(key, candidates)
        if policy == "prefix" and not isinstance(request, EmbeddingRequest):
            return await self._by_prefix(model, request, candidates)
        return [candidate.name for candidate in sorted(self._rotated(model, candidates), key=_load)]

    def placed(self, model: str, request: AnyRequest, name: str) -> None:
        """See `plan.Placement`."""
        if isinstance(request, EmbeddingRequest) or len(self._known) < 2:
            return
        if (knowledge := self._known.get(name)) is not None:
            knowledge.sent.placed(self._text(model, request), self._clock.monotonic())

    def stats(self) -> PlacementStats:
        members = {
            name: MemberKnowledge(
                len(knowledge.sent),
                knowledge.sent.tokens,
                knowledge.follower.stats() if knowledge.follower else None,
            )
            for name, knowledge in self._known.items()
        }
        return PlacementStats(members, self._prompts.stats(), self._by_events, self._by_estimate)

    async def _by_prefix(
        self, model: str, request: GenerationRequest, candidates: Sequence[Candidate]
    ) -> list[str]:
        text = self._text(model, request)
        tokens = await self._tokens(model, request, text, candidates)
        now_s = self._clock.monotonic()
        least = min(map(_load, candidates))
        cached = {one.name: self._cached(one.name, model, text, tokens, now_s) for one in candidates}
        settling = _opens(request) or 2 * max(cached.values()) < text.tokens
        placed = {name: self._known[name].sent.tokens for name in cached if name in self._known}
        least_placed = min(placed.values(), default=0)

        def score(one: Candidate) -> float:
            busier = _load(one) - least
            if settling:
                fuller = placed.get(one.name, least_placed) - least_placed
                return cached[one.name] - self._routing.load_weight_tokens * busier - fuller / SPREAD
            return cached[one.name] - self._routing.load_weight_tokens * max(0, busier - SLACK)

        ranking = ranked(_session(request) or _beginning(request), cached)
        rank = {name: at for at, name in enumerate(ranking)}
        if tokens is None:
            self._by_estimate += 1
        else:
            self._by_events += 1
        return [one.name for one in sorted(candidates, key=lambda one: (-score(one), rank[one.name]))]

    async def _tokens(
        self, model: str, request: GenerationRequest, text: TextChain, candidates: Sequence[Candidate]
    ) -> TokenChain | None:
        """The prompt's tokens, where a candidate has told something to match them against."""
        telling = [one for one in candidates if (of := self._known.get(one.name)) is not None and of.told]
        if not telling:
            return None
        asked = min(telling, key=_load)
        return await self._prompts.chain(text, request, self._known[asked.name].member, model)

    def _cached(self, name: str, model: str, text: TextChain, tokens: TokenChain | None, now_s: float) -> int:
        knowledge = self._known.get(name)
        return knowledge.cached(model, text, tokens, now_s) if knowledge is not None else 0

    def _rotated(self, model: str, candidates: Sequence[Candidate]) -> list[Candidate]:
        """From one further on each time."""
        if len(self._turns) >= MODELS_MAX and model not in self._turns:
            self._turns.clear()
        turn = self._turns.get(model, 0)
        self._turns[model] = turn + 1
        at = turn % len(candidates)
        return [*candidates[at:], *candidates[:at]]

    def _text(self, model: str, request: GenerationRequest) -> TextChain:
        """The chain of a request; it is wanted twice, here and when it is placed."""
        key = (request.generation.request_id, model)
        recent = self._recent.pop(key, None)
        if recent is not None and recent[0] is request:
            return recent[1]
        text = chain_of(model, request)
        if len(self._recent) >= RECENT_MAX:
            del self._recent[next(iter(self._recent))]
        self._recent[key] = (request, text)
        return text

    def _take(self, members: Sequence[Member]) -> list[_Knowledge]:
        """Know these from now on; those that are known no more are returned."""
        before, self._known = self._known, {}
        for member in members:
            kept = before.get(member.name)
            if kept is not None and kept.source == _source(member) and _same_server(kept.member, member):
                kept.member = member
                self._known[member.name] = kept
                del before[member.name]
            else:
                self._known[member.name] = _Knowledge(member)
        self._prompts.forget(list(before))
        for knowledge in self._known.values():
            knowledge.limit(self._routing.index_blocks_max // len(self._known))
        return list(before.values())


def open_placement(members: Sequence[Member], routing: RoutingSettings, clock: Clock) -> PrefixPlacement:
    """The placement for these backends; `start` it on the event loop."""
    return PrefixPlacement(members, routing, clock)


def _source(member: Member) -> tuple[str | None, str | None]:
    """Where its events come from."""
    settings = member.settings
    return (settings.kv_events, settings.kv_replay) if settings is not None else (None, None)


def _same_server(before: Member, now: Member) -> bool:
    return (before.settings and before.settings.url) == (now.settings and now.settings.url)


def _load(candidate: Candidate) -> int:
    """Requests there. What waits there counts once more if it is ours: it is to be avoided all the more."""
    return candidate.in_flight + (candidate.waiting or 0)


def _session(request: AnyRequest) -> str:
    """What stands for the request's session; "" where it has none."""
    generation = request.generation
    return f"session\0{generation.tenant}\0{generation.session}" if generation.session else ""


def _beginning(request: GenerationRequest) -> str:
    """What stands for a prompt without a session, the same in every process."""
    if isinstance(request, ChatRequest):
        content: str | Sequence[int] = request.messages[0].content if request.messages else ""
    else:
        content = request.prompt
    return f"beginning\0{content[:BEGINNING]!r}"


def _by_session(key: str, candidates: Sequence[Candidate]) -> list[str]:
    loads = {one.name: _load(one) for one in candidates}
    bound = math.ceil(BOUND_RATIO * sum(loads.values()) / len(loads)) + BOUND_SPARE
    order = ranked(key, loads)
    return [name for name in order if loads[name] <= bound] + [name for name in order if loads[name] > bound]


def _opens(request: GenerationRequest) -> bool:
    """Whether nobody has answered in this conversation yet; of a plain prompt that cannot be told."""
    return isinstance(request, ChatRequest) and not any(one.role == "assistant" for one in request.messages)

"""Bringing blocks from the tiers behind RAM before a request is admitted, on threads that may wait.

The engine's thread asks when a request arrives and goes on with others. A prefetch thread locates what each
tier has, compares loading with computing by what was measured, reads and verifies. The engine takes what has
come when it is done, or when the time to give up has passed: a wait is never longer than computing would
have been.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakSet

from stockpot.clock import Clock
from stockpot.events import CacheTier
from stockpot.kv.block import (
    TOKEN_BYTES,
    BlockId,
    Scope,
    TokenKey,
    aliases,
    block_id,
    chain,
    common_tokens,
)
from stockpot.kv.departures import Departed, Departures
from stockpot.kv.invalidation import Invalidation, Invalidations
from stockpot.kv.meters import PrefillMeter, TierMeter
from stockpot.kv.tier import REFUSED_BY_CHECK, Block, BlockHead, Location, Refusal, Refused, Tier, Wanted

_log = logging.getLogger(__name__)

LOCATE_PATIENCE_S = 0.06
"""How long a request waits to learn what the tiers have, at most; their own timeouts are shorter."""
STALL_PATIENCE_S = 0.05
"""On top of twice the estimate, before a load that stalls is given up."""
FEWEST_TOKENS = 16
"""Fewer tokens than this are computed without asking anybody: that takes less than an import."""

Decision = Literal["nothing", "load", "recompute", "failed", "abandoned"]


@dataclass(slots=True)
class TierOutcome:
    """What one tier was asked for one request, and what was decided. It had blocks up to position `reach`, of
    `located_tokens` in all. `load_s` and `compute_s` are the
    estimates the decision was made by; `took_s` what loading took; `cause` and `detail` say why blocks did
    not come."""

    tier: str
    decision: Decision = "nothing"
    reach: int = 0
    located_tokens: int = 0
    located_bytes: int = 0
    loaded_tokens: int = 0
    locate_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0
    took_s: float = 0.0
    cause: Refusal | None = None
    detail: str = ""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Fetch:
    """One prompt's question to the tiers behind RAM, of which RAM has the first `tokens` tokens.

    The prefetch thread fills `blocks` and `outcomes` and sets `done` last. `give_up_s` (monotonic) may move
    while it works. The engine sets `abandoned`."""

    request: str
    scope: Scope
    key: TokenKey
    tokens: int
    first: BlockId
    give_up_s: float
    blocks: list[tuple[CacheTier, Block]] = field(default_factory=list[tuple[CacheTier, Block]])
    outcomes: list[TierOutcome] = field(default_factory=list[TierOutcome])
    done: bool = False
    abandoned: bool = False


@dataclass(frozen=True, slots=True)
class TierSlot:
    """A tier behind RAM and what was measured of it."""

    tier: Tier
    meter: TierMeter


@dataclass(frozen=True, slots=True)
class ReadReport:
    """One tier was read for one request: what it gave, how long that took, and what did not come."""

    tier: str
    blocks: int
    size_bytes: int
    locate_s: float
    read_s: float
    refused: Refusal | None


class Prefetcher:
    """Answers fetches on a few threads. `on_ready` is called on them when one is done; `on_fetched(tier,
    blocks)` for blocks that a tier further behind gave, so that nearer ones may keep them."""

    def __init__(
        self,
        slots: Sequence[TierSlot],
        *,
        block_tokens: int,
        prefill: PrefillMeter,
        invalidations: Invalidations,
        departures: Departures,
        clock: Clock,
        on_fetched: Callable[[str, Sequence[Block]], None] = lambda _tier, _blocks: None,
        on_read: Callable[[ReadReport], None] = lambda _: None,
        threads: int = 2,
        queue_limit: int = 64,
        held_limit_bytes: int = 512 * 2**20,
    ) -> None:
        """`held_limit_bytes` bounds what was read for requests that have not taken it yet."""
        self._slots = tuple(slots)
        self._block_tokens = block_tokens
        self._prefill = prefill
        self._invalidations = invalidations
        self._departures = departures
        self._clock = clock
        self._on_fetched = on_fetched
        self._on_read = on_read
        self._on_ready: Callable[[], None] = lambda: None
        self._jobs: queue.Queue[Fetch | None] = queue.Queue(queue_limit)
        self._held_limit_bytes = held_limit_bytes
        self._alive: WeakSet[Fetch] = WeakSet()
        self._in_flight: dict[tuple[str, BlockId], Fetch] = {}
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"stockpot-prefetch-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def on_ready(self, wake: Callable[[], None]) -> None:
        """Call `wake` whenever a fetch is done."""
        self._on_ready = wake

    def fetch(
        self, request: str, scope: Scope, key: TokenKey, *, tokens: int, first: BlockId
    ) -> Fetch | None:
        """Ask for what follows the first `tokens` tokens of `key`; `first` is the first block of it that RAM
        lacks. A question that is already asked is shared. None where it is not worth asking, or too much is
        asked already. Does not wait."""
        if len(key) // TOKEN_BYTES - tokens < FEWEST_TOKENS:
            return None
        with self._lock:
            # Of one tenant: how long another's private blocks take would tell of them.
            known = self._in_flight.get((scope.tenant, first))
            if known is not None:
                return known
            job = Fetch(request, scope, key, tokens, first, self._clock.monotonic() + LOCATE_PATIENCE_S)
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                return None
            self._in_flight[scope.tenant, first] = job
            self._alive.add(job)
            return job

    @property
    def held_bytes(self) -> int:
        """What was read for requests that have not taken it yet."""
        with self._lock:
            alive = list(self._alive)
        return sum(len(block.data) for fetch in alive for _, block in list(fetch.blocks))

    def close(self) -> None:
        """End the threads; waits for what they are at, which their tiers bound."""
        with suppress(queue.Empty):  # what nobody began is not answered any more
            while (job := self._jobs.get_nowait()) is not None:
                job.done = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(5)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not job.abandoned:
                    self._answer(job)
            except Exception:  # noqa: BLE001  a tier broke its contract: the request computes instead
                _log.exception("prefetching for request %s failed; its prompt is computed", job.request)
            finally:
                with self._lock:
                    self._in_flight.pop((job.scope.tenant, job.first), None)
                job.done = True
                self._on_ready()

    def _answer(self, job: Fetch) -> None:
        places = places_of(job.scope, job.key, self._block_tokens, from_tokens=job.tokens)
        have = job.tokens
        for slot in self._slots:
            if not places or len(job.key) // TOKEN_BYTES - have < FEWEST_TOKENS or job.abandoned:
                return
            outcome = TierOutcome(slot.tier.name)
            job.outcomes.append(outcome)
            have = self._ask(job, slot, outcome, places, have)
            places = [place for place in places if place.start + place.tokens > have]

    def _ask(
        self, job: Fetch, slot: TierSlot, outcome: TierOutcome, places: Sequence[Wanted], have: int
    ) -> int:
        """Ask one tier; up to which token RAM and what has come reach then."""
        tier, clock = slot.tier, self._clock
        misses_before = dict(tier.stats().misses)
        began_s = clock.monotonic()
        found = tier.locate(places)
        outcome.locate_s = clock.monotonic() - began_s
        reach = max((each.start + each.tokens for each in found), default=have)
        if reach - have < FEWEST_TOKENS:
            self._explain_silence(tier, misses_before, outcome)
            self._on_read(ReadReport(tier.name, 0, 0, outcome.locate_s, 0.0, outcome.cause))
            return have
        slot.meter.located(outcome.locate_s)
        outcome.reach, outcome.located_tokens = reach, reach - have
        outcome.located_bytes = sum(each.size_bytes for each in found)
        outcome.load_s = slot.meter.load_s(outcome.located_bytes)
        outcome.compute_s = self._prefill.prefill_s(outcome.located_tokens)
        if self.held_bytes + outcome.located_bytes > self._held_limit_bytes:
            outcome.decision, outcome.detail = "abandoned", "too much is being loaded for waiting requests"
            return have
        if outcome.load_s >= outcome.compute_s:
            outcome.decision = "recompute"
            self._on_read(ReadReport(tier.name, 0, 0, outcome.locate_s, 0.0, None))
            return have
        job.give_up_s = max(
            job.give_up_s,
            clock.monotonic() + min(2 * outcome.load_s, outcome.compute_s) + STALL_PATIENCE_S,
        )
        outcome.decision = "load"
        began_s = clock.monotonic()
        blocks: list[Block] = []
        for block in self._verified(job, tier, places, found, outcome):
            blocks.append(block)
            job.blocks.append((tier.name, block))
            have = max(have, block.head.start + self._shared(job.key, block))
            if job.abandoned:
                outcome.decision = "abandoned"
                break
        outcome.took_s = clock.monotonic() - began_s
        read_bytes = sum(len(block.data) for block in blocks)
        outcome.loaded_tokens = sum(len(block.head.tokens) // TOKEN_BYTES for block in blocks)
        slot.meter.read(read_bytes, outcome.took_s)
        self._on_read(
            ReadReport(tier.name, len(blocks), read_bytes, outcome.locate_s, outcome.took_s, outcome.cause)
        )
        if blocks:
            self._on_fetched(tier.name, blocks)
        elif outcome.decision == "load":
            outcome.decision = "failed"
        return have

    def _verified(
        self,
        job: Fetch,
        tier: Tier,
        places: Sequence[Wanted],
        found: Sequence[Location],
        outcome: TierOutcome,
    ) -> Iterator[Block]:
        """The located blocks in order, until one does not come or does not belong to this prompt.

        Where a block stands is taken from its own envelope, never from the directory that named it: a
        directory in a shared tier may be written by anyone, and could name a sound block of another context.
        """
        wanted = {place.start: place for place in places}
        for location, block in zip(found, tier.read([each.id for each in found]), strict=False):
            if isinstance(block, Refused):
                self._refuse(block.id, tier, block.cause, block.detail, outcome)
                return
            head = block.head
            if not _belongs(head, wanted.get(location.start), location):
                self._refuse(
                    head.id, tier, "tokens", "the directory named a block of another prefix", outcome
                )
                return
            record = invalidated_since(self._invalidations, head, job.key, tier.name)
            if record is not None:
                detail = f"{record.kind} {record.value} by {record.by or 'unknown'}"
                self._refuse(head.id, tier, "invalidated", detail, outcome)
                tier.drop([head.id])
                return
            yield block

    def _refuse(self, block: BlockId, tier: Tier, cause: Refusal, detail: str, outcome: TierOutcome) -> None:
        outcome.cause, outcome.detail = cause, detail
        if cause in REFUSED_BY_CHECK or cause == "invalidated":
            why = cause if cause == "invalidated" else f"refused: {cause}"
            self._departures.add(block, Departed(tier.name, why, self._clock.wall(), detail))
            if cause in REFUSED_BY_CHECK:
                _log.warning(
                    "a block in %s was refused (%s %s): it is set aside and computed again; id %s",
                    tier.name, cause, detail, block.hex()[:16],
                )  # fmt: skip

    @staticmethod
    def _explain_silence(tier: Tier, before: dict[str, int], outcome: TierOutcome) -> None:
        """A tier that is down answers as one that has nothing: its own counts tell them apart."""
        after = tier.stats()
        for cause in ("down", "timeout", "error"):
            if after.misses.get(cause, 0) > before.get(cause, 0):
                outcome.decision, outcome.cause = "failed", cause
                outcome.detail = f"the tier is {after.state}"

    def _shared(self, key: TokenKey, block: Block) -> int:
        """How many leading tokens of a block the prompt has at its place."""
        start = block.head.start * TOKEN_BYTES
        return common_tokens(TokenKey(key[start : start + len(block.head.tokens)]), block.head.tokens)


def invalidated_since(
    invalidations: Invalidations, head: BlockHead, key: TokenKey, tier: CacheTier
) -> Invalidation | None:
    """The record that forbids to serve a block which a tier behind RAM gave for a prompt, or None."""
    # The block may go on behind the prompt, and a longer prompt find it in RAM then.
    prompt = TokenKey(key[: head.start * TOKEN_BYTES] + head.tokens)
    # A disk is written by processes with one log of invalidations, Redis by nodes with others.
    return invalidations.stale(head, key if key.startswith(prompt) else prompt, foreign=tier == "redis")


def _belongs(head: BlockHead, place: Wanted | None, location: Location) -> bool:
    """Whether a verified block holds the tokens it was located for, behind the same prefix."""
    if place is None or head.start != place.start:
        return False
    ids = dict((*place.aliases, (place.tokens, place.id)))
    begins = TokenKey(head.tokens[: location.tokens * TOKEN_BYTES])
    return ids.get(location.tokens) == block_id(head.parent, begins)


def places_of(scope: Scope, key: TokenKey, block_tokens: int, *, from_tokens: int = 0) -> list[Wanted]:
    """The places of a prompt from the block on that holds token `from_tokens`."""
    return [
        Wanted(place.id, place.start, place.end - place.start, aliases(place.parent, place.key))
        for place in chain(scope, key, block_tokens)
        if place.end > from_tokens
    ]

"""Why a prompt was found as far as it was, and why the rest was not there.

An explanation is made when a request is admitted, of what is known at that moment, and kept for the last
requests. It holds token ids around the place where the prompt departed, not the prompt.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from stockpot.events import CacheTier
from stockpot.kv.block import (
    TOKEN_BYTES,
    ContentHash,
    Place,
    Scope,
    TokenKey,
    chain,
    common_tokens,
    content_hasher,
    tokens_of,
)
from stockpot.kv.departures import Departed, Departures
from stockpot.kv.prefetch import TierOutcome

TOKENS_AROUND = 12
"""Shown before and after the token that differed."""
MOST_GAPS = 32
_FAILED = ("recompute", "failed", "abandoned")
_LEFT_RAM = ("capacity", "quota", "pressure", "replaced", "expired", "cleared")


@dataclass(frozen=True, slots=True)
class Found:
    """Positions [start, end) that were not computed, and the tier they came from."""

    start: int
    end: int
    tier: str


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token that differs from an earlier request with the same beginning. `ours` and `theirs`
    are token ids from `shown_from` on; both are the same before `position`. `request` computed the block,
    `used_s` (Unix time) is when it was used before."""

    position: int
    shown_from: int
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    request: str
    used_s: float


@dataclass(frozen=True, slots=True)
class Gap:
    """Positions [start, end) that had to be computed, and why. `at_s` is when that came about (Unix time)."""

    start: int
    end: int
    cause: str
    detail: str = ""
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """One request. Of its `prompt_tokens` the last is always computed; `waited_s` is how long it waited for
    the tiers behind RAM."""

    request: str
    client_request: str
    tenant: str
    at_s: float
    prompt_tokens: int
    found: tuple[Found, ...]
    divergence: Divergence | None
    gaps: tuple[Gap, ...]
    tiers: tuple[TierOutcome, ...]
    waited_s: float
    preemptions: int = 0

    @property
    def found_tokens(self) -> int:
        return max((each.end for each in self.found), default=0)


class Explanations:
    """The last `limit` explanations, by the server's and by the client's request id. Any thread."""

    def __init__(self, limit: int = 2048) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, Explanation] = OrderedDict()
        self._aliases: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, explanation: Explanation) -> None:
        with self._lock:
            self._kept[explanation.request] = explanation
            if explanation.client_request:
                self._aliases[explanation.client_request] = explanation.request
            while len(self._kept) > self._limit:
                _, oldest = self._kept.popitem(last=False)
                if self._aliases.get(oldest.client_request) == oldest.request:
                    del self._aliases[oldest.client_request]

    def find(self, request: str) -> Explanation | None:
        """By either id; None for one that is too long ago, or never was."""
        with self._lock:
            return self._kept.get(self._aliases.get(request, request))

    def recent(self, count: int) -> list[Explanation]:
        """The last ones, newest first."""
        with self._lock:
            return [self._kept[key] for key in list(reversed(self._kept))[:count]]


class Sightings:
    """Which prefixes were seen, by content alone: a bounded memory that tells "never seen" from "seen, by
    another tenant". For operators only: tenants are never told."""

    def __init__(self, limit: int = 16_384) -> None:
        self._limit = limit
        self._tenants: OrderedDict[ContentHash, str] = OrderedDict()

    def add(self, content: ContentHash, tenant: str) -> None:
        self._tenants[content] = tenant
        self._tenants.move_to_end(content)
        if len(self._tenants) > self._limit:
            self._tenants.popitem(last=False)

    def tenant_of(self, content: ContentHash) -> str | None:
        """Who was last seen with these tokens."""
        return self._tenants.get(content)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose block holds the same tokens elsewhere: another model (`fingerprint`) or tenant."""

    fingerprint: str
    tenant: str


def diverged(prompt: TokenKey, theirs: TokenKey, *, request: str, used_s: float) -> Divergence | None:
    """The place where a prompt departs from the tokens of an earlier request."""
    position = common_tokens(prompt, theirs)
    if position * TOKEN_BYTES >= min(len(theirs), len(prompt)):
        return None  # one is the beginning of the other: nothing differs
    first = max(0, position - TOKENS_AROUND)
    shown = slice(first * TOKEN_BYTES, (position + TOKENS_AROUND) * TOKEN_BYTES)
    return Divergence(
        position,
        first,
        tuple(tokens_of(TokenKey(prompt[shown])).tolist()),
        tuple(tokens_of(TokenKey(theirs[shown])).tolist()),
        request,
        used_s,
    )


class Evidence:
    """What there is to explain a miss with. `owner_of` is who else has a block, as far as the tiers know."""

    def __init__(
        self,
        departures: Departures,
        sightings: Sightings,
        *,
        fingerprint: str,
        owner_of: Callable[[ContentHash], Owner | None] = lambda _: None,
    ) -> None:
        self._departures = departures
        self._sightings = sightings
        self._fingerprint = fingerprint
        self._owner_of = owner_of

    def gaps(
        self, scope: Scope, key: TokenKey, tokens: int, *, block_tokens: int, outcomes: Sequence[TierOutcome]
    ) -> tuple[Gap, ...]:
        """Why the tokens of `key` (all that can be reused) from `tokens` on were not there."""
        gaps: list[Gap] = []
        failed = [each for each in outcomes if each.decision in _FAILED or each.cause is not None]
        hasher = content_hasher()
        for place in chain(scope, key, block_tokens):
            hasher.update(place.key)
            if place.end <= tokens:
                continue
            start = max(place.start, tokens)
            gap = self._gap(place, start, ContentHash(hasher.digest()), scope.tenant, failed)
            if gaps and (gaps[-1].end, gaps[-1].cause, gaps[-1].detail) == (start, gap.cause, gap.detail):
                gaps[-1] = replace(gaps[-1], end=gap.end)
            elif len(gaps) < MOST_GAPS:
                gaps.append(gap)
        return tuple(gaps)

    def _gap(
        self, place: Place, start: int, content: ContentHash, tenant: str, failed: Sequence[TierOutcome]
    ) -> Gap:
        gone = self._departures.find(place.id) or self._gone_behind(place)
        # A tier that answered is to blame for what it said it had, one that was silent for anything.
        behind = next((each for each in failed if not each.located_tokens or start < each.reach), None)
        if gone is not None and (behind is None or not _only_left_ram(gone)):
            return Gap(start, place.end, _of_departure(gone), gone.detail, gone.at_s)
        if behind is not None:
            return Gap(start, place.end, _of_outcome(behind), _words(behind))
        sighted = self._sightings.tenant_of(content)
        if sighted is not None and sighted != tenant:
            return Gap(start, place.end, "other scope", f"the tenant {sighted!r} has it")
        owner = self._owner_of(content)
        if owner is not None and owner.fingerprint != self._fingerprint:
            return Gap(start, place.end, "other model", f"computed by weights {owner.fingerprint[:16]}")
        if owner is not None and owner.tenant != tenant:
            return Gap(start, place.end, "other scope", f"the tenant {owner.tenant!r} has it")
        return Gap(start, place.end, "never seen")

    def _gone_behind(self, place: Place) -> Departed | None:
        """A block that began as the prompt does at this place, and left."""
        gone = self._departures.find_child(place.parent)
        return gone if gone is not None and gone.tokens and common_tokens(place.key, gone.tokens) else None


def found_of(reused: Mapping[CacheTier, int]) -> tuple[Found, ...]:
    """The parts of a prompt by tier, in the order in which they stand in it."""
    found: list[Found] = []
    at = 0
    for tier, tokens in reused.items():
        if tokens:
            found.append(Found(at, at + tokens, tier))
            at += tokens
    return tuple(found)


def _only_left_ram(gone: Departed) -> bool:
    """Whether a block may still be in a tier behind RAM, whatever keeps it there."""
    return gone.tier == "ram" and gone.cause in _LEFT_RAM


def _of_departure(gone: Departed) -> str:
    match gone.cause:
        case "capacity" | "quota" | "pressure" | "replaced" | "disk full" | "elsewhere":
            return f"evicted: {gone.cause}"
        case "cleared":
            return "invalidated"
        case "quarantined":
            return "refused: checksum"
        case cause:
            return cause


def _of_outcome(outcome: TierOutcome) -> str:
    if outcome.decision == "recompute":
        return "slower than recomputing"
    match outcome.cause:
        case "down" | "timeout" | "error":
            return f"tier {outcome.cause}"
        case None:
            return "tier too slow"
        case "invalidated" | "expired":
            return outcome.cause
        case "absent":
            return "evicted: elsewhere"
        case cause:
            return f"refused: {cause}"


def _words(outcome: TierOutcome) -> str:
    if outcome.decision == "recompute":
        return (
            f"{outcome.tier}: loading {outcome.located_bytes:,} bytes takes {outcome.load_s * 1e3:.1f} ms, "
            f"computing {outcome.located_tokens} tokens {outcome.compute_s * 1e3:.1f} ms"
        )
    detail = outcome.detail or ("it took too long" if outcome.decision == "abandoned" else "")
    return f"{outcome.tier}: {detail}" if detail else outcome.tier

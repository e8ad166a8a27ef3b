"""Token counts and times of an answer, as they stand in its JSON."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, UnsetType, structs

from stockpot.events import CacheTier, Completed, Recalled
from stockpot.wire.shapes_common import TTL_S

_OWN_TIERS: tuple[CacheTier, ...] = ("context", "ram", "disk", "redis")
_NANO = 1e-9


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """`cached_tokens`: prompt tokens that were not computed for this request, to the token."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """`reasoning_tokens`: of the answer, thought before it."""

    reasoning_tokens: int


class CacheCreation(msgspec.Struct, frozen=True):
    """Prompt tokens computed for this request that will be kept, by how long at least."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class UsageBody(msgspec.Struct, frozen=True):
    """OpenAI's `usage`; of a request with boundaries (`cache_control`) also the counts of the Anthropic API:
    what was read from a cache, and what was newly put there under a promise."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    cache_read_input_tokens: int | UnsetType = UNSET
    cache_creation_input_tokens: int | UnsetType = UNSET
    cache_creation: CacheCreation | UnsetType = UNSET


class NoticeBody(msgspec.Struct, frozen=True):
    """Something that was changed on the way; `kind` is a word for programs."""

    kind: str
    detail: str


class SavedBody(msgspec.Struct, frozen=True):
    """What giving a kept answer spared: tokens, US dollars, seconds."""

    prompt_tokens: int
    completion_tokens: int
    usd: float
    seconds: float


class RecallBody(msgspec.Struct, frozen=True):
    """What the caches of answers did; see `events.Recalled`. What does not apply is left out."""

    outcome: str
    reason: str
    entry: str | UnsetType = UNSET
    age_s: float | UnsetType = UNSET
    similarity: float | UnsetType = UNSET
    error_upper: float | UnsetType = UNSET
    would: str | UnsetType = UNSET
    saved: SavedBody | UnsetType = UNSET


class Extension(msgspec.Struct, frozen=True):
    """Our own `stockpot` beside `usage`: milliseconds from arrival, and which tier held what was cached.

    `queue_ms` until the request had its place in the batch, `ttft_ms` until its first token (null where none
    came), `total_ms` until the end. Of a request that went through the gateway also the `model` and `backend`
    that answered, how many attempts it took, its cost in US dollars and whose prices those are, whether the
    answer was made for another, identical request, what was changed on the way, and, where answers are kept,
    what that did (`recall`).
    """

    queue_ms: float
    ttft_ms: float | None
    total_ms: float
    cached_tokens: Mapping[CacheTier, int]
    model: str | UnsetType = UNSET
    backend: str | UnsetType = UNSET
    attempts: int | UnsetType = UNSET
    cost_usd: float | UnsetType = UNSET
    cost_source: str | UnsetType = UNSET
    shared: bool | UnsetType = UNSET
    notices: list[NoticeBody] | UnsetType = UNSET
    recall: RecallBody | UnsetType = UNSET


def usage_of(event: Completed) -> UsageBody:
    """The counts of a request that is over."""
    usage = event.usage
    body = UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(usage.cached_total),
        completion_tokens_details=UNSET
        if usage.reasoning_tokens is None
        else CompletionTokensDetails(usage.reasoning_tokens),
    )
    promised = usage.promised_tokens
    if promised is None:
        return body
    return structs.replace(
        body,
        cache_read_input_tokens=usage.cached_total,
        cache_creation_input_tokens=sum(promised.values()),
        cache_creation=CacheCreation(promised.get(TTL_S["5m"], 0), promised.get(TTL_S["1h"], 0)),
    )


def extension_of(event: Completed) -> Extension:
    """The times of a request that is over, to the microsecond, and the way it took."""
    timings, cached = event.timings, event.usage.cached_tokens
    queue_ms = round(timings.queue_s * 1e3, 3)
    ttft_ms = None if timings.ttft_s is None else round(timings.ttft_s * 1e3, 3)
    total_ms = round(timings.total_s * 1e3, 3)
    tiers: dict[CacheTier, int] = {**dict.fromkeys(_OWN_TIERS, 0), **cached}
    way = event.delivery
    if way is None:
        return Extension(queue_ms, ttft_ms, total_ms, tiers)
    return Extension(
        queue_ms,
        ttft_ms,
        total_ms,
        tiers,
        way.model,
        way.backend,
        way.attempts,
        round(way.cost_nanousd * _NANO, 9),
        way.cost_source,
        way.shared,
        [NoticeBody(notice.kind, notice.detail) for notice in way.notices],
        UNSET if way.recalled is None else _recall_of(way.recalled),
    )


def _recall_of(recalled: Recalled) -> RecallBody:
    saved: SavedBody | UnsetType = UNSET
    if recalled.is_hit:
        saved = SavedBody(
            recalled.saved_prompt_tokens,
            recalled.saved_completion_tokens,
            round(recalled.saved_nanousd * _NANO, 9),
            round(recalled.saved_s, 6),
        )
    return RecallBody(
        recalled.outcome,
        recalled.reason,
        recalled.entry or UNSET,
        UNSET if recalled.age_s is None else round(recalled.age_s, 3),
        UNSET if recalled.similarity is None else recalled.similarity,
        UNSET if recalled.error_upper is None else recalled.error_upper,
        recalled.would or UNSET,
        saved,
    )


def headers_of(event: Completed) -> list[tuple[bytes, bytes]]:
    """What an answer that is sent whole says in its headers, for what does not read bodies."""
    headers = [(b"x-stockpot-cached-tokens", b"%d" % event.usage.cached_total)]
    way = event.delivery
    if way is not None:
        headers += [
            (b"x-stockpot-model", _header(way.model)),
            (b"x-stockpot-backend", _header(way.backend)),
            (b"x-stockpot-cost-usd", b"%.9f" % (way.cost_nanousd * _NANO)),
        ]
        if way.recalled is not None:
            headers += recall_headers_of(way.recalled)
    return headers


def recall_headers_of(recalled: Recalled) -> list[tuple[bytes, bytes]]:
    """What the caches of answers did, for what does not read bodies; `Age` as RFC 9111 (5.1) has it."""
    headers = [(b"x-stockpot-recall", _header(recalled.outcome))]
    if recalled.reason:
        headers.append((b"x-stockpot-recall-reason", _header(recalled.reason)))
    if recalled.entry:
        headers.append((b"x-stockpot-recall-entry", _header(recalled.entry)))
    if recalled.age_s is not None:
        headers.append((b"age", b"%d" % recalled.age_s))
    if recalled.similarity is not None:
        headers.append((b"x-stockpot-recall-similarity", b"%.4f" % recalled.similarity))
    return headers


def _header(value: str) -> bytes:
    """A name in a header: no name may end the line it stands in."""
    if not (value.isascii() and value.isprintable()):
        value = "".join(each if each.isascii() and each.isprintable() else "?" for each in value)
    return value.encode("ascii")

"""Token counts and times of an answer, as they stand in its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import msgspec
from msgspec import UNSET, UnsetType, structs

from stockpot.events import CacheTier, Completed
from stockpot.wire.shapes_common import TTL_S

_TIERS: tuple[CacheTier, ...] = get_args(CacheTier)


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """`cached_tokens`: prompt tokens that were not computed for this request, to the token."""

    cached_tokens: int


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
    cache_read_input_tokens: int | UnsetType = UNSET
    cache_creation_input_tokens: int | UnsetType = UNSET
    cache_creation: CacheCreation | UnsetType = UNSET


class Extension(msgspec.Struct, frozen=True):
    """Our own `stockpot` beside `usage`: milliseconds from arrival, and which tier held what was cached.

    `queue_ms` until the request had its place in the batch, `ttft_ms` until its first token (null where none
    came), `total_ms` until the end.
    """

    queue_ms: float
    ttft_ms: float | None
    total_ms: float
    cached_tokens: Mapping[CacheTier, int]


def usage_of(event: Completed) -> UsageBody:
    """The counts of a request that is over."""
    usage = event.usage
    body = UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(usage.cached_total),
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
    """The times of a request that is over, to the microsecond."""
    timings = event.timings
    return Extension(
        queue_ms=round(timings.queue_s * 1e3, 3),
        ttft_ms=None if timings.ttft_s is None else round(timings.ttft_s * 1e3, 3),
        total_ms=round(timings.total_s * 1e3, 3),
        cached_tokens={tier: event.usage.cached_tokens.get(tier, 0) for tier in _TIERS},
    )

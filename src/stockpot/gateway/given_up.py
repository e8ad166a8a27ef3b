"""What an attempt used whose answer never came: counted, because the backend may bill it."""

from __future__ import annotations

import math

from stockpot.errors import DeadlineExceeded, FailureCause, UpstreamError
from stockpot.requests import AnyRequest, EmbeddingRequest
from stockpot.settings_gateway import BackendSettings

_TOKENS_PER_S = 200
"""What a model writes in a second, for one choice; most write less."""

_AFTER_SENDING: frozenset[FailureCause] = frozenset(
    {"reset", "timeout", "truncated", "format", "invalid_request"}
)
"""Causes of a backend that took the request, as far as is known, and gave no status that refuses it
(`invalid_request`: its answer has too few choices)."""

_LEFT: frozenset[FailureCause | None] = frozenset({"cancelled", "deadline", "timeout"})
"""The gateway stopped listening; the backend may not have noticed."""


def is_billed(error: BaseException | None) -> bool:
    """Whether an attempt that was sent and ended with `error` (None: it was told to end) may be billed. What
    a backend refuses, or cannot be sent, is not."""
    if isinstance(error, UpstreamError):
        return error.upstream_status is None and error.cause in _AFTER_SENDING
    return not isinstance(error, Exception) or isinstance(error, DeadlineExceeded)


def output_given_up(
    request: AnyRequest, settings: BackendSettings | None, lasted_s: float, cause: FailureCause | None
) -> int:
    """Output tokens that were generated at most and never seen, `lasted_s` seconds after it was sent.

    Of a stream none: the first would have come. Of an answer in one piece as many as are written in the time,
    and no more than the request's bound. Servers of one's own stop when the connection is closed; a provider
    may go on to the end, so that there a request that was left counts its whole bound, if it has one. What
    was sent is not known to the instant: a connection that was still being made counts as sent.
    """
    if isinstance(request, EmbeddingRequest) or request.generation.stream:
        return 0
    generation = request.generation
    written = math.ceil(max(lasted_s, 0.0) * _TOKENS_PER_S) * generation.choices
    if generation.max_tokens is None:
        return written
    bound = generation.max_tokens * generation.choices
    stops = settings is None or (settings.kind == "openai" and settings.server != "generic")
    return bound if cause in _LEFT and not stops else min(written, bound)

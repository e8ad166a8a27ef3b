"""What a provider's rules say should have been read from its cache, where the content is unbroken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from stockpot.context.provider_facts import CacheRules
from stockpot.doctor.exchange import Exchange, Piece
from stockpot.doctor.finding import Cause

_MARK = b'"cache_control"'
_HOUR_MARKS = (b'"1h"', b"3600")
_ASKING = frozenset(("prompt_cache_retention", "prompt_cache_key"))
_MOST = 0.5
"""A smaller share of what could be cached than this was lost; less is the provider's granularity."""
_WORTH_TOKENS = 256
"""Below this a prompt is no candidate for a cache, whatever the provider's minimum is."""


@dataclass(frozen=True, slots=True)
class Cached:
    """Of a prompt; `cause` says why it is less than it could be, None where it is not."""

    tokens: int
    predicted: bool
    cause: Cause | None = None


def cached_prefix(
    earlier: Exchange, later: Exchange, expected: int, rules: CacheRules, count: Callable[[Piece], int]
) -> Cached:
    """`expected` tokens of the later prompt are the earlier one. As recorded, else as `rules` predict."""
    told = later.usage.cached_tokens if later.usage is not None else None
    if told is not None and told >= _MOST * expected:
        return Cached(told, predicted=False)
    cause, tokens = _by_rules(earlier, later, expected, rules, count)
    if told is None:
        return Cached(tokens, predicted=True, cause=cause)
    if expected < _WORTH_TOKENS:
        return Cached(told, predicted=False)
    if cause is None and earlier.usage is not None and earlier.usage.written_tokens == 0 and told == 0:
        cause = "no_boundary" if rules.breakpoints_max else None
    if cause is None and expected < rules.min_tokens:
        return Cached(told, predicted=False)
    return Cached(told, predicted=False, cause=cause or _elsewhere(earlier, later))


def _asks(exchange: Exchange) -> bool:
    """Whether its sender meant it to be cached."""
    return bool(_boundaries(exchange)) or bool(exchange.parameters.keys() & _ASKING)


def _elsewhere(earlier: Exchange, later: Exchange) -> Cause:
    if earlier.backend and later.backend and earlier.backend != later.backend:
        return "routed_elsewhere"
    return "evicted"


def _by_rules(
    earlier: Exchange, later: Exchange, expected: int, rules: CacheRules, count: Callable[[Piece], int]
) -> tuple[Cause | None, int]:
    tokens: int = expected
    ttl_s = rules.default_ttl_s
    if expected < rules.min_tokens:
        # A young conversation is short, and nobody's mistake: unless a cache was asked for.
        asked = _asks(later) and expected >= _WORTH_TOKENS
        return ("below_minimum" if asked else None), 0
    if rules.breakpoints_max:
        placed = _boundaries(earlier), _boundaries(later)
        if not placed[1]:
            return "no_boundary", 0
        tokens, cause = _looked_back(earlier, *placed, rules, count)
        if cause is not None and tokens < _MOST * expected:
            return cause, tokens
        if ttl_s is not None and any(mark in piece.raw for piece in earlier.pieces for mark in _HOUR_MARKS):
            ttl_s = max(rules.ttls_s)
    if "prompt_cache_retention" in later.parameters and rules.ttls_s:
        ttl_s = max(rules.ttls_s)
    gap_s = later.at_s - earlier.at_s if later.at_s is not None and earlier.at_s is not None else 0.0
    if ttl_s is not None and gap_s > ttl_s:
        return "ttl_expired", 0
    if rules.is_own and earlier.backend and later.backend and earlier.backend != later.backend:
        return "routed_elsewhere", 0
    return None, tokens - tokens % rules.granularity_tokens


def _looked_back(
    earlier: Exchange,
    written: list[int],
    asked: list[int],
    rules: CacheRules,
    count: Callable[[Piece], int],
) -> tuple[int, Cause | None]:
    """Tokens before the last boundary of the earlier prompt that one of the later finds, and why there are
    none that go as far as they could."""
    reach = rules.lookback_blocks or 0
    ends = _block_ends(earlier)
    later_last = asked[-1]
    found = [place for place in written for each in asked if place <= each and each - place <= reach]
    best = max(found, default=0)
    tokens = sum(count(piece) for piece, end in zip(earlier.pieces, ends, strict=True) if end <= best)
    if not written:
        return tokens, "no_boundary"
    if written[-1] != best and later_last - written[-1] > reach:
        return tokens, "beyond_lookback"
    return tokens, "no_boundary"


def _boundaries(exchange: Exchange) -> list[int]:
    """The blocks (counted from 1) behind which one stands; that of the whole body stands behind the last."""
    if "cache_control" not in exchange.parameters and not any(_MARK in p.raw for p in exchange.pieces):
        return []
    ends = _block_ends(exchange)
    placed: list[int] = []
    for piece, end in zip(exchange.pieces, ends, strict=True):
        if _MARK in piece.raw:
            placed.append(_marked_block(piece, end))
    if "cache_control" in exchange.parameters and ends:
        placed.append(ends[-1])
    return placed


def _block_ends(exchange: Exchange) -> list[int]:
    blocks, ends = 0, list[int]()
    for piece in exchange.pieces:
        blocks += _blocks(piece)
        ends.append(blocks)
    return ends


class _Content(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw(b"null")


_CONTENT = msgspec.json.Decoder(_Content)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])


def _parts(piece: Piece) -> list[msgspec.Raw]:
    if piece.kind != "message" or piece.raw[:1] != b"{":
        return []
    content = bytes(_CONTENT.decode(piece.raw).content)
    return _LIST.decode(content) if content[:1] == b"[" else []


def _blocks(piece: Piece) -> int:
    return max(1, len(_parts(piece)))


def _marked_block(piece: Piece, end: int) -> int:
    """The last block of the piece that has a boundary."""
    parts = _parts(piece)
    for back, part in enumerate(reversed(parts)):
        if _MARK in bytes(part):
            return end - back
    return end

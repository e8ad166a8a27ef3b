"""Checks a pair of requests: was the prefix they should share reused, and if not, where and why not?"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from stockpot.context.canonical import NotCanonical, canonical_json
from stockpot.context.provider_facts import CacheRules, rules_for
from stockpot.context.tokens import TokenCounter
from stockpot.context.volatile import find_volatile
from stockpot.doctor.advice import ADVICE, patch_for, sorted_patch
from stockpot.doctor.cached_prefix import cached_prefix
from stockpot.doctor.causes import cause_of
from stockpot.doctor.divergence import Break, first_break, shared_after
from stockpot.doctor.exchange import Exchange, Piece
from stockpot.doctor.finding import Cause, Checked, Excerpt, Finding, Pair, Place
from stockpot.doctor.json_paths import path_within
from stockpot.doctor.leaves import Leaf, text_of

_COUNTS_MAX = 100_000
_RULES_MAX = 1_000
_EXCERPT = 48
_PATCHES_OF_A_KIND = 20
_INDEX = re.compile(r"\d+")
_AROUND = 80
_FREE = 0.9
"""A prompt of which so much was read from a cache lost nothing."""
_READ = 0.5
"""Where so much of what lies behind a break was read all the same, another request had left it there."""
_OF_A_FAMILY = 0.5
"""Two conversations of one program have at least so much in common behind the place where they part early."""
_MESSAGE_TOKENS = 4
"""What a chat template puts around a message, about (OpenAI, "Counting tokens for chat API calls")."""
_BYTES_PER_TOKEN = 4
_PARAMETERS_NOT_READ = ("cache_control", "prompt_cache_retention", "prompt_cache_key")


class Diagnosis:
    """Not for several threads. `counter` counts tokens; what it has counted is remembered for the last
    pieces. `tokens_min`: a smaller loss is none."""

    def __init__(
        self,
        counter: TokenCounter,
        *,
        rules: Callable[[str, str], CacheRules] = rules_for,
        tokens_min: int = 16,
    ) -> None:
        self._counter = counter
        self._rules_for = rules
        self._tokens_min = tokens_min
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._rules: dict[tuple[str, str], CacheRules] = {}
        self._patched: dict[tuple[Cause, str], int] = {}

    def check(self, pair: Pair) -> Checked:
        """Raises msgspec.MsgspecError for pieces that are no JSON."""
        earlier, later = pair.earlier, pair.later
        if earlier.model != later.model:
            return self._of_model(pair)
        found = first_break(earlier, later)
        prompt = self.prompt_tokens(later)
        if found is None:
            return self._unbroken(pair, prompt)
        if (parameter := _changed_parameter(earlier, later)) is not None and pair.relation == "conversation":
            return self._whole(pair, prompt, "parameters_changed", parameter)
        until = None if pair.relation == "conversation" else later.start
        kept = self._tokens_before(later, found)
        texts, pieces = shared_after(found, earlier, later, until)
        lost = sum(map(self._counter.count, texts)) + sum(map(self.piece_tokens, pieces))
        lost = min(lost, max(0, prompt - kept))
        told = later.usage.cached_tokens if later.usage is not None else None
        cached = min(kept, prompt) if told is None else told
        is_free = told is not None and told >= kept + _READ * lost
        if pair.relation == "family" and lost < _OF_A_FAMILY * (self._head_tokens(later) - kept):
            lost = 0  # programs that have some lines in common
        if lost < self._tokens_min or is_free:
            return Checked(pair, prompt, max(cached, kept), cached, predicted=told is None)
        cause = cause_of(found, earlier, later)
        return Checked(
            pair, prompt, kept + lost, cached, told is None, self._finding(pair, found, cause, kept, lost)
        )

    def prompt_tokens(self, exchange: Exchange) -> int:
        """As it was recorded, else counted."""
        if exchange.usage is not None:
            return exchange.usage.prompt_tokens
        return self._tokens(exchange.pieces)

    def piece_tokens(self, piece: Piece) -> int:
        """Of its texts, and what a template puts around them."""
        if not self._counter.exact:
            return len(piece.raw) // _BYTES_PER_TOKEN + 1
        count = self._counts.get(piece.key)
        if count is None:
            count = self._counts[piece.key] = self._counter.count(text_of(piece)) + _MESSAGE_TOKENS
            if len(self._counts) > _COUNTS_MAX:
                self._counts.popitem(last=False)
        return count

    def _tokens(self, pieces: Sequence[Piece]) -> int:
        if self._counter.exact:
            return sum(map(self.piece_tokens, pieces))
        size = 0
        for piece in pieces:
            size += len(piece.raw)
        return size // _BYTES_PER_TOKEN + len(pieces)

    def rules(self, exchange: Exchange) -> CacheRules:
        """Of the provider and model of a request."""
        key = (exchange.provider, exchange.model)
        rules = self._rules.get(key)
        if rules is None:
            if len(self._rules) >= _RULES_MAX:
                self._rules.clear()
            rules = self._rules[key] = self._rules_for(*key)
        return rules

    def _head_tokens(self, exchange: Exchange) -> int:
        return self._tokens(exchange.pieces[: exchange.start])

    def _unbroken(self, pair: Pair, prompt: int) -> Checked:
        earlier, later = pair.earlier, pair.later
        if (parameter := _changed_parameter(earlier, later)) is not None and pair.relation == "conversation":
            return self._whole(pair, prompt, "parameters_changed", parameter)
        if pair.relation == "family":
            shared = min(prompt, self._head_tokens(later))
        else:
            shared = min(prompt, self.prompt_tokens(earlier))
        rules = self.rules(later)
        read = cached_prefix(earlier, later, shared, rules, self.piece_tokens)
        finding = None
        # What another conversation left behind is a bonus, which nobody counts on.
        if (
            read.cause is not None
            and pair.relation == "conversation"
            and shared - read.tokens >= self._tokens_min
        ):
            finding = self._by_rule(pair, read.cause, shared, shared - read.tokens)
        return Checked(pair, prompt, max(shared, read.tokens), read.tokens, read.predicted, finding)

    def _of_model(self, pair: Pair) -> Checked:
        prompt = self.prompt_tokens(pair.later)
        told = pair.later.usage.cached_tokens if pair.later.usage is not None else None
        if pair.relation == "family":
            return Checked(pair, prompt, told or 0, told or 0, told is None)
        return self._whole(pair, prompt, "model_changed", "model")

    def _whole(self, pair: Pair, prompt: int, cause: Cause, name: str) -> Checked:
        """All of the earlier prompt was lost, by a field beside it."""
        earlier, later = pair.earlier, pair.later
        told = later.usage.cached_tokens if later.usage is not None else None
        shared = min(prompt, self.prompt_tokens(earlier))
        lost = shared - (told or 0)
        if lost < max(self._tokens_min, (1 - _FREE) * shared) or shared < self.rules(earlier).min_tokens:
            return Checked(pair, prompt, shared, told or 0, told is None)
        if name == "model":
            texts = earlier.model, later.model
        else:
            texts = tuple(side.parameters.get(name, b"").decode() for side in (earlier, later))
        finding = Finding(
            cause=cause,
            pair=pair,
            place=Place(name, 0, 0, exact=True),
            tokens_lost=lost,
            excerpt=Excerpt("", texts[0][:_EXCERPT], texts[1][:_EXCERPT]),
            advice=ADVICE[cause],
        )
        return Checked(pair, prompt, shared, told or 0, told is None, finding)

    def _by_rule(self, pair: Pair, cause: Cause, shared: int, lost: int) -> Finding:
        earlier, later = pair.earlier, pair.later
        place = later.pieces[min(len(earlier.pieces), len(later.pieces)) - 1].path if later.pieces else ""
        gap = "" if None in (earlier.at_s, later.at_s) else f"{(later.at_s or 0) - (earlier.at_s or 0):.0f} s"
        said = {"ttl_expired": ("", f"{gap} later"), "routed_elsewhere": (earlier.backend, later.backend)}
        one, other = said.get(cause, ("", ""))
        return Finding(
            cause=cause,
            pair=pair,
            place=Place(place, 0, shared, self._counter.exact),
            tokens_lost=lost,
            excerpt=Excerpt("", one, other),
            advice=ADVICE[cause],
        )

    def _tokens_before(self, later: Exchange, found: Break) -> int:
        tokens = self._tokens(later.pieces[: found.index])
        if found.later is None or found.index >= len(later.pieces):
            return tokens
        for leaf in found.later_leaves:
            if leaf.path == found.later.path:
                break
            tokens += self._counter.count(leaf.text)
        return tokens + self._counter.count(found.later.text[: found.character])

    def _finding(self, pair: Pair, found: Break, cause: Cause, kept: int, lost: int) -> Finding:
        piece = pair.later.pieces[found.index] if found.index < len(pair.later.pieces) else None
        path = found.later.path if found.later is not None else piece.path if piece is not None else ""
        return Finding(
            cause=cause,
            pair=pair,
            place=Place(path_within(found, path), found.character, kept, self._counter.exact),
            tokens_lost=lost,
            excerpt=_excerpt(found),
            advice=ADVICE[cause],
            patch=self._patch(cause, found, path),
        )

    def _patch(self, cause: Cause, found: Break, path: str) -> str:
        """For the first of a kind: they are all alike, and only some are shown."""
        kind = (cause, _INDEX.sub("", path))
        made = self._patched.get(kind, 0)
        if made >= _PATCHES_OF_A_KIND or len(self._patched) > _RULES_MAX:
            return ""
        self._patched[kind] = made + 1
        return _patch(cause, found, path)


def _changed_parameter(earlier: Exchange, later: Exchange) -> str | None:
    one, other = earlier.parameters, later.parameters
    if one == other:
        return None
    for name in sorted(one.keys() | other.keys()):
        if name in _PARAMETERS_NOT_READ or one.get(name) == other.get(name):
            continue
        values = [msgspec.json.decode(side[name]) if name in side else None for side in (one, other)]
        if values[0] != values[1]:
            return name
    return None


def _excerpt(found: Break) -> Excerpt:
    at = found.character
    earlier = "" if found.earlier is None else found.earlier.text
    later = "" if found.later is None else found.later.text
    return Excerpt(later[max(0, at - _EXCERPT) : at], earlier[at : at + _EXCERPT], later[at : at + _EXCERPT])


def _patch(cause: Cause, found: Break, path: str) -> str:
    if found.later is None:
        return ""
    text = found.later.text
    if cause == "key_order":
        try:
            return sorted_patch(text, canonical_json(msgspec.json.decode(text)), path)
        except (msgspec.MsgspecError, NotCanonical):
            return ""
    start, end = _span(found.later, found.character)
    return patch_for(cause, text, start, end, path)


def _span(leaf: Leaf, at: int) -> tuple[int, int]:
    """What moves on at that place, else the word there."""
    offset = max(0, at - _AROUND)
    for each in find_volatile(leaf.text[offset : at + _AROUND]):
        if each.start + offset <= at <= each.end + offset:
            return each.start + offset, each.end + offset
    start = end = at
    while start > 0 and (leaf.text[start - 1].isalnum() or leaf.text[start - 1] in "_-"):
        start -= 1
    while end < len(leaf.text) and (leaf.text[end].isalnum() or leaf.text[end] in "_-"):
        end += 1
    return start, end

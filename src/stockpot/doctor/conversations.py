"""Groups requests into conversations, and each with the earlier request whose prefix it should have shared.

A request goes on with a conversation if it holds the last message of that conversation's last request; if
history was changed, if most of its messages are the same. One that goes on with none begins a conversation,
and is paired with the last request of its family: the same program, which has the same tools and the same
system prompt but for what moves on in it. Tenants never meet.

What is known is bounded, in conversations and in bytes: those used longest ago are forgotten.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from stockpot.doctor.exchange import Exchange, Piece
from stockpot.doctor.finding import Pair

_CANDIDATES = 8
_LOOKS_BACK = 64
_FAMILIES_MAX = 512
_FAMILIES_COMPARED = 32
_SIGNATURES_MAX = 4_096
_SIGNED_CHARACTERS = 8_000
_LOOKS_ON = 4
_ALIKE = 0.5
_SURE = 3.0
_WORDS = re.compile(r"[^\W\d_]{2,}")


@dataclass(slots=True, eq=False)
class _Conversation:
    number: int
    last: Exchange
    turns: int
    listed: list[tuple[_Index, int]] = field(default_factory=list[tuple["_Index", int]])


_Index = dict[int, list[_Conversation]]


@dataclass(slots=True)
class _Family:
    """`words` of its prompts' beginnings; `last` is the last request that began a conversation."""

    words: frozenset[str]
    last: Exchange


@dataclass(slots=True)
class GroupCounts:
    """Conversations that were seen, and those let go to stay within bounds."""

    conversations: int = 0
    forgotten: int = 0


@dataclass(slots=True)
class _Known:
    conversations: OrderedDict[int, _Conversation] = field(default_factory=OrderedDict[int, _Conversation])
    size_bytes: int = 0


class Conversations:
    """Not for several threads. `conversations_max` and `memory_bytes` bound what is known."""

    def __init__(self, *, conversations_max: int = 50_000, memory_bytes: int = 256 * 2**20) -> None:
        self._conversations_max = conversations_max
        self._memory_bytes = memory_bytes
        self._known = _Known()
        self._by_end: _Index = {}
        self._by_start: _Index = {}
        self._families: OrderedDict[tuple[str, int], _Family] = OrderedDict()
        self._signatures: OrderedDict[int, frozenset[str]] = OrderedDict()
        self.counts = GroupCounts()

    def pairs(self, exchanges: Iterable[Exchange]) -> Iterator[Pair | Exchange]:
        """In order, each request with its earlier one; those that have none as they are."""
        for exchange in exchanges:
            yield self.add(exchange)

    def add(self, exchange: Exchange) -> Pair | Exchange:
        """One more request."""
        start = exchange.start
        found = self._of(exchange, start)
        if found is not None:
            earlier = found.last
            found.turns += 1
            self._take(found, exchange, start)
            return Pair(earlier, exchange, "conversation", found.number, found.turns)
        self.counts.conversations += 1
        made = _Conversation(self.counts.conversations, exchange, 1)
        self._take(made, exchange, start)
        earlier = self._relative(exchange, start)
        if earlier is None:
            return exchange
        return Pair(earlier, exchange, "family", made.number, 1)

    # Conversations

    def _of(self, exchange: Exchange, start: int) -> _Conversation | None:
        pieces = exchange.pieces
        salt = (exchange.tenant, exchange.session, exchange.shape)
        best, most, looked = None, 0.0, 0
        # "Yes" and "go on" end many conversations: some more places are looked at than the first that hits.
        for at in range(len(pieces) - 1, max(start, len(pieces) - _LOOKS_BACK) - 1, -1):
            for each in self._by_end.get(hash((salt, pieces[at].key)), ()):
                alike = _alike(each.last, exchange, start)
                if alike >= most and alike >= _ALIKE:
                    best, most = each, alike
            looked += most > 0
            if most >= _SURE or looked > _LOOKS_ON:
                break
        if best is None and len(pieces) > start:
            candidates = self._by_start.get(hash((salt, pieces[start].key)), ())
            best = self._best(candidates, exchange, start)
        if best is not None:
            return best
        if exchange.session:
            return self._in_session(exchange, start)
        return None

    def _best(
        self, candidates: Iterable[_Conversation], exchange: Exchange, start: int
    ) -> _Conversation | None:
        """The one of which most is kept, the latest of several; None where too little is."""
        best, most = None, _ALIKE
        for each in candidates:
            if (alike := _alike(each.last, exchange, start)) >= most:
                best, most = each, alike
        return best

    def _in_session(self, exchange: Exchange, start: int) -> _Conversation | None:
        candidates = self._by_start.get(hash((exchange.tenant, exchange.session)))
        if candidates is None:
            return None
        best = self._best(candidates, exchange, start)
        if best is not None:
            return best
        # A session says that it is one conversation, unless another part of the program speaks in it.
        words = self._words(exchange, start)
        for each in reversed(candidates):
            first = each.last.start
            if _overlap(words, self._words(each.last, first)) > _ALIKE:
                longer = len(exchange.pieces) - start >= len(each.last.pieces) - first
                if longer and len(exchange.pieces) - start > 1:
                    return each
        return None

    def _take(self, conversation: _Conversation, exchange: Exchange, start: int) -> None:
        """It is as long as this request from now on."""
        known = self._known
        if conversation.number in known.conversations:
            known.size_bytes -= conversation.last.size_bytes
            self._unlist(conversation)
        conversation.last = exchange
        known.conversations[conversation.number] = conversation
        known.conversations.move_to_end(conversation.number)
        known.size_bytes += exchange.size_bytes
        salt = (exchange.tenant, exchange.session, exchange.shape)
        listed: list[tuple[_Index, int]] = []
        if len(exchange.pieces) > start:
            listed.append((self._by_end, hash((salt, exchange.pieces[-1].key))))
            listed.append((self._by_start, hash((salt, exchange.pieces[start].key))))
        if exchange.session:
            listed.append((self._by_start, hash((exchange.tenant, exchange.session))))
        for index, key in listed:
            others = index.get(key)
            if others is None:
                index[key] = [conversation]
            else:
                others.append(conversation)
                del others[:-_CANDIDATES]
        conversation.listed = listed
        while (
            len(known.conversations) > self._conversations_max or known.size_bytes > self._memory_bytes
        ) and len(known.conversations) > 1:
            _, oldest = known.conversations.popitem(last=False)
            known.size_bytes -= oldest.last.size_bytes
            self._unlist(oldest)
            self.counts.forgotten += 1

    def _unlist(self, conversation: _Conversation) -> None:
        for index, key in conversation.listed:
            others = index.get(key)
            if others is None:
                continue
            if conversation in others:
                others.remove(conversation)
            if not others:
                del index[key]
        conversation.listed = []

    # Families

    def _relative(self, exchange: Exchange, start: int) -> Exchange | None:
        """The last request of the same program: of those that begin just so, else of those that are alike."""
        if not start:
            return None  # nothing before the conversation: nothing to share
        key = (exchange.tenant, self._family_key(exchange, start))
        family = self._families.get(key)
        if family is not None:
            earlier, family.last = family.last, exchange
            self._families.move_to_end(key)
            return earlier
        words = self._words(exchange, start)
        latest = islice(reversed(self._families.items()), _FAMILIES_COMPARED)
        alike = next(
            (
                each.last
                for (tenant, _), each in latest
                if tenant == exchange.tenant
                and each.last.shape == exchange.shape
                and _overlap(each.words, words) > _ALIKE
            ),
            None,
        )
        self._families[key] = _Family(words, exchange)
        if len(self._families) > _FAMILIES_MAX:
            self._families.popitem(last=False)
        return alike

    def _family_key(self, exchange: Exchange, start: int) -> int:
        return hash((exchange.shape, *(piece.key for piece in exchange.pieces[:start])))

    def _words(self, exchange: Exchange, start: int) -> frozenset[str]:
        """Of tools and system prompt, without what moves on; computed once for each beginning."""
        key = self._family_key(exchange, start)
        words = self._signatures.get(key)
        if words is None:
            words = _words_of(exchange.pieces[:start])
            self._signatures[key] = words
            if len(self._signatures) > _SIGNATURES_MAX:
                self._signatures.popitem(last=False)
        return words


def _alike(earlier: Exchange, later: Exchange, start: int) -> float:
    """The share of the earlier conversation's messages that the later one has; 2 where it has all of them, in
    their places, and 3 where what stands before them is the same, too."""
    first = earlier.start
    before, now = earlier.pieces, later.pieces
    count = len(before) - first
    if not count:
        return 0.0
    if len(now) - start >= count:
        shift = start - first
        for at in range(len(before) - 1, first - 1, -1):  # most often the last ones tell
            if before[at].key != now[at + shift].key:
                break
        else:
            return _SURE if _same_head(earlier, later, start) else 2.0
    keys = {piece.key for piece in now[start:]}
    shared = sum(piece.key in keys for piece in before[first:])
    alike = shared / count
    if shared > 1 and before[-1].key in keys:
        # It goes on from where the earlier one ended, and what is gone is gone from the beginning.
        alike = max(alike, _ALIKE, shared / max(1, len(now) - start))
    return alike


def _same_head(earlier: Exchange, later: Exchange, start: int) -> bool:
    """Whether the same stands before both conversations."""
    if earlier.start != start:
        return False
    before, now = earlier.pieces, later.pieces
    return not any(before[at].key != now[at].key for at in range(start))


def _words_of(pieces: Iterable[Piece]) -> frozenset[str]:
    words: set[str] = set()
    for piece in pieces:
        text = piece.raw[:_SIGNED_CHARACTERS].decode("utf-8", "replace")
        words.update(_WORDS.findall(text.lower()))  # without digits: most of what moves on is left out
    return frozenset(words)


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 1.0

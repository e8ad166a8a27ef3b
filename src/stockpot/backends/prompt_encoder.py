"""From the text of a prompt to token ids, without encoding again what came before.

Conversations repeat: the same system prompt, the same earlier turns. A tokenizer splits a text at control
tokens first, and what lies between two of them does not influence the rest, so a prompt is cut before the
control tokens that its template writes, and each piece is encoded once. For 2,000 tokens that saves about
4 ms of every request.

Each tenant has pieces of its own: how fast a prompt is encoded says nothing about the prompts of others.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.chat_template import PromptPart
from stockpot.engine.driver import Vocabulary

TokenIds = NDArray[np.int32]

_Key = tuple[str, PromptPart]
"""A tenant and a piece of its prompts."""

_QUICK_CHARACTERS = 2_000
"""Texts up to this long are encoded in well below a millisecond."""
_ENTRY_BYTES = 400
"""The key, the array and their place in the dictionary: most of what a short piece takes."""


class PromptEncoder:
    """Encodes texts and keeps the ids of the pieces seen last. May be used from any thread.

    `controls` are the spellings of control tokens that prompts are made with. `capacity_bytes` bounds what
    pieces, ids and the objects around them take, of all tenants together.
    """

    def __init__(self, vocabulary: Vocabulary, controls: Iterable[str], *, capacity_bytes: int) -> None:
        self._vocabulary = vocabulary
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._kept: OrderedDict[_Key, TokenIds] = OrderedDict()
        self._lock = threading.Lock()
        cuts = [re.escape(control) for control in controls if _separates(vocabulary, control)]
        self._cut = re.compile(f"(?={'|'.join(cuts)})") if cuts else None

    @property
    def used_bytes(self) -> int:
        """What is kept, as it counts against the capacity."""
        return self._used_bytes

    def pieces(self, parts: Iterable[PromptPart]) -> list[PromptPart]:
        """The parts of a prompt, cut where that does not change the tokens. Literal parts stay whole."""
        pieces: list[PromptPart] = []
        for part in parts:
            if part.literal or self._cut is None:
                pieces.append(part)
            else:
                pieces += (PromptPart(text, literal=False) for text in self._cut.split(part.text) if text)
        return pieces

    def is_quick(self, pieces: Iterable[PromptPart], tenant: str = "") -> bool:
        """Whether encoding them now takes no longer than handing them to a thread."""
        with self._lock:
            unseen = sum(len(piece.text) for piece in pieces if (tenant, piece) not in self._kept)
        return unseen < _QUICK_CHARACTERS

    def encode(self, pieces: Iterable[PromptPart], tenant: str = "") -> TokenIds:
        """The ids of all pieces of a tenant's prompt, joined."""
        found = [self._encode_piece((tenant, piece)) for piece in pieces]
        return np.concatenate(found) if found else np.empty(0, np.int32)

    def _encode_piece(self, key: _Key) -> TokenIds:
        with self._lock:
            tokens = self._kept.get(key)
            if tokens is not None:
                self._kept.move_to_end(key)
                return tokens
        _, piece = key
        tokens = np.array(self._vocabulary.encode(piece.text, special=not piece.literal), np.int32)
        size = _size_bytes(key, tokens)
        if size > self._capacity_bytes:
            return tokens
        with self._lock:
            if key not in self._kept:
                self._kept[key] = tokens
                self._used_bytes += size
            while self._used_bytes > self._capacity_bytes:
                self._used_bytes -= _size_bytes(*self._kept.popitem(last=False))
        return tokens


def _size_bytes(key: _Key, tokens: TokenIds) -> int:
    _, piece = key
    return sys.getsizeof(piece.text) + tokens.nbytes + _ENTRY_BYTES


def _separates(vocabulary: Vocabulary, control: str) -> bool:
    """Whether a text may be cut before `control`: some vocabularies take white space away beside it."""
    for before, after in (("x", "x"), ("x \n ", " \n x"), (control, control), ("7.", "\n")):
        whole = vocabulary.encode(before + control + after, special=True)
        cut = vocabulary.encode(before, special=True) + vocabulary.encode(control + after, special=True)
        if whole != cut:
            return False
    return True

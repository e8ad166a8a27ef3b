"""Rendezvous hashing: every key has a favourite among the names, and keeps it when others come and go.

Each name is scored for the key by a hash of both, and the highest wins (Thaler and Ravishankar 1998). A name
that leaves moves its own keys alone, to the next of their ranking; one that comes takes only what it wins.
All processes agree without a word, since nothing but key and names counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from hashlib import blake2b

_HASH_BITS = 64


def ranked(key: str, names: Iterable[str]) -> list[str]:
    """All names, the favourite of the key first."""
    return [name for _, name in sorted(_scored(key, names), reverse=True)]


def chosen(key: str, weights: Iterable[tuple[str, float]]) -> str:
    """One of the names, in proportion to its weight over all keys; a weight of 0 is never chosen.

    With -weight / ln(u) as the score, u being the hash in (0, 1), a name that gains weight only takes keys,
    one that loses weight only gives, and the others exchange none (Schindelhauer and Schomaker 2005).
    Raises ValueError where no weight is above 0.
    """
    shares = {name: weight for name, weight in weights if weight > 0}
    if not shares:
        raise ValueError("no name with a weight above 0 to choose from")
    if len(shares) == 1:
        return next(iter(shares))
    return max((-shares[name] / math.log(_unit(score)), name) for score, name in _scored(key, shares))[1]


def _scored(key: str, names: Iterable[str]) -> list[tuple[int, str]]:
    # The key is digested first, to a fixed length: no other pair of key and name gives the same bytes.
    base = blake2b(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest(), digest_size=8)
    scored: list[tuple[int, str]] = []
    for name in names:
        hashed = base.copy()
        hashed.update(name.encode("utf-8", "surrogatepass"))
        scored.append((int.from_bytes(hashed.digest(), "big"), name))
    return scored


def _unit(score: int) -> float:
    """The score in (0, 1), both ends excluded also after rounding: 52 bits, and half of the last one."""
    return ((score >> (_HASH_BITS - 52)) + 0.5) / 2**52

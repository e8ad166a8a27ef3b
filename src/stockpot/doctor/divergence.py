"""Where two prompts part, and what of the later one would have been cached had that place been the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from stockpot.doctor.exchange import Exchange, Piece
from stockpot.doctor.leaves import Leaf, leaves
from stockpot.doctor.text_causes import common_suffix, first_difference

Change = Literal["leaf", "added", "removed"]

_SUFFIX_MIN = 24
"""Characters at the end of two texts that are the same by more than chance."""
_SEGMENT = re.compile(r"[^\n.;]*[\n.;]+|[^\n.;]+")
_COMPARED_MAX = 40_000
"""Pairs of segments: some milliseconds."""


@dataclass(frozen=True, slots=True)
class Break:
    """The first place that differs: piece `index` of both prompts, and in it a leaf of each (None where one
    has no more), which differ from `character` on."""

    index: int
    earlier: Leaf | None
    later: Leaf | None
    character: int = 0


def first_break(earlier: Exchange, later: Exchange) -> Break | None:
    """None: the later prompt begins with the whole earlier one, or the earlier with the later. Raises
    msgspec.MsgspecError for pieces that are no JSON."""
    for index, (one, other) in enumerate(zip(earlier.pieces, later.pieces, strict=False)):
        if one.key == other.key and one.kind == other.kind:
            continue
        if one.kind != other.kind:
            return Break(index, _head(one), _head(other))
        found = _between(index, leaves(one), leaves(other))
        if found is not None and not _goes_on(found, earlier, one):
            return found
    return None


def shared_after(found: Break, earlier: Exchange, later: Exchange, until: int | None = None) -> list[str]:
    """The texts of the later prompt behind the break that the earlier prompt has too, up to piece `until`:
    they could have been read from a cache. A piece counts once."""
    texts: list[str] = []
    if found.earlier is not None and found.later is not None:
        texts += _shared_texts(found.earlier.text[found.character :], found.later.text[found.character :])
    known: dict[bytes, int] = {}
    for piece in earlier.pieces[found.index :]:
        known[piece.key] = known.get(piece.key, 0) + 1
    rest = _rest(found, later.pieces[found.index]) if found.index < len(later.pieces) else []
    before = {leaf.text for leaf in _leaves_of(earlier, found.index)}
    texts += [leaf.text for leaf in rest if leaf.text in before and leaf.kind != "label"]
    last = len(later.pieces) if until is None else until
    for piece in later.pieces[found.index : last]:
        if known.get(piece.key, 0) > 0:
            known[piece.key] -= 1
            texts += [leaf.text for leaf in leaves(piece)]
    return texts


def _shared_texts(earlier: str, later: str) -> list[str]:
    """What two versions of a text have in common from the place on where they part: sentences and lines, in
    order, and the end of the first."""
    one, other = _SEGMENT.findall(earlier), _SEGMENT.findall(later)
    shared: list[str] = []
    if one and other and one[0] != other[0]:
        suffix = common_suffix(one[0], other[0], 0)
        if suffix >= _SUFFIX_MIN:
            shared.append(other[0][len(other[0]) - suffix :])
    if len(one) * len(other) > _COMPARED_MAX:  # too many to put in order
        known = Counter(one)
        for segment in other:
            if known[segment] > 0:
                known[segment] -= 1
                shared.append(segment)
        return shared
    for block in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        if block.size:
            shared.append("".join(other[block.b : block.b + block.size]))
    return shared


def _leaves_of(exchange: Exchange, index: int) -> tuple[Leaf, ...]:
    return leaves(exchange.pieces[index]) if index < len(exchange.pieces) else ()


def _rest(found: Break, piece: Piece) -> list[Leaf]:
    """The leaves of the broken piece behind the broken leaf."""
    rest: list[Leaf] = []
    behind = False
    for leaf in leaves(piece):
        if behind:
            rest.append(leaf)
        behind = behind or (found.later is not None and leaf.path == found.later.path)
    return rest


def _between(index: int, one: Sequence[Leaf], other: Sequence[Leaf]) -> Break | None:
    for earlier, later in zip(one, other, strict=False):
        if earlier.text != later.text or earlier.kind != later.kind:
            return Break(index, earlier, later, first_difference(earlier.text, later.text))
        if _name(earlier.path) != _name(later.path) and earlier.kind != "text":
            return Break(index, earlier, later)
    if len(one) == len(other):
        return None  # the envelope alone is another: no model sees it
    shorter = min(len(one), len(other))
    return Break(
        index,
        one[shorter] if len(one) > shorter else None,
        other[shorter] if len(other) > shorter else None,
    )


def _goes_on(found: Break, earlier: Exchange, piece: Piece) -> bool:
    """Whether the earlier prompt simply ends within this piece: a plain text that has grown."""
    ends = piece.path == "prompt" and found.index == len(earlier.pieces) - 1
    return ends and found.earlier is not None and found.character == len(found.earlier.text)


def _head(piece: Piece) -> Leaf | None:
    found = leaves(piece)
    return next((leaf for leaf in found if leaf.kind != "label"), found[0] if found else None)


def _name(path: str) -> str:
    return path.rpartition(".")[2]

"""Where two prompts part, and what of the later one would have been cached had that place been the same."""

from __future__ import annotations

import re
from collections import Counter
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
    has no more), which differ from `character` on. `earlier_leaves` and `later_leaves` are all of them."""

    index: int
    earlier: Leaf | None
    later: Leaf | None
    character: int = 0
    earlier_leaves: tuple[Leaf, ...] = ()
    later_leaves: tuple[Leaf, ...] = ()


def first_break(earlier: Exchange, later: Exchange) -> Break | None:
    """None: the later prompt begins with the whole earlier one, or the earlier with the later. Raises
    msgspec.MsgspecError for pieces that are no JSON."""
    for index, (one, other) in enumerate(zip(earlier.pieces, later.pieces, strict=False)):
        if one.key == other.key and one.kind == other.kind:
            continue
        if one.kind != other.kind:
            before, now = leaves(one), leaves(other)
            return Break(index, _head(before), _head(now), 0, before, now)
        found = _between(index, leaves(one), leaves(other))
        if found is not None and not _goes_on(found, earlier, one):
            return found
    return None


def shared_after(
    found: Break, earlier: Exchange, later: Exchange, until: int | None = None
) -> tuple[list[str], list[Piece]]:
    """What of the later prompt stands behind the break and the earlier prompt has too, up to piece `until`:
    texts of the broken piece, and whole pieces. It could have been read from a cache."""
    texts: list[str] = []
    pieces: list[Piece] = []
    if found.earlier is not None and found.later is not None:
        texts += _shared_texts(found.earlier.text[found.character :], found.later.text[found.character :])
    known: dict[bytes, int] = {}
    for piece in earlier.pieces[found.index :]:
        known[piece.key] = known.get(piece.key, 0) + 1
    before = {leaf.text for leaf in found.earlier_leaves}
    texts += [leaf.text for leaf in _rest(found) if leaf.text in before and leaf.kind != "label"]
    last = len(later.pieces) if until is None else until
    for piece in later.pieces[found.index : last]:
        if known.get(piece.key, 0) > 0:
            known[piece.key] -= 1
            pieces.append(piece)
    return texts, pieces


def _shared_texts(earlier: str, later: str) -> list[str]:
    """What two versions of a text have in common from the place on where they part: sentences and lines, in
    order, and the end of the first."""
    one, other = _SEGMENT.findall(earlier), _SEGMENT.findall(later)
    shared: list[str] = []
    if one and other and one[0] != other[0]:
        suffix = common_suffix(one[0], other[0], 0)
        if suffix >= _SUFFIX_MIN:
            shared.append(other[0][len(other[0]) - suffix :])
    end = 0
    while end < min(len(one), len(other)) and one[-1 - end] == other[-1 - end]:
        end += 1
    if end:  # most often all that follows is the same
        shared.append("".join(other[len(other) - end :]))
        one, other = one[: len(one) - end], other[: len(other) - end]
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


def _rest(found: Break) -> list[Leaf]:
    """The leaves of the broken piece behind the broken leaf."""
    rest: list[Leaf] = []
    behind = False
    for leaf in found.later_leaves:
        if behind:
            rest.append(leaf)
        behind = behind or (found.later is not None and leaf.path == found.later.path)
    return rest


def _between(index: int, one: tuple[Leaf, ...], other: tuple[Leaf, ...]) -> Break | None:
    for earlier, later in zip(one, other, strict=False):
        if earlier.text != later.text or earlier.kind != later.kind:
            at = first_difference(earlier.text, later.text)
            return Break(index, earlier, later, at, one, other)
        if _name(earlier.path) != _name(later.path) and earlier.kind != "text":
            return Break(index, earlier, later, 0, one, other)
    if len(one) == len(other):
        return None  # the envelope alone is another: no model sees it
    shorter = min(len(one), len(other))
    return Break(
        index,
        one[shorter] if len(one) > shorter else None,
        other[shorter] if len(other) > shorter else None,
        0,
        one,
        other,
    )


def _goes_on(found: Break, earlier: Exchange, piece: Piece) -> bool:
    """Whether the earlier prompt simply ends within this piece: a plain text that has grown."""
    ends = piece.path == "prompt" and found.index == len(earlier.pieces) - 1
    return ends and found.earlier is not None and found.character == len(found.earlier.text)


def _head(found: tuple[Leaf, ...]) -> Leaf | None:
    return next((leaf for leaf in found if leaf.kind != "label"), found[0] if found else None)


def _name(path: str) -> str:
    return path.rpartition(".")[2]

"""What the answers around a candidate say of it, and the features the error is estimated from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stockpot.recall.questions.question import Likeness

_MARGIN_MAX = 0.3
_NEAR = 0.05
"""An entry less similar than a candidate by more than this does not speak against it on its own."""
_LOOKED_AT = 8


@dataclass(frozen=True, slots=True)
class Support:
    """How the other entries near a question relate to one of them: as many have the same answer
    (`agreeing`), or one that is not known to be the same (`differing`). `margin` is by how much the
    candidate is more similar than the nearest that differs; where none does, than the furthest that was
    looked at (`unopposed`).

    Two questions can lie close and have different answers; a whole neighbourhood with one answer around a
    question seldom misleads (k nearest neighbours with reject option, Hellman 1970).
    """

    agreeing: int = 0
    differing: int = 0
    margin: float = 0.0
    unopposed: bool = True

    @property
    def contradicted(self) -> bool:
        """An entry about as near has another answer."""
        return not self.unopposed and self.margin < _NEAR


@dataclass(slots=True)
class Standing:
    """What is known of one entry, in its scope. `group` is the key of the entry whose answer it shares:
    comparing answers put it there. `right` and `wrong` count what its answer was for other questions."""

    scope: str
    group: bytes
    right: float = 0.0
    wrong: int = 0


def support_of(at: int, groups: Sequence[bytes], likenesses: Sequence[Likeness]) -> Support:
    """Of the candidate at position `at`; `groups` and `likenesses` are of all that have a vote."""
    agreeing = differing = 0
    opposed: float | None = None
    own = likenesses[at].similarity
    lowest = own
    for position, (group, likeness) in enumerate(zip(groups, likenesses, strict=True)):
        if position == at:
            continue
        lowest = min(lowest, likeness.similarity)
        if group == groups[at]:
            agreeing += 1
        else:
            differing += 1
            opposed = likeness.similarity if opposed is None else max(opposed, likeness.similarity)
    margin = own - (lowest if opposed is None else opposed)
    return Support(agreeing, differing, round(margin, 4), opposed is None)


FEATURES = 13


def features_of(likeness: Likeness, support: Support, standing: Standing | None) -> tuple[float, ...]:
    """`FEATURES` numbers about -1..2, of which the first is the constant."""
    around = min(support.agreeing, _LOOKED_AT - 1) / (_LOOKED_AT - 1)
    margin = max(-_MARGIN_MAX, min(support.margin, _MARGIN_MAX)) / _MARGIN_MAX
    return (
        1.0,
        likeness.similarity,
        max(0.0, likeness.similarity - 0.9) * 10,
        likeness.context_similarity,
        likeness.distance,
        likeness.length_ratio,
        float(likeness.same_kind),
        float(likeness.equal_form),
        around,
        margin,
        float(support.unopposed),
        0.0 if standing is None else math.log1p(standing.right),
        0.0 if standing is None else float(min(standing.wrong, 2)),
    )

"""The parts of a message, cut where cache boundaries stand, for APIs that write a boundary on a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stockpot.requests import CacheBoundary, Message, Part, TextPart

MarkedPart = tuple[Part, CacheBoundary | None]
"""A part, and the boundary behind it."""


def boundaries_of(boundaries: Sequence[CacheBoundary], message: int) -> Mapping[int | None, CacheBoundary]:
    """The boundaries of one message by their place; of several at one place the one that is kept longest."""
    return {
        boundary.characters: boundary
        for boundary in sorted(boundaries, key=lambda one: one.ttl_s)
        if boundary.message == message
    }


def marked_parts(message: Message, marks: Mapping[int | None, CacheBoundary]) -> list[MarkedPart]:
    """The content in order, without empty texts. A boundary stands behind the first part with which its
    characters are complete, so it never covers more than was asked. That at None, behind all of the message,
    is the caller's to place."""
    cuts = sorted(place for place in marks if place is not None)
    done = 0
    marked: list[MarkedPart] = []
    for part in message.parts or (TextPart(message.content),):
        if not isinstance(part, TextPart):
            at_start = cuts and cuts[0] <= done
            marked.append((part, marks[cuts.pop(0)] if at_start else None))
            continue
        text, start = part.text, 0
        while cuts and cuts[0] <= done + len(text):
            cut = cuts.pop(0)
            if piece := text[start : cut - done]:
                marked.append((TextPart(piece), marks[cut]))
                start = cut - done
            elif marked:
                marked[-1] = (marked[-1][0], marks[cut])
        if rest := text[start:]:
            marked.append((TextPart(rest), None))
        done += len(text)
    return marked

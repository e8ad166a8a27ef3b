"""A cache boundary as text, for prompts that are nothing but text: a line behind what is stable."""

from __future__ import annotations

MARKER = "// __CACHE_END__"
"""Stands on a line of its own, and is taken out before a model sees it."""


def split_marked(text: str, marker: str = MARKER) -> tuple[str, tuple[int, ...]]:
    """The text without its marker lines, and where they stood: characters of that text which precede each.

    A line that is the marker and blanks is one; the marker within a line is text. Without a marker ("" too)
    the text is given back as it is.
    """
    if not marker or marker not in text:
        return text, ()
    kept: list[str] = []
    places: list[int] = []
    characters = 0
    for line in text.splitlines(keepends=True):
        if line.strip(" \t\r\n") == marker:
            places.append(characters)
        else:
            kept.append(line)
            characters += len(line)
    return "".join(kept), tuple(dict.fromkeys(place for place in places if place))

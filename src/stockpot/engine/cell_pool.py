"""How many cells of the context are taken, when sequences share them.

Sequences that share a prefix share its cells, so the cells in use are those of a tree: each segment is a run
of token positions held once, its parent the run before it. A sequence is known by its last segment. The
pool mirrors what the driver does (`copy`, `decode`, `cut`) and never asks the library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Segment:
    """Positions [start, end). `holders` counts the sequences and segments that stand directly on it."""

    parent: _Segment | None
    start: int
    end: int
    holders: int = 0


class CellPool:
    """Counts cells. Sequence ids are the driver's."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.used = 0
        self._tips: dict[int, _Segment] = {}

    @property
    def free(self) -> int:
        return self.cells - self.used

    def length(self, sequence: int) -> int:
        """Tokens the sequence holds."""
        tip = self._tips.get(sequence)
        return tip.end if tip is not None else 0

    def extend(self, sequence: int, tokens: int) -> None:
        """The sequence got `tokens` cells of its own. Raises ValueError beyond the capacity."""
        if tokens > self.free:
            raise ValueError(f"{tokens} cells asked for, {self.free} of {self.cells} are free")
        tip = self._tips.get(sequence)
        if tip is None or tip.holders > 1:
            start = tip.end if tip is not None else 0
            # The sequence stands on the new segment now, the new segment on the old tip: the old tip's
            # holders stay as many.
            tip = _Segment(tip, start, start, holders=1)
            self._tips[sequence] = tip
        tip.end += tokens
        self.used += tokens

    def share(self, source: int, target: int, tokens: int) -> None:
        """`target`, which holds nothing, shares the first `tokens` cells of `source`."""
        if target in self._tips:
            raise ValueError(f"sequence {target} already holds {self.length(target)} tokens")
        if not 0 < tokens <= self.length(source):
            raise ValueError(f"sequence {source} holds {self.length(source)} tokens, {tokens} were asked for")
        segment: _Segment = self._tips[source]
        while segment.parent is not None and segment.start >= tokens:
            segment = segment.parent
        if segment.end > tokens:
            segment = self._split(segment, tokens)
        segment.holders += 1
        self._tips[target] = segment

    def release(self, sequence: int) -> int:
        """The sequence holds nothing any more; how many cells became free."""
        segment = self._tips.pop(sequence, None)
        freed = 0
        while segment is not None:
            segment.holders -= 1
            if segment.holders:
                break
            freed += segment.end - segment.start
            segment = segment.parent
        self.used -= freed
        return freed

    def check_integrity(self) -> None:
        """Raise AssertionError where counts do not follow from the segments that sequences stand on."""
        holders: dict[int, int] = {}
        segments: dict[int, _Segment] = {}
        for tip in self._tips.values():
            holders[id(tip)] = holders.get(id(tip), 0) + 1
            segment: _Segment | None = tip
            while segment is not None and id(segment) not in segments:
                segments[id(segment)] = segment
                if segment.parent is not None:
                    holders[id(segment.parent)] = holders.get(id(segment.parent), 0) + 1
                segment = segment.parent
        for key, segment in segments.items():
            if segment.holders != holders[key]:
                raise AssertionError(f"[{segment.start}, {segment.end}) counts {segment.holders} holders")
            if segment.start != (segment.parent.end if segment.parent is not None else 0):
                raise AssertionError(f"[{segment.start}, {segment.end}) does not continue its parent")
        used = sum(segment.end - segment.start for segment in segments.values())
        if used != self.used or used > self.cells:
            raise AssertionError(f"{used} cells are held, {self.used} counted, {self.cells} exist")

    @staticmethod
    def _split(segment: _Segment, at: int) -> _Segment:
        """Cut a segment in two; the upper one is returned, the lower one keeps its identity and holders."""
        upper = _Segment(segment.parent, segment.start, at, holders=1)
        segment.parent, segment.start = upper, at
        return upper

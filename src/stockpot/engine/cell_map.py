"""Which cell of the context holds which position of which sequences.

ik_llama.cpp takes the lowest run of free cells that holds a whole batch, one after the other; this is the
same rule in Python. The fake driver allocates by it, the real one foresees by it what the library will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.driver import Span

Cells = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that the same sequences hold, at adjoining positions: what can move as one."""

    span: Span
    holders: tuple[int, ...]


class CellMap:
    """Sequence s holds the positions [0, len(held[s])), position p in cell held[s][p]."""

    def __init__(self, *, cells: int, sequences: int) -> None:
        self.size = cells
        self.holders: NDArray[np.int32] = np.zeros(cells, dtype=np.int32)
        self._held: list[Cells] = [np.zeros(0, dtype=np.int64) for _ in range(sequences)]

    def used(self) -> int:
        return int(np.count_nonzero(self.holders))

    def held(self, sequence: int) -> Cells:
        """The cells of a sequence, by position. Not to be written to."""
        return self._held[sequence]

    def lowest(self, count: int) -> Cells | None:
        """The lowest `count` free cells, wherever they are; None where there are fewer."""
        free = np.flatnonzero(self.holders == 0)
        return free[:count] if len(free) >= count else None

    def lowest_run(self, count: int) -> Cells | None:
        """The lowest run of `count` adjoining free cells; None where there is none."""
        free = np.flatnonzero(self.holders == 0)
        if len(free) < count:
            return None
        starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        return free[starts[0] : starts[0] + count] if len(starts) else None

    def append(self, sequence: int, places: Cells) -> None:
        """The sequence goes on in these cells, which were free."""
        self.holders[places] += 1
        self._held[sequence] = np.concatenate((self._held[sequence], places))

    def share(self, source: int, target: int, span: Span) -> None:
        """`target`, which ends where the span starts, goes on in the cells `source` has there."""
        self.append(target, self._held[source][span.start : span.end])

    def cut(self, sequence: int, start: int) -> None:
        self.holders[self._held[sequence][start:]] -= 1
        self._held[sequence] = self._held[sequence][:start].copy()

    def clear(self) -> None:
        self.holders[:] = 0
        self._held = [np.zeros(0, dtype=np.int64) for _ in self._held]

    def lift(self, group: Group) -> None:
        """The cells of the group are free; its sequences are not to be used until it has landed."""
        self.holders[self._held[group.holders[0]][group.span.start : group.span.end]] = 0

    def land(self, group: Group, places: Cells) -> None:
        """A lifted group now lies in `places`, in the order of its positions."""
        self.holders[places] = len(group.holders)
        for sequence in group.holders:
            self._held[sequence][group.span.start : group.span.end] = places

    def missed_by_pages(self, page: int, placed: Cells) -> bool:
        """Whether ik_llama.cpp, as its wheel is, would overlook used cells once `placed` are used too.

        It looks at the last cell of each page, highest first; from the first that is used it searches the
        next page for the end. Used cells higher up are not seen, where that many pages end in free cells.
        """
        used = self.holders > 0
        used[placed] = True
        end = int(np.flatnonzero(used)[-1]) + 1
        ends = np.flatnonzero(used[page - 1 :: page])
        return end > (page if not len(ends) else (int(ends[-1]) + 2) * page)

    def gaps_below(self, placed: Cells) -> int:
        """Free cells below the highest used one once `placed` are used too."""
        last = np.flatnonzero(self.holders)[-1:]
        end = int(max(last.max(initial=-1), placed.max(initial=-1))) + 1
        return end - self.used() - len(placed)

    def first_hole(self) -> int:
        """The lowest free cell; `size` where none is free."""
        free = np.flatnonzero(self.holders == 0)
        return int(free[0]) if len(free) else self.size

    def groups_above(self, cell: int) -> Iterator[Group]:
        """The used cells above `cell`, as groups, each once."""
        seen = np.zeros(self.size, dtype=np.bool_)
        seen[:cell] = True
        member = np.zeros((len(self._held), self.size), dtype=np.bool_)
        for sequence, held in enumerate(self._held):
            member[sequence, held] = True
        for held in self._held:
            fresh = ~seen[held]
            if not fresh.any():
                continue
            columns = member[:, held]
            changes = np.any(columns[:, 1:] != columns[:, :-1], axis=0) | (fresh[1:] != fresh[:-1])
            edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(held)]
            for start, end in pairwise(edges):
                if fresh[start]:
                    yield Group(Span(start, end), tuple(np.flatnonzero(columns[:, start]).tolist()))
            seen[held] = True

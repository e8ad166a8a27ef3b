"""One partition's vectors, all compared: exact, and quick enough for some ten thousand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stockpot.recall.vectors.embedder import Vectors
from stockpot.recall.vectors.index import Near

_SHRINKS_FROM = 64
"""Rows; arrays smaller than that are not worth making smaller."""


class NumpyPartition:
    """Not for several threads at once. Rows lie in one array that doubles, and halves when three quarters are
    free; what is removed is replaced by the last. About 2 kB with one vector of 384 dimensions: where
    conversations must be the same, most partitions have one."""

    __slots__ = ("_keys", "_matrix", "_rows")

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._rows: dict[bytes, int] = {}
        self._matrix: Vectors = np.empty((0, 0), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def add(self, key: bytes, vector: Vectors) -> bool:
        """Whether it is new; the same key again replaces. One of another length than those that are there
        cannot be compared with them, and is left out."""
        if self._keys and len(vector) != self._matrix.shape[1]:
            return False
        row = self._rows.get(key)
        is_new = row is None
        if row is None:
            row = len(self._keys)
            if row >= len(self._matrix) or not row:
                self._resize(max(1, 2 * row), len(vector))
            self._keys.append(key)
        else:
            del self._rows[key]  # it is the latest again
        self._rows[key] = row
        self._matrix[row] = vector
        return is_new

    def remove(self, key: bytes) -> bool:
        row = self._rows.pop(key, None)
        if row is None:
            return False
        last = self._keys.pop()
        if last != key:
            self._keys[row] = last
            self._rows[last] = row
            self._matrix[row] = self._matrix[len(self._keys)]
        if len(self._matrix) >= _SHRINKS_FROM and 4 * len(self._keys) <= len(self._matrix):
            self._resize(len(self._matrix) // 2, self._matrix.shape[1])
        return True

    def remove_oldest(self) -> bool:
        """Of what is there, what came first."""
        return bool(self._rows) and self.remove(next(iter(self._rows)))

    def search(self, vector: Vectors, count: int) -> Sequence[Near]:
        """The nearest, nearest first; of those equally near the earlier row."""
        rows = len(self._keys)
        if not rows or len(vector) != self._matrix.shape[1]:
            return ()
        similar = self._matrix[:rows] @ vector
        if rows > count:
            best = np.argpartition(similar, rows - count)[rows - count :]
            best = best[np.lexsort((best, -similar[best]))]
        else:
            best = np.argsort(-similar, kind="stable")
        return [Near(self._keys[row], float(similar[row])) for row in map(int, best)]

    def vectors(self) -> tuple[list[bytes], Sequence[Vectors]]:
        """A copy of all of it, what came first first: keys, and a row for each."""
        return list(self._rows), list(self._matrix[list(self._rows.values())])

    def _resize(self, rows: int, width: int) -> None:
        resized = np.empty((rows, width), dtype=np.float32)
        kept = len(self._keys)
        if kept:
            resized[:kept] = self._matrix[:kept]
        self._matrix = resized

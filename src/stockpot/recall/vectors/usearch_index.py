"""One big partition's vectors: a graph of near ones (HNSW, Malkov and Yashunin 2018) over 8-bit copies, whose
candidates are compared again exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stockpot.recall.vectors.embedder import Vectors
from stockpot.recall.vectors.index import Near
from stockpot.recall.vectors.runtime import onnx_runtime

_CANDIDATES = 8
"""Times as many are taken from the graph as are wanted: 8 bits misplace neighbours, and those compared again
are nearly free."""
_CONNECTIONS = 16
_EFFORT_ADDING = 128
_EFFORT_SEARCHING = 128
_WORN_FROM = 1_000
_THREADS = 1
"""Of the library's own: the other processors are the engine's."""


class UsearchPartition:
    """Not for several threads at once. Keeps the exact vectors too (half precision); about 2.5 kB a vector of
    384 dimensions in all. The library lets other threads run while it works."""

    def __init__(self, dimensions: int) -> None:
        # ONNX Runtime first: the process dies where it is loaded after usearch (2.26 and 1.32, Linux), by
        # whoever it is.
        onnx_runtime()
        from usearch.index import Index

        index: Any = Index  # has no types worth the name
        self._dimensions = dimensions
        self._graph: Any = index(
            ndim=dimensions,
            metric="cos",
            dtype="i8",
            connectivity=_CONNECTIONS,
            expansion_add=_EFFORT_ADDING,
            expansion_search=_EFFORT_SEARCHING,
        )
        self._labels: dict[bytes, int] = {}
        # By label: the key and the exact vector.
        self._exact: dict[int, tuple[bytes, NDArray[np.float16]]] = {}
        self._next = 0
        self._gone = 0

    def __len__(self) -> int:
        return len(self._labels)

    def __contains__(self, key: object) -> bool:
        return key in self._labels

    def add(self, key: bytes, vector: Vectors) -> bool:
        """Whether it is new; the same key again replaces. One of another length is left out."""
        if len(vector) != self._dimensions:
            return False
        is_new = not self.remove(key)
        self.add_new([key], [vector])
        return is_new

    def add_new(self, keys: Sequence[bytes], vectors: Sequence[NDArray[Any]]) -> None:
        """Many at once, none of which is there; takes some 0.1 ms each."""
        rows = np.stack(vectors).astype(np.float32)
        labels = np.arange(self._next, self._next + len(keys), dtype=np.uint64)
        self._next += len(keys)
        self._graph.add(labels, rows, threads=_THREADS)
        for key, label, vector in zip(keys, labels.tolist(), rows, strict=True):
            self._labels[key] = label
            self._exact[label] = key, vector.astype(np.float16)

    def remove(self, key: bytes) -> bool:
        # It stays in the graph, where ways to others lead over it: the library would give its place to the
        # next, which is somewhere else (measured: then 4 in 100 of the nearest are missed).
        label = self._labels.pop(key, None)
        if label is None:
            return False
        del self._exact[label]
        self._gone += 1
        return True

    @property
    def is_worn(self) -> bool:
        """So much of the graph is gone that it is better made anew."""
        return 2 * self._gone > max(len(self._labels), _WORN_FROM)

    def vectors(self) -> tuple[list[bytes], Sequence[NDArray[Any]]]:
        """All of it, what came first first: keys, and a row for each."""
        return list(self._labels), [self._exact[label][1] for label in self._labels.values()]

    def remove_oldest(self) -> bool:
        """Of what is there, what came first."""
        return bool(self._labels) and self.remove(next(iter(self._labels)))

    def search(self, vector: Vectors, count: int) -> Sequence[Near]:
        """The nearest, nearest first; now and then one of them is missed."""
        if not self._labels or len(vector) != self._dimensions:
            return ()
        wanted = count * _CANDIDATES
        while True:
            found = self._graph.search(vector, wanted, threads=_THREADS)
            candidates = [self._exact[label] for label in found.keys.tolist() if label in self._exact]
            if len(candidates) >= min(count, len(self._labels)) or wanted >= len(self._graph):
                break
            wanted *= 4  # what is gone lies around here
        if not candidates:
            return ()
        similar = np.stack([exact for _, exact in candidates]).astype(np.float32) @ vector
        best = np.argsort(-similar, kind="stable")[:count]
        return [Near(candidates[row][0], float(similar[row])) for row in map(int, best)]

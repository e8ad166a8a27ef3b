"""The seam to the search for questions that are near: approximate, and never the store of truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Near:
    """An entry's key and the cosine of its question with the one that is asked."""

    key: bytes
    similarity: float


class VectorIndex(ABC):
    """Vectors by partition; what is in one is never found from another. On the event loop, nothing blocks it.

    Bounded by the store: what the store has lost is removed here when it is found missing. An index out of
    reach finds nothing, and counts that.
    """

    @property
    def lasts(self) -> bool:
        """Whether what was added is there after a restart."""
        return False

    async def start(self) -> None:  # noqa: B027  nothing to do is a way to do it
        """Bring it up. Raises StockpotError where the operator must act."""

    async def close(self) -> None:  # noqa: B027
        """Let go. Idempotent."""

    @abstractmethod
    async def add(self, partition: bytes, key: bytes, vector: NDArray[np.float32]) -> None:
        """From now on found. The same key again replaces."""

    @abstractmethod
    async def search(self, partition: bytes, vector: NDArray[np.float32], count: int) -> Sequence[Near]:
        """The nearest of the partition, nearest first."""

    @abstractmethod
    async def remove(self, partition: bytes, key: bytes) -> None:
        """No longer found. Harmless where it is not there."""

    async def settled(self) -> None:  # noqa: B027
        """Until what was added lies as it will be searched from now on. Benchmarks wait for it."""

    @abstractmethod
    def __len__(self) -> int:
        """Vectors here; of a shared index as last known."""

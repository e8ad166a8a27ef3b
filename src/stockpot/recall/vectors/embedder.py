"""The seam to what turns texts into vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


class Embedder(ABC):
    """Unit vectors of texts, the nearer the more alike they mean. On the event loop; the work is done off it,
    in batches of what is asked at one time."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Which vectors these are: those of another name are never compared with them."""

    @property
    @abstractmethod
    def dimensions(self) -> int | None:
        """None: not known before the first text."""

    def fits(self, text: str) -> bool:
        """Whether a vector stands for all of the text. True where that is not known to be false; cheap."""
        del text
        return True

    async def start(self) -> None:  # noqa: B027  nothing to do is a way to do it
        """Bring it up. Raises StockpotError where it cannot be."""

    async def close(self) -> None:  # noqa: B027
        """Let go. Idempotent."""

    @abstractmethod
    async def embed(self, texts: Sequence[str]) -> Vectors:
        """One row for each text. Raises StockpotError; a caller in a hurry cancels."""

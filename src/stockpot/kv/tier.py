"""The seam to a place where KV blocks are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod

from stockpot.kv.block import BlockId


class Tier(ABC):
    """Keeps the bytes of blocks by id, up to a capacity in bytes.

    A tier decides nothing: what goes when it is full is the store's decision. A miss is None, never an
    error; a tier that fails degrades to misses. One thread uses a tier.
    """

    name: str
    capacity_bytes: int

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of all blocks held."""

    @abstractmethod
    def get(self, block: BlockId) -> bytes | None:
        """The bytes of a block, or None."""

    @abstractmethod
    def put(self, block: BlockId, data: bytes) -> bool:
        """Keep `data`; False (and nothing changed) where it does not fit the free capacity.
        A block that is there already stays as it is."""

    @abstractmethod
    def drop(self, block: BlockId) -> int:
        """Forget a block; the bytes that became free, 0 for a block that is not there."""

    @abstractmethod
    def __contains__(self, block: object) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...

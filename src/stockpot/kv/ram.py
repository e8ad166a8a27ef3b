"""The RAM tier: blocks as immutable bytes in this process."""

from __future__ import annotations

from stockpot.kv.block import BlockId
from stockpot.kv.tier import Tier


class RamTier(Tier):
    """A dictionary with a byte budget. Payload bytes are counted; the dictionary's own cost (about 200
    bytes a block, beside blocks of a megabyte) is not."""

    name = "ram"

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"the capacity of the RAM tier cannot be {capacity_bytes} bytes")
        self.capacity_bytes = capacity_bytes
        self._blocks: dict[BlockId, bytes] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def get(self, block: BlockId) -> bytes | None:
        return self._blocks.get(block)

    def put(self, block: BlockId, data: bytes) -> bool:
        if block in self._blocks:
            return True
        if self._used_bytes + len(data) > self.capacity_bytes:
            return False
        self._blocks[block] = data
        self._used_bytes += len(data)
        return True

    def drop(self, block: BlockId) -> int:
        data = self._blocks.pop(block, None)
        if data is None:
            return 0
        self._used_bytes -= len(data)
        return len(data)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def check_integrity(self) -> None:
        """Raise AssertionError where the count of bytes is not that of the blocks held."""
        held = sum(len(data) for data in self._blocks.values())
        if held != self._used_bytes or held > self.capacity_bytes:
            raise AssertionError(
                f"RAM tier holds {held} bytes, counts {self._used_bytes}, may {self.capacity_bytes}"
            )

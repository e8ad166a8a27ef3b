"""The RAM tier: blocks as immutable bytes in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from stockpot.kv.block import BlockId
from stockpot.kv.tier import Block, BlockHead, Location, Refused, Tier, TierStats, Unkept, Wanted


class RamTier(Tier):
    """A dictionary with a byte budget. It decides nothing: what goes when it is full is the store's decision.
    Payload bytes are counted; heads and the dictionary's own cost (about two kilobytes a block, beside blocks
    of megabytes) are not.
    """

    name = "ram"

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"the capacity of the RAM tier cannot be {capacity_bytes} bytes")
        self.capacity_bytes = capacity_bytes
        self._blocks: dict[BlockId, Block] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def get(self, block: BlockId) -> bytes | None:
        """The bytes of one block."""
        found = self._blocks.get(block)
        return None if found is None else found.data

    def locate(self, wanted: Sequence[Wanted]) -> list[Location]:
        """Whole blocks alone: the prefix tree finds more."""
        run: list[Location] = []
        for place in wanted:
            block = self._blocks.get(place.id)
            if block is None:
                break
            run.append(Location(place.id, place.start, place.tokens, len(block.data)))
        return run

    def read(self, ids: Sequence[BlockId]) -> Iterator[Block | Refused]:
        for block in ids:
            yield self._blocks.get(block) or Refused(block, "absent")

    def write(self, blocks: Sequence[Block]) -> list[Unkept | None]:
        return [self._put(block) for block in blocks]

    def replace(self, block: Block) -> None:
        """Give a block that is there another head; its bytes are the same."""
        self._blocks[block.head.id] = block

    def drop(self, ids: Sequence[BlockId]) -> int:
        dropped = [block for each in ids if (block := self._blocks.pop(each, None)) is not None]
        self._used_bytes -= sum(len(block.data) for block in dropped)
        return len(dropped)

    def drop_where(self, unwanted: Callable[[BlockHead], bool], cause: str) -> int:
        del cause  # the store counts
        return self.drop([each.head.id for each in self._blocks.values() if unwanted(each.head)])

    def stats(self) -> TierStats:
        return TierStats(self.name, self.capacity_bytes, self._used_bytes, len(self._blocks))

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def check_integrity(self) -> None:
        """Raise AssertionError where the count of bytes is not that of the blocks held."""
        held = sum(len(block.data) for block in self._blocks.values())
        if held != self._used_bytes:
            raise AssertionError(f"RAM tier holds {held} bytes and counts {self._used_bytes}")

    def _put(self, block: Block) -> Unkept | None:
        if block.head.id in self._blocks:
            return None
        if self._used_bytes + len(block.data) > self.capacity_bytes:
            return "full"
        self._blocks[block.head.id] = block
        self._used_bytes += len(block.data)
        return None

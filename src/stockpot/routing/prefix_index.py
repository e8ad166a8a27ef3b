"""What one backend has told of its prefix cache: the blocks it holds, found by the tokens that lead to them.

A block is known here by a chain of its own, chain = H(chain before, token ids), so that prompts are looked up
without knowing how the backend names its blocks; its names are kept to follow what it says of them. H is
Python's hash of bytes, which is keyed for this process: fast, and nobody outside can make two prompts meet.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

BlockName = int
"""A backend's hash of a block, or the low 64 bits of it."""

TOKEN_BYTES = 4
PLACES_MAX = 16
ADAPTERS_MAX = 256
_PLACE_MASK = (1 << PLACES_MAX) - 1


class TokenChain:
    """A prompt, hashed block by block as far as somebody asks; one for all backends and block sizes."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """Raises OverflowError or TypeError for what cannot be token ids (0 to 2^32 - 1)."""
        self._data = array("I", tokens).tobytes()
        self._chains: dict[tuple[int, str], list[int]] = {}

    def block(self, index: int, block_tokens: int, adapter: str) -> int | None:
        """The chain of a block; None: the prompt has no such whole block. Indices are asked for in order."""
        key = (block_tokens, adapter)
        chain = self._chains.get(key)
        if chain is None:
            chain = self._chains[key] = []
        if index < len(chain):
            return chain[index]
        size = block_tokens * TOKEN_BYTES
        data = self._data[index * size : (index + 1) * size]
        if len(data) < size:
            return None
        chain.append(_link(chain[-1] if chain else _root(adapter), data))
        return chain[-1]


@dataclass(frozen=True, slots=True)
class IndexStats:
    """A snapshot. Counts since the start: `orphans` are blocks behind one that is not known, `refused` those
    of another block size or of a shape that means nothing."""

    blocks: int
    orphans: int
    refused: int
    evicted: int
    cleared: int


class PrefixIndex:
    """The blocks of one backend, at most `blocks_max`; those matched or told of least recently go first.

    A block may be in several places at once (memory, disk; also parts of the model with caches of their own),
    and counts as cached until it has left the last. The first block size that is told of is the one followed.
    """

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        # Name -> chain and, in the low bits, the places it is in: one int, since there are very many.
        self._blocks: dict[BlockName, int] = {}
        # Chain -> name, or names where the backend holds the same tokens several times (a scope for each
        # tenant). Least recently used first. Both say the same at any time.
        self._names: dict[int, BlockName | set[BlockName]] = {}
        self._places: dict[object, int] = {}
        self._adapters: set[str] = set()
        self._block_tokens: int | None = None
        self._orphans = self._refused = self._evicted = self._cleared = 0

    @property
    def block_tokens(self) -> int | None:
        """Tokens of a block; None until one is told of."""
        return self._block_tokens

    def __len__(self) -> int:
        return len(self._blocks)

    def limit(self, blocks_max: int) -> None:
        """Hold no more than this many blocks from now on."""
        self._blocks_max = blocks_max
        self._evict()

    def stored(
        self,
        names: Sequence[BlockName],
        parent: BlockName | None,
        tokens: Sequence[int],
        block_tokens: int,
        *,
        place: object = None,
        adapter: str = "",
    ) -> None:
        """Blocks that adjoin are in `place` now. Raises OverflowError or TypeError for no token ids."""
        data = array("I", tokens).tobytes()
        size = block_tokens * TOKEN_BYTES
        if block_tokens < 1 or len(data) != size * len(names):
            self._refused += len(names)
            return
        if self._block_tokens is None:
            self._block_tokens = block_tokens
        if block_tokens != self._block_tokens:
            self._refused += len(names)
            return
        if parent is None:
            chain = _root(self._adapter(adapter))
        elif (known := self._blocks.get(parent)) is not None:
            chain = known >> PLACES_MAX
        else:
            self._orphans += len(names)
            return
        bit = self._place(place)
        for index, name in enumerate(names):
            chain = _link(chain, data[index * size : (index + 1) * size])
            self._hold(name, chain, bit)
        self._evict()

    def removed(self, names: Sequence[BlockName], *, place: object = None) -> None:
        """These have left `place`; some may never have been told of."""
        bit = self._places.get(place)
        if bit is None:
            return
        for name in names:
            held = self._blocks.get(name)
            if held is None:
                continue
            left = held & ~bit
            if left & _PLACE_MASK:
                self._blocks[name] = left
            else:
                self._drop(name)

    def clear(self) -> None:
        """Nothing is known any more."""
        self._cleared += 1
        self._blocks.clear()
        self._names.clear()
        self._places.clear()
        self._adapters.clear()
        self._block_tokens = None

    def match(self, prompt: TokenChain, model: str = "") -> int:
        """How many tokens from the beginning of the prompt are cached. `model` as the backend calls it: where
        that is an adapter's name, its blocks are meant."""
        size = self._block_tokens
        if size is None:
            return 0
        adapter = model if model in self._adapters else ""
        found: list[int] = []
        while (chain := prompt.block(len(found), size, adapter)) is not None and chain in self._names:
            found.append(chain)
        # From the end, so that a beginning is always fresher than what hangs on it.
        for chain in reversed(found):
            self._names[chain] = self._names.pop(chain)
        return len(found) * size

    def stats(self) -> IndexStats:
        return IndexStats(len(self._blocks), self._orphans, self._refused, self._evicted, self._cleared)

    def check_integrity(self) -> None:
        """Raises AssertionError where the two maps disagree; for tests."""
        named: dict[BlockName, int] = {}
        for chain, names in self._names.items():
            for name in names if isinstance(names, set) else (names,):
                assert name not in named, f"block {name} stands behind two chains"
                named[name] = chain
        assert named == {name: held >> PLACES_MAX for name, held in self._blocks.items()}
        assert all(held & _PLACE_MASK for held in self._blocks.values())

    def _hold(self, name: BlockName, chain: int, bit: int) -> None:
        held = self._blocks.get(name)
        if held is not None and held >> PLACES_MAX == chain:
            self._blocks[name] = held | bit
            self._names[chain] = self._names.pop(chain)
            return
        if held is not None:
            self._drop(name)  # the name means other tokens now
        self._blocks[name] = (chain << PLACES_MAX) | bit
        others = self._names.pop(chain, None)
        if others is None:
            self._names[chain] = name
        elif isinstance(others, set):
            others.add(name)
            self._names[chain] = others
        else:
            self._names[chain] = {others, name}

    def _drop(self, name: BlockName) -> None:
        chain = self._blocks.pop(name) >> PLACES_MAX
        names = self._names[chain]
        if isinstance(names, set) and len(names) > 1:
            names.discard(name)
        else:
            del self._names[chain]

    def _evict(self) -> None:
        while len(self._blocks) > self._blocks_max:
            names = self._names.pop(next(iter(self._names)))
            for name in names if isinstance(names, set) else (names,):
                del self._blocks[name]
                self._evicted += 1

    def _place(self, place: object) -> int:
        """The bit of a place. Backends have a handful; should one name very many, the last share a bit."""
        bit = self._places.get(place)
        if bit is None:
            bit = 1 << min(len(self._places), PLACES_MAX - 1)
            if len(self._places) < 4 * PLACES_MAX:
                self._places[place] = bit
        return bit

    def _adapter(self, name: str) -> str:
        if len(self._adapters) < ADAPTERS_MAX and name:
            self._adapters.add(name)
        return name


def _root(adapter: str) -> int:
    return hash(("", adapter))


def _link(chain: int, data: bytes) -> int:
    return hash((chain, data))

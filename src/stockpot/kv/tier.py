"""The seam to a place where KV blocks are kept, and what goes through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stockpot.events import CacheTier
from stockpot.kv.block import BlockId, ContentHash, TokenKey

Refusal = Literal[
    "absent",  # not there (any more)
    "truncated",  # shorter than its head says, or no head
    "version",  # an envelope this version does not read
    "checksum",  # bytes changed, no secret is configured
    "mac",  # bytes changed, or written by somebody without the secret
    "cipher",  # encrypted and cannot be decrypted here, or the other way round
    "id",  # the envelope of another block
    "model",  # computed by other weights
    "layout",  # stored in another layout
    "tokens",  # its tokens are not those its id stands for
    "invalidated",  # somebody invalidated it after it was written
    "expired",  # older than it may be
    "timeout",  # the tier did not answer in time
    "down",  # the tier is not asked at the moment (circuit breaker)
    "error",  # the tier failed: disk error, connection reset
]
"""Why a block that was asked for does not come. Nothing refused ever reaches the model."""

Unkept = Literal[
    "full",  # no room, and nothing may be evicted
    "busy",  # too much is being written already
    "claimed",  # another node writes this block now, or has written it
    "timeout",
    "down",
    "error",
]
"""Why a block was not written."""

REFUSED_BY_CHECK: frozenset[Refusal] = frozenset(
    {"truncated", "version", "checksum", "mac", "cipher", "id", "model", "layout", "tokens"}
)
"""Refusals that say the bytes are not what they should be; such a block is quarantined."""


@dataclass(frozen=True, slots=True)
class BlockHead:
    """What is known of a block besides its bytes. Times are Unix seconds; `epoch` is that of the last
    invalidation its computer had seen (`kv.invalidation`); `kept_until_s` a promise to a client, 0 for none.

    `aliases` are further ids it can be found under, see `kv.block.aliases`.
    """

    id: BlockId
    parent: BlockId
    start: int
    tokens: TokenKey
    content: ContentHash
    fingerprint: str
    layout: str
    tenant: str = ""
    tags: frozenset[str] = frozenset()
    epoch: int = 0
    created_s: float = 0.0
    kept_until_s: float = 0.0
    aliases: tuple[tuple[int, BlockId], ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A head and its keys and values as the driver exported them."""

    head: BlockHead
    data: bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """One place of a prompt: the block that begins at position `start` there, whole (`id`, holding `tokens`
    tokens), or one that begins with the same tokens (`aliases`, longest first)."""

    id: BlockId
    start: int
    tokens: int
    aliases: tuple[tuple[int, BlockId], ...] = ()


@dataclass(frozen=True, slots=True)
class Location:
    """A block that a tier says it has. It serves at least `tokens` tokens of the place it was wanted for."""

    id: BlockId
    start: int
    tokens: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A block that was asked for and does not come."""

    id: BlockId
    cause: Refusal
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TierStats:
    """A snapshot; counts are totals since start."""

    name: str
    capacity_bytes: int | None
    used_bytes: int
    blocks: int
    hits: int = 0
    misses: Mapping[str, int] = field(default_factory=dict[str, int])
    """By `Refusal`."""
    unkept: Mapping[str, int] = field(default_factory=dict[str, int])
    """By `Unkept`."""
    evicted: Mapping[str, int] = field(default_factory=dict[str, int])
    """Blocks by cause: `capacity`, `cleared`, `replaced`, `invalidated`, `quarantined`, ..."""
    read_bytes: int = 0
    written_bytes: int = 0
    state: str = "up"
    """up; of a tier behind a circuit breaker also `open` (not asked) and `half-open` (probing)."""


Departure = Callable[[Sequence[BlockId], str], None]
"""Told of blocks that left a tier by its own decision, and the cause. Called on the tier's thread."""


class Tier(ABC):
    """Keeps blocks by id. Never raises for a miss; a tier that fails degrades to misses, counted by cause.

    The RAM tier is used by the engine's thread alone and answers at once. Others are used by threads that may
    wait (`kv.prefetch`, `kv.write_behind`): they allow calls from several threads at once and bound the time
    of each call.
    """

    name: CacheTier

    @abstractmethod
    def locate(self, wanted: Sequence[Wanted]) -> list[Location]:
        """The longest run of blocks, from the first place on, without reading their bytes.

        `wanted` adjoin and ascend. A whole block leads on to the next place; a block found under an alias
        serves the beginning of its place and ends the run.
        """

    @abstractmethod
    def read(self, ids: Sequence[BlockId]) -> Iterable[Block | Refused]:
        """The blocks asked for, in order, each verified; may end early after a `Refused`."""

    @abstractmethod
    def write(self, blocks: Sequence[Block]) -> list[Unkept | None]:
        """Keep blocks; for each None, or why it was not kept. One that is there already stays as it is."""

    @abstractmethod
    def drop(self, ids: Sequence[BlockId]) -> int:
        """Forget blocks; how many were there."""

    @abstractmethod
    def drop_where(self, unwanted: Callable[[BlockHead], bool], cause: str) -> int:
        """Forget every block the tier can enumerate whose head is unwanted; how many. The heads given may
        lack `tokens` and `aliases`. A tier that cannot enumerate forgets nothing."""

    @abstractmethod
    def stats(self) -> TierStats:
        """A snapshot; may be called from any thread."""

    def other_owner(self, content: ContentHash) -> tuple[str, str] | None:
        """The model fingerprint and tenant of a block that ends with these tokens, where the tier knows one:
        for explanations."""
        del content
        return None

    def close(self) -> None:  # noqa: B027  most tiers have nothing to give back
        """Give back what the tier holds open. Idempotent."""

"""What becomes of blocks, said in vLLM's words: BlockStored, BlockRemoved, AllBlocksCleared as msgpack.

A batch is `[ts, [events], data_parallel_rank]`, an event a map with its name under "type"; a field that has
a default is left out where it holds it. So vLLM writes them since its pull request 42892, and routers
that follow a vLLM follow us. The names of the classes and of their fields are the wire format.

Readers keep to three rules of vLLM's. Only whole blocks are told of, since an event has one `block_size`
for all its blocks. The first block of a prompt has no parent. `medium` says where, seen from the publisher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from stockpot.kv.block import TOKEN_BYTES, BlockId, tokens_of
from stockpot.kv.tier import BlockHead

MEDIUM_GPU: Final = "GPU"
"""The memory the engine computes in. Ours are context cells, wherever the model runs: routers look for
what an engine can use at once under this word."""
MEDIUM_CPU: Final = "CPU"
MEDIUM_STORAGE: Final = "STORAGE"
LOCAL: Final = "LOCAL"
REMOTE: Final = "REMOTE"

BlockHash = bytes | int
"""A block id, or its low 64 bits as vLLM sends them unless told otherwise; see `wire_hash`."""


class BlockStored(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, tag=True):
    """Blocks that adjoin and can be found from now on, first to last."""

    block_hashes: tuple[BlockHash, ...]
    parent_block_hash: BlockHash | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    locality: str | None = None
    """LOCAL or REMOTE storage; nothing for memory."""


class BlockRemoved(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, tag=True):
    """Blocks that are no longer where `medium` says; some may never have been told of."""

    block_hashes: tuple[BlockHash, ...]
    medium: str | None
    locality: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, tag=True):
    """Nothing is left anywhere on this node."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEventBatch(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """Events that happened at `ts`, Unix seconds, in order."""

    ts: float
    events: tuple[KvEvent, ...]
    data_parallel_rank: int | None = None


def encode(batch: KvEventBatch) -> bytes:
    """The payload of one message."""
    return msgspec.msgpack.encode(batch)


def decode(payload: bytes) -> KvEventBatch:
    """The batch of a payload; fields this version does not know are skipped. Raises `msgspec.DecodeError`."""
    return msgspec.msgpack.decode(payload, type=KvEventBatch)


def medium_of(tier: str) -> tuple[str, str | None]:
    """A tier's medium and locality on the wire.

    A tier that is not named here is storage of unsaid locality, which no reader takes for memory.
    """
    match tier:
        case "context":
            return MEDIUM_GPU, None
        case "ram":
            return MEDIUM_CPU, None
        case "disk":
            return MEDIUM_STORAGE, LOCAL
        case "redis":
            return MEDIUM_STORAGE, REMOTE
        case _:
            return MEDIUM_STORAGE, None


def wire_hash(block: BlockId, *, short: bool = False) -> BlockHash:
    """The id itself, or its low 64 bits for readers that take no bytes (vLLM's default form)."""
    return int.from_bytes(block[-8:], "big") if short else block


def stored_events(
    heads: Iterable[BlockHead], *, tier: str, block_tokens: int, short_hashes: bool = False
) -> Iterator[BlockStored]:
    """Tell of blocks now kept in `tier`: one event for each run of blocks that adjoin.

    Blocks shorter than `block_tokens` are passed over. Lazy, so that `KvEventPublisher.publish` can leave
    the work to its own thread; `heads` must not change meanwhile.
    """
    run: list[BlockHead] = []
    for head in heads:
        if len(head.tokens) != block_tokens * TOKEN_BYTES:
            continue
        if run and head.parent != run[-1].id:
            yield _stored(run, tier, block_tokens, short_hashes)
            run = []
        run.append(head)
    if run:
        yield _stored(run, tier, block_tokens, short_hashes)


def removed_events(
    blocks: Iterable[BlockId], *, tier: str, short_hashes: bool = False
) -> Iterator[BlockRemoved]:
    """Tell of blocks that left `tier`; lazy, as `stored_events`."""
    medium, locality = medium_of(tier)
    hashes = tuple(wire_hash(block, short=short_hashes) for block in blocks)
    if hashes:
        yield BlockRemoved(hashes, medium, locality)


def _stored(run: list[BlockHead], tier: str, block_tokens: int, short: bool) -> BlockStored:
    medium, locality = medium_of(tier)
    first = run[0]
    return BlockStored(
        block_hashes=tuple(wire_hash(head.id, short=short) for head in run),
        # The root of a scope is the parent of a first block for us; nobody was told of a block of that id.
        parent_block_hash=wire_hash(first.parent, short=short) if first.start else None,
        token_ids=tuple(token for head in run for token in tokens_of(head.tokens).tolist()),
        block_size=block_tokens,
        lora_id=None,
        medium=medium,
        lora_name=None,
        locality=locality,
    )

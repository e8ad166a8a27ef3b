"""Reads batches of KV events as any version of vLLM writes them, or Stockpot, and applies them to an index.

Events are maps with their name under "type", or arrays that begin with it (vLLM before its pull request
42892). Fields and kinds of event that are not known here are passed over.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from stockpot.kv.kv_events import REMOTE, BlockHash
from stockpot.routing.prefix_index import PrefixIndex

_LOW_64: Final = (1 << 64) - 1


class _Stored(msgspec.Struct, frozen=True, gc=False, tag="BlockStored"):
    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: Any = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class _Removed(msgspec.Struct, frozen=True, gc=False, tag="BlockRemoved"):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _Cleared(msgspec.Struct, frozen=True, gc=False, tag="AllBlocksCleared"):
    pass


class _StoredArray(_Stored, frozen=True, gc=False, tag="BlockStored", array_like=True):
    pass


class _RemovedArray(_Removed, frozen=True, gc=False, tag="BlockRemoved", array_like=True):
    pass


class _ClearedArray(_Cleared, frozen=True, gc=False, tag="AllBlocksCleared", array_like=True):
    pass


class _Batch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]


_KNOWN: Final = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})


class BatchReader:
    """Applies payloads to an index. `unknown` counts events of other kinds."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._batch = msgspec.msgpack.Decoder(_Batch)
        self._map = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared)
        self._array = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
        self.unknown = 0

    def time_of(self, payload: bytes) -> float:
        """When the batch happened, Unix seconds of its publisher. Raises `msgspec.DecodeError`."""
        return self._batch.decode(payload).ts

    def apply(self, payload: bytes) -> None:
        """Bring the index up to date. Raises `msgspec.DecodeError`, OverflowError or TypeError for bytes that
        are no batch; events before the faulty one have been applied then."""
        for raw in self._batch.decode(payload).events:
            data = bytes(raw)
            decoder = self._map if _is_map(data) else self._array
            try:
                event = decoder.decode(data)
            except msgspec.ValidationError:
                if _kind(data) in _KNOWN:
                    raise
                self.unknown += 1
                continue
            self._apply(event)

    def _apply(self, event: _Stored | _Removed | _Cleared) -> None:
        match event:
            case _Cleared():
                self._index.clear()
            case _ if event.locality == REMOTE:
                pass  # a store that nodes share is as near to every one of them
            case _Removed():
                self._index.removed(_names(event.block_hashes), place=(event.medium, event.group_idx))
            case _Stored():
                parent = event.parent_block_hash
                self._index.stored(
                    _names(event.block_hashes),
                    None if parent is None else _name(parent),
                    event.token_ids,
                    event.block_size,
                    place=(event.medium, event.group_idx),
                    adapter=event.lora_name or ("" if event.lora_id is None else str(event.lora_id)),
                )


def _names(hashes: list[BlockHash]) -> list[int]:
    return [_name(one) for one in hashes]


def _name(block: BlockHash) -> int:
    """Low 64 bits: what vLLM sends unless told otherwise, and little enough to keep very many."""
    return block & _LOW_64 if isinstance(block, int) else int.from_bytes(block[-8:], "big")


def _is_map(data: bytes) -> bool:
    return bool(data) and (data[0] & 0xF0 == 0x80 or data[0] in (0xDE, 0xDF))


def _kind(data: bytes) -> object:
    """The name an event gives itself; None where it gives none."""
    match msgspec.msgpack.decode(data):
        case {"type": str(kind)}:
            return kind
        case [str(kind), *_]:
            return kind
        case _:
            return "BlockStored"  # no event at all: as bad as a broken one that is known

"""What stands in Redis under which key: blocks in chunks, and a directory of what can be found.

    PREFIX:b:ID:N   chunk N of the envelope of block ID
    PREFIX:a:ID     directory entry: which block holds the tokens that ID stands for, and how long it is
    PREFIX:w:ID     somebody writes block ID now

A block has an entry under its own id and under each of its aliases. An entry is untrusted: it is decoded
strictly and decides only what is asked for next; what then comes is verified by `kv.envelope`.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from stockpot.kv.block import ID_BYTES, BlockId

_MOST_TOKENS = 2**20
_MOST_CHUNKS = 4096


class _Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """As it is written. Another order or another field: another `_VERSION`."""

    version: int
    block: bytes
    start: int
    tokens: int
    size_bytes: int
    chunks: int


_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A block in Redis: `tokens` from position `start` on, its envelope of `size_bytes` in `chunks` values
    that are equally long (the last may be shorter)."""

    block: BlockId
    start: int
    tokens: int
    size_bytes: int
    chunks: int

    @property
    def chunk_bytes(self) -> int:
        return -(-self.size_bytes // self.chunks)

    def encode(self) -> bytes:
        """As it stands in Redis."""
        return msgspec.msgpack.encode(
            _Entry(_VERSION, self.block, self.start, self.tokens, self.size_bytes, self.chunks)
        )


def decode_entry(data: object, *, largest_bytes: int) -> Entry | None:
    """An entry as Redis gave it; None where it is none, or where its numbers cannot be those of a block of at
    most `largest_bytes`."""
    if not isinstance(data, bytes):
        return None
    try:
        raw = msgspec.msgpack.decode(data, type=_Entry)
    except msgspec.DecodeError:
        return None
    sound = (
        raw.version == _VERSION
        and len(raw.block) == ID_BYTES
        and 0 <= raw.start <= 2**40
        and 1 <= raw.tokens <= _MOST_TOKENS
        and 1 <= raw.size_bytes <= largest_bytes
        and 1 <= raw.chunks <= min(_MOST_CHUNKS, raw.size_bytes)
    )
    # The last chunk must not be empty: else two chunk counts would describe the same values.
    if not sound or (raw.chunks - 1) * -(-raw.size_bytes // raw.chunks) >= raw.size_bytes:
        return None
    return Entry(BlockId(raw.block), raw.start, raw.tokens, raw.size_bytes, raw.chunks)


class Keys:
    """The keys of one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()

    def entry(self, block: BlockId) -> bytes:
        return b"%b:a:%b" % (self._prefix, block.hex().encode())

    def claim(self, block: BlockId) -> bytes:
        return b"%b:w:%b" % (self._prefix, block.hex().encode())

    def chunks(self, entry: Entry) -> list[bytes]:
        block = entry.block.hex().encode()
        return [b"%b:b:%b:%d" % (self._prefix, block, n) for n in range(entry.chunks)]

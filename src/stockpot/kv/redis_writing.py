"""How blocks get into Redis: claimed by one writer, chunks first, directory entries last."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from stockpot.clock import Clock
from stockpot.kv.block import TOKEN_BYTES
from stockpot.kv.envelope import Sealer
from stockpot.kv.redis_connection import failure_of
from stockpot.kv.redis_directory import Entry, Keys, decode_entry
from stockpot.kv.resp import LEAST_BYTES_PER_S, Command, ErrorReply, Reply, RespConnection
from stockpot.kv.tier import Block, BlockHead, Unkept

_CHUNKS_OUTLIVE_ENTRY_MS = 60_000
"""An entry must not outlive what it leads to."""
_LONGEST_TTL_S = 366 * 86_400
_LEAST_CLAIM_MS = 1000
_INFO_EVERY_S = 5.0
_HEAD_ALLOWANCE_BYTES = 4096
"""About what an envelope adds to keys, values and tokens; for bounds, not for lengths."""


@dataclass(frozen=True, slots=True)
class Written:
    """What became of each block of a group, and what the server objected to."""

    outcomes: list[Unkept | None]
    errors: list[ErrorReply] = field(default_factory=list[ErrorReply])

    def refuse(self, place: int, error: ErrorReply) -> None:
        """The server refused something of the block at `place`."""
        self.outcomes[place] = "full" if error.code == "OOM" else failure_of(error).cause
        self.errors.append(error)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A block whose chunks are on their way; `place` is that in its group."""

    place: int
    head: BlockHead
    entry: Entry


class RedisWriting:
    """Writes groups of blocks over a connection it is given. Any thread."""

    def __init__(
        self,
        keys: Keys,
        *,
        sealer: Sealer,
        clock: Clock,
        node: str,
        ttl_s: int,
        timeout_s: float,
        max_value_bytes: int,
        max_in_flight_bytes: int,
    ) -> None:
        self._keys = keys
        self._sealer = sealer
        self._clock = clock
        self._node = node.encode()
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._max_value_bytes = max_value_bytes
        self._max_in_flight_bytes = max_in_flight_bytes
        self._lock = threading.Lock()
        self._reserved_bytes = 0
        self._informed_s = -_INFO_EVERY_S
        self.written_blocks = 0
        self.written_bytes = 0
        self.server_used_bytes = 0
        self.server_capacity_bytes = 0

    def next_group(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """The first of `blocks` that may be in flight together, at least one."""
        total = 0
        for count, block in enumerate(blocks):
            total += _about_bytes(block)
            if count and total > self._max_in_flight_bytes:
                return blocks[:count]
        return blocks

    @contextmanager
    def reserved(self, group: Sequence[Block]) -> Generator[bool]:
        """Whether there is room for these among all that is being written now; then held until the end."""
        size = sum(map(_about_bytes, group))
        with self._lock:
            has_room = not self._reserved_bytes or self._reserved_bytes + size <= self._max_in_flight_bytes
            self._reserved_bytes += size if has_room else 0
        try:
            yield has_room
        finally:
            with self._lock:
                self._reserved_bytes -= size if has_room else 0

    def write(self, connection: RespConnection, group: Sequence[Block]) -> Written:
        """Three round trips for the whole group: claims, chunks, entries."""
        size_bytes = sum(map(_about_bytes, group))
        claim_ms = _LEAST_CLAIM_MS + int(4000 * (self._timeout_s + size_bytes / LEAST_BYTES_PER_S))
        claimed_s = self._clock.monotonic()
        written = Written(["claimed"] * len(group))
        claims: list[bytes] = []
        finish: list[Command] = []
        sent: list[_Sent] = []
        for place, (claim, found) in enumerate(self._claim(connection, group, claim_ms)):
            block = group[place]
            if isinstance(claim, ErrorReply):
                written.refuse(place, claim)
            if claim != "OK":
                continue
            claims.append(self._keys.claim(block.head.id))
            if found is not None:
                finish += self.extension(found, block.head)
            elif _about_bytes(block) > self._max_in_flight_bytes:
                written.outcomes[place] = "full"
            else:
                sent.append(self._send_chunks(connection, place, block))
        complete = [each for each in sent if self._has_arrived(connection, each, written)]
        torn = [each for each in sent if each not in complete]
        finish += [(b"UNLINK", *self._keys.chunks(each.entry)) for each in torn]
        if claims and (self._clock.monotonic() - claimed_s) * 1000 < claim_ms:
            # Later the claim may be somebody else's, and goes by itself if it is not.
            finish.append((b"UNLINK", *claims))
        self._publish(connection, complete, finish, written)
        return written

    def extension(self, entry: Entry, head: BlockHead) -> list[Command]:
        """Commands that keep a block for its time from now on; nothing is ever kept shorter by them (GT)."""
        ttl_ms = self._ttl_ms(head)
        chunks = self._keys.chunks(entry)
        return [
            *((b"PEXPIRE", key, ttl_ms + _CHUNKS_OUTLIVE_ENTRY_MS, b"GT") for key in chunks),
            *((b"PEXPIRE", key, ttl_ms, b"GT") for key in self._entry_keys(head)),
        ]

    def _claim(
        self, connection: RespConnection, group: Sequence[Block], claim_ms: int
    ) -> Iterator[tuple[Reply, Entry | None]]:
        """The reply to each block's claim, and its entry if there is one.

        The claim comes before the look at the directory. A writer sets the entry before it gives back its
        claim: so who gets the claim and sees no entry is the only writer.
        """
        commands: list[Command] = []
        for block in group:
            claim = self._keys.claim(block.head.id)
            commands.append((b"SET", claim, self._node, b"NX", b"PX", claim_ms))
            commands.append((b"GET", self._keys.entry(block.head.id)))
        replies = connection.exchange(commands)
        for claim, found in zip(replies[::2], replies[1::2], strict=True):
            yield claim, decode_entry(found, largest_bytes=self._max_in_flight_bytes)

    def _send_chunks(self, connection: RespConnection, place: int, block: Block) -> _Sent:
        sealed = self._sealer.seal(block)
        size_bytes = sum(map(len, sealed))
        head = block.head
        chunks = -(-size_bytes // self._max_value_bytes)
        entry = Entry(head.id, head.start, len(head.tokens) // TOKEN_BYTES, size_bytes, chunks)
        ttl_ms = self._ttl_ms(head) + _CHUNKS_OUTLIVE_ENTRY_MS
        connection.allow(size_bytes)
        values = zip(self._keys.chunks(entry), cut(sealed, entry.chunk_bytes), strict=True)
        connection.send([(b"SET", key, value, b"PX", ttl_ms) for key, value in values])
        return _Sent(place, head, entry)

    def _has_arrived(self, connection: RespConnection, sent: _Sent, written: Written) -> bool:
        connection.allow(sent.entry.size_bytes)
        replies = [connection.receive() for _ in range(sent.entry.chunks)]
        refused = [reply for reply in replies if isinstance(reply, ErrorReply)]
        for error in refused[:1]:
            written.refuse(sent.place, error)
        return not refused

    def _publish(
        self, connection: RespConnection, complete: Sequence[_Sent], finish: list[Command], written: Written
    ) -> None:
        """Set the entries of blocks whose chunks are all there, then finish."""
        commands: list[Command] = []
        for each in complete:
            packed, ttl_ms = each.entry.encode(), self._ttl_ms(each.head)
            commands += [(b"SET", key, packed, b"PX", ttl_ms) for key in self._entry_keys(each.head)]
        asks_info = self._clock.monotonic() - self._informed_s >= _INFO_EVERY_S
        info: list[Command] = [(b"INFO", b"memory")] if asks_info else []
        replies = iter(connection.exchange([*commands, *finish, *info]))
        for each in complete:
            first, *_ = [next(replies) for _ in self._entry_keys(each.head)]
            if isinstance(first, ErrorReply):
                written.refuse(each.place, first)
                continue
            written.outcomes[each.place] = None
            with self._lock:
                self.written_blocks += 1
                self.written_bytes += each.entry.size_bytes
        if asks_info:
            *_, memory = replies
            self._informed_s = self._clock.monotonic()
            self.server_used_bytes = _figure(memory, "used_memory")
            self.server_capacity_bytes = _figure(memory, "maxmemory")

    def _entry_keys(self, head: BlockHead) -> list[bytes]:
        """Where a block can be found, its own id first."""
        return [self._keys.entry(each) for each in (head.id, *(alias for _, alias in head.aliases))]

    def _ttl_ms(self, head: BlockHead) -> int:
        ttl_s = max(self._ttl_s, head.kept_until_s - self._clock.wall())
        return int(min(ttl_s, _LONGEST_TTL_S) * 1000)


def cut(buffers: Sequence[bytes], size_bytes: int) -> Iterator[list[memoryview]]:
    """The concatenation of `buffers` in pieces of `size_bytes` (the last may be shorter), without copying."""
    piece: list[memoryview] = []
    room = size_bytes
    for view in map(memoryview, buffers):
        while view:
            piece.append(view[:room])
            view = view[room:]
            room -= len(piece[-1])
            if not room:
                yield piece
                piece, room = [], size_bytes
    if piece:
        yield piece


def _about_bytes(block: Block) -> int:
    return len(block.data) + len(block.head.tokens) + _HEAD_ALLOWANCE_BYTES


def _figure(info: Reply, name: str) -> int:
    """One number of an answer to INFO; 0 where it is not there."""
    lines = info.decode("ascii", "replace").splitlines() if isinstance(info, bytes) else []
    for line in lines:
        key, _, value = line.partition(":")
        if key == name and value.isdecimal():
            return int(value)
    return 0

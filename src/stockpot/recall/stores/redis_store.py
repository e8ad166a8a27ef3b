"""Answers in Redis, shared by all nodes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from stockpot.clock import Clock
from stockpot.errors import ConfigurationError
from stockpot.recall.entry import Entry, Selector
from stockpot.recall.evidence.evidence import Observation
from stockpot.recall.stores import redis_scripts
from stockpot.recall.stores.backing import (
    Backing,
    Batch,
    Behind,
    Changes,
    Page,
    Position,
    StoreLost,
    Written,
    forgets,
)
from stockpot.recall.stores.packing import (
    Invalidation,
    NotPackable,
    pack_entry,
    pack_invalidation,
    pack_observation,
    unpack_entry,
    unpack_invalidation,
    unpack_observation,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

PREFIX = "stockpot:recall:"

_TIMEOUT_S = 0.25
_BULK_S = 5.0
"""What an operator waits for, or nobody."""
_KEPT_OBSERVATIONS = 100_000
_OBSERVATIONS_AT_ONCE = 5_000
_REMOVED_AT_ONCE = 200
_CONNECTIONS_MAX = 32

_T = TypeVar("_T")


class RedisBacking(Backing):
    """Redis 7 or newer, or Valkey, one primary. What is kept there is bounded by `capacity_bytes` (plus about
    a kilobyte an entry); a `maxmemory-policy` of Redis's own must not take away keys without an expiry
    (noeviction or volatile-*), or entries are forgotten by the index that invalidates them.

    Nodes' clocks may differ by what an entry may be given too long.
    """

    name = "Redis"

    def __init__(self, url: str, clock: Clock, *, capacity_bytes: int, prefix: str = PREFIX) -> None:
        """Raises ConfigurationError."""
        import redis.asyncio

        try:
            self._redis: Redis = redis.asyncio.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
                url, socket_connect_timeout=_TIMEOUT_S, max_connections=_CONNECTIONS_MAX
            )
        except ValueError:  # its words may hold a part of the password
            raise ConfigurationError(
                "recall.store does not fit; use redis://HOST:PORT/DB, rediss:// or unix://, and write what is"
                " special in a password as %XX."
            ) from None
        self._clock = clock
        self._capacity_bytes = capacity_bytes
        self._prefix = prefix
        self._origin = secrets.token_hex(8)
        self._scripts = {
            text: self._redis.register_script(text)
            for text in (redis_scripts.WRITE, redis_scripts.CHANGES, redis_scripts.LOG, redis_scripts.DROP)
        }

    async def open(self) -> None:
        await self._in_time(lambda: self._ask("PING"))

    async def close(self) -> None:
        with contextlib.suppress(OSError, self._error()):
            await self._redis.aclose()

    async def write(self, batch: Batch, position: Position, now: float) -> Written:
        lost = 0
        arguments: list[bytes | str | float] = []
        for entry in batch.entries:
            try:
                arguments += self._arguments(entry, batch.uses.get(entry.key[:16], now), now)
            except NotPackable:
                lost += 1
        observations = _packed(batch)
        uses = [value for id, at in batch.uses.items() for value in (id.hex(), at)]
        reply = await self._run(
            redis_scripts.WRITE,
            *(secrets.token_hex(8), position.incarnation, position.seq, now, self._capacity_bytes),
            *(_KEPT_OBSERVATIONS, msgspec.msgpack.encode(uses), len(observations), *observations),
            *arguments,
        )
        if reply[0] == 0:
            raise Behind
        _, head, entries, size, evicted, expired = reply
        return Written(
            Position(position.incarnation, head), entries, size, evicted=evicted, expired=expired, lost=lost
        )

    async def read(self, id: bytes) -> tuple[Entry | None, bool]:
        packed, answer = await self._in_time(lambda: self._ask("HMGET", self._key(f"e:{id.hex()}"), "e", "a"))
        entry = None if packed is None else unpack_entry(packed, answer or b"")
        return entry, packed is not None and entry is None

    async def changes(self, since: Position) -> Changes:
        born, head, rows = await self._run(redis_scripts.CHANGES, secrets.token_hex(8), since.seq)
        position = Position(born.decode(), int(head))
        if position.incarnation != since.incarnation or len(rows) != position.seq - since.seq:
            return Changes(position, None)
        found = [unpack_invalidation(row.partition(b":")[2]) for row in rows]
        return Changes(position, [each.selector for each in found if each.origin != self._origin])

    async def remove(self, selector: Selector) -> Sequence[Entry]:
        """First in the log, so that nothing older is given or written any more, then in pieces."""
        packed = pack_invalidation(Invalidation(self._origin, selector))
        await self._run(redis_scripts.LOG, secrets.token_hex(8), packed, within_s=_BULK_S)
        removed: list[Entry] = []
        ids = await self._candidates(selector)
        for start in range(0, len(ids), _REMOVED_AT_ONCE):
            piece = ids[start : start + _REMOVED_AT_ONCE]
            found = [
                (id, packed, unpack_entry(packed)) for id, packed in await self._entries(piece) if packed
            ]
            # One that cannot be read may fit: it is of no use anyway.
            gone = [(id, entry) for id, _, entry in found if entry is None or selector.fits(entry)]
            if gone:
                await self._run(redis_scripts.DROP, *(id for id, _ in gone), within_s=_BULK_S)
            removed += [entry for _, entry in gone if entry is not None]
        if selector.writer is not None:
            await self._unlearn(selector)
        return removed

    async def page(self, start: int | None, *, partitioned: bool, count: int) -> Page:
        name = self._key("parted" if partitioned else "made")
        last = "+inf" if start is None else f"({start}"
        rows = await self._in_time(
            lambda: self._ask("ZREVRANGEBYSCORE", name, last, "-inf", "WITHSCORES", "LIMIT", 0, count),
            _BULK_S,
        )
        packed = [each for _, each in await self._entries([id for id, _ in rows]) if each]
        entries = [entry for each in packed if (entry := unpack_entry(each)) is not None]
        following = int(float(rows[-1][1])) if len(rows) == count else None
        return Page(entries, len(packed) - len(entries), following)

    async def existing(self, ids: Collection[bytes]) -> set[bytes]:
        order = list(ids)
        found: set[bytes] = set()
        for start in range(0, len(order), _OBSERVATIONS_AT_ONCE):
            piece = order[start : start + _OBSERVATIONS_AT_ONCE]
            replies = await self._pipeline([("EXISTS", self._key(f"e:{id.hex()}")) for id in piece])
            found.update(id for id, there in zip(piece, replies, strict=True) if there)
        return found

    async def observations(self) -> tuple[Sequence[Observation], int]:
        packed = [each async for each in self._seen()]
        found = [each for one in packed if (each := unpack_observation(one)) is not None]
        return found, len(packed) - len(found)

    async def _unlearn(self, selector: Selector) -> None:
        packed = [each async for each in self._seen()]
        gone = [
            one
            for one in packed
            if (observation := unpack_observation(one)) is not None and forgets(selector, observation)
        ]
        for start in range(0, len(gone), _REMOVED_AT_ONCE):
            piece = gone[start : start + _REMOVED_AT_ONCE]
            await self._in_time(lambda piece=piece: self._ask("ZREM", self._key("seen"), *piece), _BULK_S)

    async def _seen(self) -> AsyncIterator[bytes]:
        after = "-inf"
        while True:
            rows = await self._in_time(
                lambda after=after: self._ask(
                    *("ZRANGEBYSCORE", self._key("seen"), after, "+inf", "WITHSCORES"),
                    *("LIMIT", 0, _OBSERVATIONS_AT_ONCE),
                ),
                _BULK_S,
            )
            for packed, _ in rows:
                yield packed
            if len(rows) < _OBSERVATIONS_AT_ONCE:
                return
            after = f"({int(float(rows[-1][1]))}"

    async def _candidates(self, selector: Selector) -> list[str]:
        if selector.id is not None:
            return [selector.id]
        facts = {"t": selector.tag, "m": selector.model, "n": selector.tenant, "w": selector.writer}
        sets = [self._key(f"i:{kind}:{value}") for kind, value in facts.items() if value is not None]
        command = ("SINTER", *sets) if sets else ("HKEYS", self._key("known"))
        return [id.decode() for id in await self._in_time(lambda: self._ask(*command), _BULK_S)]

    async def _entries(self, ids: Sequence[str | bytes]) -> list[tuple[str | bytes, bytes | None]]:
        names = [id.decode() if isinstance(id, bytes) else id for id in ids]
        replies = await self._pipeline([("HGET", self._key(f"e:{name}"), "e") for name in names])
        return list(zip(ids, replies, strict=True))

    def _arguments(self, entry: Entry, used_at: float, now: float) -> Sequence[bytes | str | float]:
        sets = [f"i:m:{entry.model}", f"i:n:{entry.tenant}", f"i:w:{entry.writer}"]
        sets += [f"i:t:{tag}" for tag in entry.tags]
        packed = pack_entry(entry)  # first: what has no bytes must not fail below
        older = pack_invalidation(Invalidation(self._origin, Selector(id=entry.id, before=entry.created_at)))
        return (
            *(entry.id, entry.size_bytes, max(1, round((entry.expires_at - now) * 1000)), entry.expires_at),
            *(used_at, msgspec.msgpack.encode(sets), int(bool(entry.partition)), packed, entry.answer, older),
        )

    async def _run(self, script: str, *arguments: Any, within_s: float = _TIMEOUT_S) -> Any:
        call: Callable[..., Awaitable[Any]] = self._scripts[script]
        return await self._in_time(lambda: call(keys=[self._prefix], args=arguments), within_s)

    async def _pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipeline: Any = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return await self._in_time(pipeline.execute, _BULK_S)

    async def _ask(self, *command: Any) -> Any:
        redis: Any = self._redis
        return await redis.execute_command(*command)

    async def _in_time(self, work: Callable[[], Awaitable[_T]], within_s: float = _TIMEOUT_S) -> _T:
        try:
            async with asyncio.timeout(within_s):
                return await work()
        except TimeoutError as error:
            raise StoreLost(f"Redis has not answered within {within_s:g} s.") from error
        except (OSError, self._error()) as error:
            raise StoreLost(f"Redis cannot be used ({type(error).__name__}: {error}).") from error

    def _error(self) -> type[Exception]:
        from redis.exceptions import RedisError

        return RedisError

    def _key(self, name: str) -> str:
        return self._prefix + name


def _packed(batch: Batch) -> list[bytes]:
    packed: list[bytes] = []
    for observation in batch.observations:
        with contextlib.suppress(NotPackable):
            packed.append(pack_observation(observation))
    return packed

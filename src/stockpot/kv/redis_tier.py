"""The Redis tier: blocks that every node with the secret can use. Redis 7 and newer, or Valkey.

Nothing that comes from Redis is believed before the envelope's MAC was verified, so a secret is mandatory.
What fails costs a miss and a bounded time, and soon nothing: a circuit breaker leaves a failing server
alone, and a thread of its own probes it, so that no request ever pays for a probe. One server (a primary),
not a cluster.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from stockpot.clock import Clock
from stockpot.errors import ConfigurationError
from stockpot.kv.block import BlockId
from stockpot.kv.breaker import BreakerLimits, CircuitBreaker
from stockpot.kv.envelope import Sealer
from stockpot.kv.recent import Recent
from stockpot.kv.redis_connection import RedisOptions, RedisPool, failure_of
from stockpot.kv.redis_directory import Entry, Keys, decode_entry
from stockpot.kv.redis_writing import RedisWriting
from stockpot.kv.resp import Command, ErrorReply, FailureCause, RedisFailure, RespConnection
from stockpot.kv.tier import (
    REFUSED_BY_CHECK,
    Block,
    BlockHead,
    Departure,
    Location,
    Refusal,
    Refused,
    Tier,
    TierStats,
    Unkept,
    Wanted,
)

_log = logging.getLogger(__name__)

_PLACES_PER_CALL = 64
_REFUSED_FOR_S = 30.0
"""How long a block that was not there is not looked for again, though an alias may still lead to it."""
_COMPLAINT_EVERY_S = 60.0


class RedisTier(Tier):
    """Keeps blocks in Redis for `ttl_s` after their last use, or until they were promised to be kept.

    `max_value_bytes` bounds a value: Redis serves one command at a time, so a large one delays every client.
    Reading was measured to be about as fast with anything between 512 KiB and 4 MiB, slower with 256 KiB.
    `max_in_flight_bytes` bounds what is asked for and not yet here, what is being written at once, and the
    largest block. `timeout_s` bounds each wait for the server; a call as a whole is bounded by that and its
    bytes at `kv.resp.LEAST_BYTES_PER_S`. `node` names this node to operators who look at claims.
    """

    name = "redis"

    def __init__(
        self,
        options: RedisOptions,
        *,
        sealer: Sealer,
        clock: Clock,
        node: str,
        ttl_s: int,
        max_value_bytes: int = 2**20,
        max_in_flight_bytes: int = 32 * 2**20,
        timeout_s: float = 0.05,
        connect_timeout_s: float = 0.05,
        on_departure: Departure | None = None,
        breaker: BreakerLimits | None = None,
    ) -> None:
        if not sealer.keyed:
            raise ConfigurationError(
                "the Redis tier needs a secret, so that nobody else with access to Redis can hand blocks "
                "to the model: set cache.secret, the same on every node"
            )
        if ttl_s < 1 or not 1024 <= max_value_bytes <= max_in_flight_bytes:
            raise ConfigurationError(
                f"cache.redis: ttl_s {ttl_s} must be at least 1, max_value_bytes {max_value_bytes} at least "
                f"1024 and not above max_in_flight_bytes {max_in_flight_bytes}"
            )
        self._sealer = sealer
        self._clock = clock
        self._in_flight_bytes = max_in_flight_bytes
        self._on_departure = on_departure
        self._address = options.address
        self._keys = Keys(options.prefix)
        self._pool = RedisPool(options, clock=clock, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s)
        self._breaker = CircuitBreaker(clock, breaker)
        self._writing = RedisWriting(
            self._keys,
            sealer=sealer,
            clock=clock,
            node=node,
            ttl_s=ttl_s,
            timeout_s=timeout_s,
            max_value_bytes=max_value_bytes,
            max_in_flight_bytes=max_in_flight_bytes,
        )
        self._extended = Recent(clock, span_s=min(60.0, ttl_s / 10))
        self._gone = Recent(clock, span_s=_REFUSED_FOR_S)
        self._lock = threading.Lock()
        self._hits = 0
        self._read_bytes = 0
        self._misses: Counter[str] = Counter()
        self._unkept: Counter[str] = Counter()
        self._evicted: Counter[str] = Counter()
        self._complained_s: dict[str, float] = {}
        self._closing = threading.Event()
        self._prober: threading.Thread | None = None

    def locate(self, wanted: Sequence[Wanted]) -> list[Location]:
        """One round trip for up to 64 places, own ids and aliases together."""
        run: list[Location] = []
        if not wanted:
            return run
        if not self._breaker.allows():
            self._count_miss("down")
            return run
        try:
            with self._pool.connection() as connection:
                for first in range(0, len(wanted), _PLACES_PER_CALL):
                    goes_on = self._locate(connection, wanted[first : first + _PLACES_PER_CALL], run)
                    if not goes_on:
                        break
            self._breaker.succeeded()
        except RedisFailure as failure:
            self._count_miss(self._failed(failure))
            return run
        if len(run) < len(wanted):
            self._count_miss("absent")
        return run

    def read(self, ids: Sequence[BlockId]) -> Iterator[Block | Refused]:
        """Blocks arrive while the ones before are verified. Ends early where the connection fails."""
        if not ids:
            return
        if not self._breaker.allows():
            yield self._refused(Refused(ids[0], "down"))
            return
        done = 0
        try:
            with self._pool.connection() as connection:
                for outcome in self._read(connection, ids):
                    done += 1
                    yield outcome
            self._breaker.succeeded()
        except RedisFailure as failure:
            cause = self._failed(failure)
            if done < len(ids):
                yield self._refused(Refused(ids[done], cause, str(failure)))

    def write(self, blocks: Sequence[Block]) -> list[Unkept | None]:
        """One writer a block among all nodes; who comes second prolongs what is there ("claimed")."""
        outcomes: list[Unkept | None] = []
        while len(outcomes) < len(blocks):
            group = self._writing.next_group(blocks[len(outcomes) :])
            outcomes += self._write(group)
        with self._lock:
            self._unkept.update(each for each in outcomes if each is not None)
        return outcomes

    def drop(self, ids: Sequence[BlockId]) -> int:
        """Aliases of a dropped block stay until their time is over; they lead to a miss."""
        if not ids or not self._breaker.allows():
            return 0
        try:
            with self._pool.connection() as connection:
                found = self._entries(connection, ids)
                here = [e for each, e in zip(ids, found, strict=True) if e and e.block == each]
                removed = connection.exchange([(b"UNLINK", self._keys.entry(e.block)) for e in here])
                connection.exchange([(b"UNLINK", *self._keys.chunks(e)) for e in here])
            self._breaker.succeeded()
        except RedisFailure as failure:
            self._failed(failure)
            return 0
        return removed.count(1)

    def drop_where(self, unwanted: Callable[[BlockHead], bool], cause: str) -> int:
        """0: Redis cannot enumerate cheaply. What was invalidated is refused when it is read, by its
        epoch."""
        del unwanted, cause
        return 0

    def stats(self) -> TierStats:
        """`blocks` are those this node wrote. `used_bytes` and `capacity_bytes` are the server's memory and
        its `maxmemory` (None for no limit) as of a few seconds ago, whatever is in it."""
        writing = self._writing
        with self._lock:
            return TierStats(
                name=self.name,
                capacity_bytes=writing.server_capacity_bytes or None,
                used_bytes=writing.server_used_bytes,
                blocks=writing.written_blocks,
                hits=self._hits,
                misses=dict(self._misses),
                unkept=dict(self._unkept),
                evicted=dict(self._evicted),
                read_bytes=self._read_bytes,
                written_bytes=writing.written_bytes,
                state=self._breaker.state,
            )

    def close(self) -> None:
        self._closing.set()
        self._pool.close()
        if self._prober is not None:
            self._prober.join(timeout=5)

    def _locate(self, connection: RespConnection, places: Sequence[Wanted], run: list[Location]) -> bool:
        """Add to `run` what is found; whether it may go on behind these places."""
        names = [((place.tokens, place.id), *place.aliases) for place in places]
        entries = iter(self._entries(connection, [name for each in names for _, name in each]))
        for place, ways in zip(places, names, strict=True):
            found = [
                (tokens, entry)
                for (tokens, _), entry in zip(ways, entries, strict=False)
                if entry is not None
                and entry.start == place.start
                and entry.tokens >= tokens
                and entry.block not in self._gone
            ]
            if not found:
                return False
            tokens, entry = found[0]
            run.append(Location(entry.block, place.start, tokens, entry.size_bytes))
            if entry.block != place.id:
                return False
        return True

    def _entries(self, connection: RespConnection, ids: Sequence[BlockId]) -> list[Entry | None]:
        reply = connection.exchange([(b"MGET", *map(self._keys.entry, ids))])[0]
        if isinstance(reply, ErrorReply):
            raise failure_of(reply)
        if not isinstance(reply, list) or len(reply) != len(ids):
            raise RedisFailure("error", f"Redis answered MGET of {len(ids)} keys with {str(reply)[:40]}")
        return [decode_entry(each, largest_bytes=self._in_flight_bytes) for each in reply]

    def _read(self, connection: RespConnection, ids: Sequence[BlockId]) -> Iterator[Block | Refused]:
        found = self._entries(connection, ids)
        entries = [e if e and e.block == each else None for each, e in zip(ids, found, strict=True)]
        sizes = [entry.size_bytes if entry else 0 for entry in entries]
        # One buffer for all: `Sealer.open` copies the block out of it.
        buffer = memoryview(bytearray(max(sizes)))
        asked = in_flight = 0
        opened: list[tuple[Entry, BlockHead]] = []
        for block, entry in zip(ids, entries, strict=True):
            while asked < len(ids) and (not in_flight or in_flight + sizes[asked] <= self._in_flight_bytes):
                self._ask(connection, entries[asked])
                in_flight += sizes[asked]
                asked += 1
            if entry is None:
                yield self._refused(Refused(block, "absent"))
                continue
            outcome = self._receive(connection, entry, buffer[: entry.size_bytes])
            in_flight -= entry.size_bytes
            if isinstance(outcome, Refused):
                self._quarantine(entry, outcome.cause)
                yield self._refused(outcome)
                continue
            with self._lock:
                self._hits += 1
                self._read_bytes += entry.size_bytes
            opened.append((entry, outcome.head))
            yield outcome
        self._extend(connection, opened)

    def _ask(self, connection: RespConnection, entry: Entry | None) -> None:
        if entry is not None:
            connection.allow()
            connection.send([(b"GET", key) for key in self._keys.chunks(entry)])

    def _receive(self, connection: RespConnection, entry: Entry, envelope: memoryview) -> Block | Refused:
        """One block whose chunks were asked for; every one of their replies is taken."""
        connection.allow(entry.size_bytes)
        step = entry.chunk_bytes
        refused: Refused | None = None
        for n in range(entry.chunks):
            target = envelope[n * step : (n + 1) * step]
            got = connection.receive_into(target)
            if got == len(target) or refused is not None:
                continue
            chunk = f"chunk {n + 1} of {entry.chunks}"
            if got is None:
                refused = Refused(entry.block, "absent", f"{chunk} is gone")
            elif isinstance(got, int):
                refused = Refused(entry.block, "truncated", f"{chunk} has {got} bytes, not {len(target)}")
            elif got.code == "WRONGTYPE":
                refused = Refused(entry.block, "truncated", f"{chunk} is no string")
            else:
                raise failure_of(got)
        return refused or self._sealer.open(entry.block, envelope)

    def _extend(self, connection: RespConnection, opened: Sequence[tuple[Entry, BlockHead]]) -> None:
        """Keep what was used for another `ttl_s`; now and then, not each time."""
        commands: list[Command] = []
        for entry, head in opened:
            if entry.block not in self._extended:
                self._extended.add(entry.block)
                commands += self._writing.extension(entry, head)
        connection.exchange(commands)

    def _quarantine(self, entry: Entry, cause: Refusal) -> None:
        """Take a block that cannot be used out of Redis, by another connection: replies are pending here. Its
        entry goes first, so that it can be written anew."""
        label = "quarantined" if cause in REFUSED_BY_CHECK else "incomplete"
        self._gone.add(entry.block)
        with self._lock:
            self._evicted[label] += 1
        try:
            with self._pool.connection() as connection:
                keys = self._keys.entry(entry.block), *self._keys.chunks(entry)
                connection.exchange([(b"UNLINK", *keys)])
        except RedisFailure as failure:
            self._failed(failure)
        if self._on_departure is not None:
            self._on_departure([entry.block], label)

    def _write(self, group: Sequence[Block]) -> list[Unkept | None]:
        if not self._breaker.allows():
            return _all(group, "down")
        try:
            with self._writing.reserved(group) as has_room:
                if not has_room:
                    return _all(group, "busy")
                with self._pool.connection() as connection:
                    written = self._writing.write(connection, group)
            self._breaker.succeeded()
        except RedisFailure as failure:
            return _all(group, self._failed(failure))
        for error in written.errors:
            self._complain(failure_of(error))
        for block, outcome in zip(group, written.outcomes, strict=True):
            if outcome is None:
                self._gone.discard(block.head.id)
        return written.outcomes

    def _refused(self, refused: Refused) -> Refused:
        if refused.cause == "absent":
            self._gone.add(refused.id)
        self._count_miss(refused.cause)
        return refused

    def _count_miss(self, cause: Refusal) -> None:
        with self._lock:
            self._misses[cause] += 1

    def _failed(self, failure: RedisFailure) -> FailureCause:
        """Count a failure; the cause callers are told."""
        self._complain(failure)
        if self._breaker.failed() and not self._closing.is_set():
            _log.warning("Redis at %s keeps failing and is not asked for a while", self._address)
            self._prober = threading.Thread(target=self._probe, name="stockpot-redis-probe", daemon=True)
            self._prober.start()
        return failure.cause

    def _probe(self) -> None:
        """Lives while the breaker is not closed."""
        while not self._closing.wait(self._breaker.probe_in_s()):
            if not self._breaker.try_probe():
                continue
            try:
                self._pool.give(self._pool.connect())
            except RedisFailure as failure:
                self._breaker.probed(success=False)
                self._complain(failure)
                continue
            self._breaker.probed(success=True)
            _log.info("Redis at %s answers again", self._address)
            return

    def _complain(self, failure: RedisFailure) -> None:
        """Log what an operator should know, each kind at most once a minute."""
        kind = failure.advice or failure.cause
        now_s = self._clock.monotonic()
        with self._lock:
            if now_s - self._complained_s.get(kind, -_COMPLAINT_EVERY_S) < _COMPLAINT_EVERY_S:
                return
            self._complained_s[kind] = now_s
        _log.warning("Redis at %s: %s. %s", self._address, str(failure).rstrip("."), failure.advice)


def _all(group: Sequence[Block], outcome: Unkept) -> list[Unkept | None]:
    return [outcome for _ in group]

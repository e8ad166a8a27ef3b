"""The invalidations all nodes share, in Redis, and the log that stands on it and on the machine's own.

Three keys: a hash of facts, the records by subject (a later one replaces an earlier one about the same), and
the subjects by sequence number, by which nodes read on from where they were. The number of the newest record
that had to be dropped says who was away for too long. The log's incarnation is a random word: where it is
missing or another one, Redis was restarted empty, and every node puts in again what it knows.

Records carry a MAC over all their fields, so whoever can write to Redis can withhold an invalidation, but not
make one, or date one differently. Publishing only wakes the other nodes: what it says is never believed.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
from blake3 import blake3

from stockpot.clock import Clock, SystemClock
from stockpot.errors import ConfigurationError
from stockpot.kv.invalidation import (
    EPOCH_STEP,
    MAX_RECORDS,
    Invalidation,
    InvalidationLog,
    Kind,
    LogUnavailable,
    News,
)
from stockpot.kv.invalidation_log import LocalLog

if TYPE_CHECKING:
    from redis.client import PubSub

    from stockpot.kv.redis_connection import RedisOptions

PAGE_RECORDS = 500
MAX_RECORD_BYTES = 16_384
"""Larger than any record can be: five texts of 512 characters, escaped."""
CLOCK_TOLERANCE = 24 * 3600 * 1000 * EPOCH_STEP
"""A day in epochs: how far Redis may be ahead of what this node knows before its word is not taken."""
_WAKE_S = 0.1

_log = logging.getLogger(__name__)

# facts -> the epoch of the next record. A number beyond the ceiling was not written by us, or says that the
# clock of Redis is wrong: then the node's own knowledge (floor) decides.
_RESERVE = """
local floor, ceiling, step = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local last = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0
if not (last >= 0 and last <= ceiling) then last = 0 end
local time = redis.call('TIME')
local now = (time[1] * 1000 + math.floor(time[2] / 1000)) * step
if now > ceiling then now = 0 end
local epoch = string.format('%.0f', math.max(now, (math.floor(math.max(last, floor) / step) + 1) * step))
redis.call('HSET', KEYS[1], 'epoch', epoch)
return epoch
"""

_PUBLISH = """
if ARGV[2] == '1' or not redis.call('HGET', KEYS[1], 'incarnation') then
  redis.call('HSET', KEYS[1], 'incarnation', ARGV[1])
end
if (tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0) < tonumber(ARGV[3]) then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[3])
end
for at = 5, #ARGV, 2 do
  local known = redis.call('HGET', KEYS[3], ARGV[at])
  local epoch = tonumber(string.match(known or '', '^%d+') or '0')
  if epoch < tonumber(string.match(ARGV[at + 1], '^%d+')) then
    local sequence = redis.call('HINCRBY', KEYS[1], 'sequence', 1)
    redis.call('HSET', KEYS[3], ARGV[at], ARGV[at + 1])
    redis.call('ZADD', KEYS[2], sequence, ARGV[at])
  end
end
local excess = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[4])
if excess > 0 then
  local gone = redis.call('ZPOPMIN', KEYS[2], excess)
  for at = 1, #gone, 2 do redis.call('HDEL', KEYS[3], gone[at]) end
  redis.call('HSET', KEYS[1], 'trimmed_upto', gone[#gone])
end
redis.call('PUBLISH', KEYS[4], 'new')
return redis.call('HGET', KEYS[1], 'incarnation')
"""

_READ = """
local facts = redis.call('HMGET', KEYS[1], 'incarnation', 'sequence', 'trimmed_upto')
local answer = {facts[1] or '', facts[2] or '0', facts[3] or '0'}
if answer[1] ~= ARGV[4] then return answer end
local after = '(' .. ARGV[1]
local page = redis.call('ZRANGEBYSCORE', KEYS[2], after, answer[2], 'WITHSCORES', 'LIMIT', 0, ARGV[2])
for at = 1, #page, 2 do
  local record = ''
  if redis.call('HSTRLEN', KEYS[3], page[at]) <= tonumber(ARGV[3]) then
    record = redis.call('HGET', KEYS[3], page[at]) or ''
  end
  answer[#answer + 1] = page[at + 1]
  answer[#answer + 1] = record
end
return answer
"""


@dataclass(frozen=True, slots=True)
class Page:
    """Some records of the log in Redis, in order. `sequence` and `trimmed_upto` speak of the whole log: the
    number of its newest record, and that of the newest which was dropped."""

    incarnation: str
    sequence: int
    trimmed_upto: int
    records: tuple[Invalidation, ...]
    read_upto: int
    full: bool


class RedisLog:
    """The log in Redis itself. Every call is bounded in time and raises LogUnavailable when it fails."""

    def __init__(
        self,
        options: RedisOptions,
        *,
        secret: bytes,
        clock: Clock | None = None,
        timeout_s: float = 0.5,
        max_records: int = MAX_RECORDS,
    ) -> None:
        from stockpot.kv.redis_connection import open_client

        if not secret:
            raise ConfigurationError(
                "invalidations shared through Redis need a secret, the same on all nodes: without one, "
                "whoever writes to Redis could empty every cache. Set the secret of the KV store."
            )
        self._clock = clock or SystemClock()
        self._max_records = max_records
        self._key = blake3(
            secret + options.prefix.encode(), derive_key_context="stockpot invalidation log v1"
        ).digest()
        self._address = options.address
        self._keys = [f"{options.prefix}:i:{name}" for name in ("facts", "order", "records", "news")]
        self._client = open_client(options, timeout_s=timeout_s, connect_timeout_s=timeout_s)
        self._subscription: PubSub | None = None
        self._forged = 0

    @property
    def forged(self) -> int:
        """Records read so far that were not written by somebody with the secret."""
        return self._forged

    def reserve(self, floor: int) -> int:
        """The epoch for a new record, larger than all before, and than `floor`, the largest known here."""
        now = int(self._clock.wall() * 1000) * EPOCH_STEP
        ceiling = max(floor, now) + CLOCK_TOLERANCE
        with self._available():
            epoch = int(self._run(_RESERVE, floor, ceiling, EPOCH_STEP))
        if not floor < epoch <= ceiling + EPOCH_STEP:
            raise LogUnavailable(f"Redis at {self._address} gave the epoch {epoch}, not one after {floor}.")
        return epoch

    def publish(self, records: Sequence[Invalidation], *, floor: int, renew: bool = False) -> str:
        """Put records in, unless what is there about the same is newer, and wake all nodes. Returns the log's
        incarnation: a new one where there was none, or where it is to be renewed."""
        incarnation = ""
        for at in range(0, max(1, len(records)), PAGE_RECORDS):
            arguments: list[str | bytes | int] = [
                secrets.token_hex(8),
                int(renew and at == 0),
                floor,
                self._max_records,
            ]
            for record in records[at : at + PAGE_RECORDS]:
                arguments += [self._subject(record), self._sealed(record)]
            with self._available():
                incarnation = self._run(_PUBLISH, *arguments).decode("ascii", "replace")
        return incarnation

    def read(self, incarnation: str, sequence: int) -> Page:
        """The records behind a sequence number of an incarnation: none where the log has another one. What
        was forged is counted and left out."""
        with self._available():
            answer: list[bytes] = self._run(_READ, sequence, PAGE_RECORDS, MAX_RECORD_BYTES, incarnation)
            opened = [self._opened(payload) for payload in answer[4::2]]
            page = Page(
                answer[0].decode("ascii", "replace"),
                int(answer[1]),
                int(answer[2]),
                tuple(record for record in opened if record is not None),
                int(answer[-2]) if opened else sequence,
                len(opened) == PAGE_RECORDS,
            )
        if forged := opened.count(None):
            self._forged += forged
            _log.warning(
                "Ignored %d invalidations in Redis at %s that were not made with our secret: give all nodes "
                "the same one, and see who else can write there.",
                forged,
                self._address,
            )
        return page

    def subscribe(self) -> None:
        """Let `wait` hear of publications from now on."""
        if self._subscription is None:
            with self._available():
                subscription = self._client.pubsub(ignore_subscribe_messages=True)  # pyright: ignore[reportUnknownMemberType]
                subscription.subscribe(self._keys[3])
                self._subscription = subscription

    def wait(self, wake: threading.Event, timeout_s: float) -> None:
        """Return on a publication, when `wake` is set (within a tenth of a second), or when time is up."""
        ends_at_s = time.monotonic() + timeout_s
        while self._subscription is not None and not wake.is_set():
            left_s = ends_at_s - time.monotonic()
            if left_s <= 0:
                return
            try:
                with self._available():
                    if self._subscription.get_message(timeout=min(left_s, _WAKE_S)) is not None:
                        return
            except LogUnavailable:
                self._unsubscribe()
        wake.wait(max(0.0, ends_at_s - time.monotonic()))

    def close(self) -> None:
        self._unsubscribe()
        self._client.close()

    def _unsubscribe(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def _run(self, script: str, *arguments: str | bytes | int) -> Any:
        return self._client.register_script(script)(keys=self._keys, args=arguments)

    @contextmanager
    def _available(self) -> Generator[None]:
        from redis.exceptions import RedisError

        try:
            yield
        except (RedisError, OSError, ValueError, IndexError) as error:
            raise LogUnavailable(
                f"Redis at {self._address} cannot share invalidations at the moment: {error}"
            ) from error

    def _subject(self, record: Invalidation) -> str:
        return blake3(msgspec.json.encode(record.subject), key=self._key).hexdigest()

    def _sealed(self, record: Invalidation) -> bytes:
        content = msgspec.json.encode(record)
        return b"%d %s %s" % (record.epoch, self._mac(content), content)

    def _opened(self, payload: bytes) -> Invalidation | None:
        epoch, _, rest = payload.partition(b" ")
        mac, _, content = rest.partition(b" ")
        if not hmac.compare_digest(mac, self._mac(content)):
            return None
        try:
            record = msgspec.json.decode(content, type=Invalidation)
        except msgspec.MsgspecError:
            return None
        return None if record.pending or epoch != b"%d" % record.epoch else record

    def _mac(self, content: bytes) -> bytes:
        return blake3(content, key=self._key).hexdigest().encode()


class SharedLog(InvalidationLog):
    """The log of all nodes: what Redis says is written down in the machine's own log and read from there, so
    that it is known after a restart too, with Redis or without.

    A record made while Redis does not answer is pending: it holds here at once, and `sync` brings it to the
    others. `local` must have been made with `alone=False`; it and `remote` are closed with this.
    """

    def __init__(self, local: LocalLog, remote: RedisLog, *, clock: Clock | None = None) -> None:
        self._local = local
        self._remote = remote
        self._clock = clock or SystemClock()
        self._syncing = threading.Lock()

    @property
    def forged(self) -> int:
        """See `RedisLog.forged`."""
        return self._remote.forged

    def append(
        self,
        kind: Kind,
        value: str = "",
        *,
        tokens: int = 0,
        tenant: str | None = None,
        by: str = "",
        reason: str = "",
    ) -> Invalidation:
        draft = Invalidation(
            EPOCH_STEP,
            kind,
            value,
            tokens,
            tenant,
            by,
            reason,
            at_s=self._clock.wall(),
            id=secrets.token_hex(16),
        )
        try:
            return self._deliver(draft)
        except LogUnavailable as error:
            _log.warning("The invalidation of %s %r is pending. %s", kind, value, error)
            return self._local.append(
                kind, value, tokens=tokens, tenant=tenant, by=by, reason=reason, id=draft.id
            )

    def since(self, position: int) -> News:
        return self._local.since(position)

    def pending(self) -> tuple[Invalidation, ...]:
        return self._local.pending()

    def sync(self) -> None:
        with self._syncing:
            self._remote.subscribe()
            for record in self._local.pending():
                self._deliver(record)
            self._catch_up()

    def wait(self, wake: threading.Event, timeout_s: float) -> None:
        self._remote.wait(wake, timeout_s)

    def close(self) -> None:
        self._remote.close()
        self._local.close()

    def _deliver(self, record: Invalidation) -> Invalidation:
        """Give a record its shared epoch and bring it to all nodes, this one included."""
        floor = self._local.latest
        shared = replace(record, epoch=self._remote.reserve(floor))
        self._remote.publish([shared], floor=floor)
        self._local.keep([shared])
        return shared

    def _catch_up(self) -> None:
        incarnation, _, number = self._local.shared_position.partition(":")
        sequence = int(number or 0)
        page = self._remote.read(incarnation, sequence)
        if not incarnation or page.incarnation != incarnation or page.sequence < sequence:
            # Redis is new to this node, was restarted empty, or went back to an old state of itself (`renew`,
            # so that all nodes do the same): put in what is known here, and read it from the beginning.
            renew = bool(incarnation) and page.incarnation == incarnation
            incarnation = self._remote.publish(self._local.shared(), floor=self._local.latest, renew=renew)
            sequence = 0
            page = self._remote.read(incarnation, sequence)
        lost = sequence < page.trimmed_upto
        records = list(page.records)
        while page.full:
            page = self._remote.read(incarnation, page.read_upto)
            records += page.records
        if page.incarnation != incarnation:
            raise LogUnavailable("Redis was emptied while its invalidations were read; reading them again.")
        self._local.keep(
            records,
            shared_position=f"{incarnation}:{page.read_upto}",
            # What was dropped is older than what is there; nothing computed before that can be trusted.
            forgotten_before=max((record.epoch for record in records), default=0) if lost else 0,
        )

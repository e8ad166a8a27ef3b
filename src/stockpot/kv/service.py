"""From settings to a cache that runs: tiers, their protection, freshness, events, memory pressure.

open     tiers and log are opened, what the disk holds is indexed
start    the log of invalidations is followed, memory is watched; both reach the engine through `ask`
close    what waits is written, threads end
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from stockpot.clock import Clock
from stockpot.errors import ConfigurationError, QueueFull, StockpotError
from stockpot.kv.block import TOKEN_BYTES, BlockId, Namespace, aliases
from stockpot.kv.cache import CacheLimits, CacheObservers, KVCache
from stockpot.kv.departures import Departures
from stockpot.kv.disk import DiskTier
from stockpot.kv.envelope import Sealer, Sealing
from stockpot.kv.invalidation import Invalidation, InvalidationLog, Invalidations
from stockpot.kv.invalidation_follower import Follower
from stockpot.kv.invalidation_log import LocalLog
from stockpot.kv.kv_event_publisher import KvEventPublisher
from stockpot.kv.kv_events import AllBlocksCleared, removed_events, stored_events
from stockpot.kv.pressure import PressureValve, return_freed_memory
from stockpot.kv.redis_connection import RedisOptions
from stockpot.kv.tier import Block, BlockHead, Departure, Tier
from stockpot.settings import CacheSettings, KvEventSettings, RedisSettings

_log = logging.getLogger(__name__)

MOST_DISK_BYTES = 8 * 2**30
POLL_S = 0.5
ENGINE_PATIENCE_S = 10.0
CATCH_UP_S = 1.0
MOST_EXPORTED_BYTES = 2**40


class CacheHost(Protocol):
    """The engine's thread, as those see it who need something done there between two steps. Each call returns
    when it is done; raises StockpotError where it never will be."""

    def invalidate(self, records: Sequence[Invalidation]) -> int:
        """Drop from RAM what the records match."""
        ...

    def resize(self, capacity_bytes: int) -> None:
        """Change what RAM may take, and drop what is too old."""
        ...


class CacheService:
    """One model's cache and all that runs beside it. Made by `open_cache`; `start` once the engine runs."""

    def __init__(
        self,
        cache: KVCache,
        *,
        log: InvalidationLog,
        clock: Clock,
        publisher: KvEventPublisher | None,
        valve: PressureValve | None,
        disk: DiskTier | None,
        sealer: Sealer,
    ) -> None:
        self.cache = cache
        self.disk = disk
        self._sealer = sealer
        self._clock = clock
        self.publisher = publisher
        self.valve = valve
        self._log = log
        self._host: CacheHost | None = None
        self.follower = Follower(
            log, cache.invalidations, on_records=self._on_records, on_gap=self._on_gap, clock=clock
        )
        self._closing = threading.Event()
        self._maintenance = threading.Thread(target=self._maintain, name="stockpot-maintenance", daemon=True)

    def start(self, host: CacheHost) -> None:
        """Follow the log and watch memory. Raises ConfigurationError where events cannot be published."""
        self._host = host
        self.follower.start()
        # What another node invalidated while this one was away must be known before its disk is read.
        if not self.follower.wait_caught_up(CATCH_UP_S):
            _log.warning("The log of invalidations could not be read within %g s; going on.", CATCH_UP_S)
        if self.publisher is not None:
            self.publisher.start()
        self._maintenance.start()

    def close(self) -> None:
        """Write what waits, and end all threads. After the engine has stopped. Idempotent."""
        self._closing.set()
        self.follower.close()
        if self._maintenance.is_alive():
            self._maintenance.join(POLL_S + ENGINE_PATIENCE_S)
        self.cache.close()
        self._log.close()
        if self.publisher is not None:
            self.publisher.close()

    def export(self, folder: Path, in_ram: Sequence[Block]) -> Mapping[str, Any]:
        """Write these blocks and all of the disk tier into a folder in the form of a disk tier. Blocks;
        raises ConfigurationError where there can be no such folder."""
        target = DiskTier(folder, capacity_bytes=MOST_EXPORTED_BYTES, sealer=self._sealer, clock=self._clock)
        unkept = 0
        try:
            named = (
                Block(replace(b.head, aliases=aliases(b.head.parent, b.head.tokens)), b.data) for b in in_ram
            )
            on_disk = self.disk.read([entry.id for entry in self.disk.heads()]) if self.disk else ()
            for block in (*named, *(b for b in on_disk if isinstance(b, Block))):
                unkept += target.write([block]) != [None]
            stats = target.stats()
        finally:
            target.close()
        return {
            "folder": str(folder), "blocks": stats.blocks, "bytes": stats.used_bytes, "not_written": unkept
        }  # fmt: skip

    def _on_records(self, records: Sequence[Invalidation]) -> None:
        """On the follower's thread: what is in RAM goes first, then what tiers can enumerate."""
        self._invalidate(records)
        self.cache.drop_behind(records)

    def _on_gap(self) -> None:
        """Invalidations were lost: nothing that was kept can be trusted to be fresh."""
        _log.warning("This node was away for longer than invalidations are remembered: the cache is cleared.")
        before = self.cache.invalidations.forgotten_before
        # What requests stand on as well, which `clear` would leave.
        self._invalidate([Invalidation(before, "all", by="stockpot", reason="this node was away too long")])
        stale = self.cache.invalidations.stale
        for slot in self.cache.slots:
            slot.tier.drop_where(lambda head: stale(head) is not None, "invalidated")

    def _invalidate(self, records: Sequence[Invalidation]) -> None:
        """In RAM, however many administrative requests wait: nobody comes again to say it."""
        while self._host is not None and not self._closing.is_set():
            try:
                self._host.invalidate(records)
            except QueueFull:
                self._closing.wait(POLL_S / 10)
            except TimeoutError:
                return  # the engine has it and is busy
            except (StockpotError, CancelledError) as error:
                _log.debug("nothing is invalidated in an engine that has ended: %s", error)
                return
            else:
                return

    def _maintain(self) -> None:
        while not self._closing.wait(POLL_S):
            capacity = self.cache.limits.ram_bytes
            used = self.cache.store.ram.used_bytes
            if self.valve is not None:
                capacity = self.valve.capacity(used)
            self._on_engine(lambda host, capacity=capacity: host.resize(capacity))
            if (
                self.cache.store.ram.used_bytes < used
                and self.valve is not None
                and self.valve.under_pressure
            ):
                return_freed_memory()

    def _on_engine(self, errand: Callable[[CacheHost], object]) -> None:
        if self._host is None or self._closing.is_set():
            return
        try:
            errand(self._host)
        except (StockpotError, TimeoutError, CancelledError) as error:
            if not self._closing.is_set():
                _log.debug("the engine did not do a cache errand: %s", error)


def open_cache(
    settings: CacheSettings,
    namespace: Namespace,
    limits: CacheLimits,
    *,
    folder: Path,
    clock: Clock,
    observers: CacheObservers,
) -> CacheService:
    """The cache that `settings` describe; what lasts lies in `folder` where they name no place.

    Reads the heads of all blocks on disk. Raises ConfigurationError.
    """
    secret = settings.secret.get_secret_value().encode() if settings.secret is not None else None
    sealer = _sealer(secret, settings, namespace)
    departures = Departures()
    invalidations = Invalidations(served_names=limits.served_names)
    left = _Departed(clock)
    disk = _disk(settings, folder / "kv", sealer, clock, left.of("disk"))
    tiers: list[Tier] = [disk] if disk is not None else []
    options = redis_options(settings.redis)
    local = LocalLog(folder / "invalidations", clock=clock, alone=options is None)
    log: InvalidationLog = local
    if options is not None:
        from stockpot.kv.invalidation_redis import RedisLog, SharedLog
        from stockpot.kv.redis_tier import RedisTier

        tiers.append(
            RedisTier(
                options,
                sealer=sealer,
                clock=clock,
                node=secrets.token_hex(8),
                ttl_s=settings.redis.ttl_s,
                max_value_bytes=settings.redis.max_value_bytes,
                timeout_s=settings.redis.timeout_s,
                connect_timeout_s=settings.redis.timeout_s,
                on_departure=left.of("redis"),
            )
        )
        log = SharedLog(local, RedisLog(options, secret=secret or b"", clock=clock), clock=clock)
    publisher = _publisher(settings.events, clock)
    cache = KVCache(
        namespace,
        limits,
        clock=clock,
        tiers=tiers,
        departures=departures,
        invalidations=invalidations,
        observers=_announced(observers, publisher, limits.block_tokens, settings.events.short_hashes),
    )
    left.cache = cache
    valve = PressureValve(limits.ram_bytes, clock) if settings.yield_memory else None
    return CacheService(
        cache, log=log, clock=clock, publisher=publisher, valve=valve, disk=disk, sealer=sealer
    )


def redis_options(settings: RedisSettings) -> RedisOptions | None:
    """How to reach the Redis of the settings; None where they name none. Raises ConfigurationError."""
    if settings.url is None:
        return None
    return RedisOptions(
        url=settings.url,
        username=settings.username,
        password=settings.password.get_secret_value() if settings.password is not None else None,
        ca_file=settings.ca_file,
        cert_file=settings.cert_file,
        key_file=settings.key_file,
        verify=settings.verify,
        prefix=settings.prefix,
    )


class _Departed:
    """Tells the cache, once there is one, what its tiers let go."""

    def __init__(self, clock: Clock) -> None:
        self.cache: KVCache | None = None
        self._clock = clock

    def of(self, tier: str) -> Departure:
        def departed(blocks: Sequence[BlockId], cause: str) -> None:
            if self.cache is not None:
                self.cache.tier_departed(tier, blocks, cause, self._clock.wall())

        return departed


def _sealer(secret: bytes | None, settings: CacheSettings, namespace: Namespace) -> Sealer:
    try:
        sealing = Sealing(secret, settings.encrypt)
    except ValueError as error:
        raise ConfigurationError(f"cache.secret and cache.encrypt do not fit: {error}.") from error
    return Sealer(sealing, fingerprint=namespace.fingerprint, layout=namespace.layout)


def _disk(
    settings: CacheSettings, folder: Path, sealer: Sealer, clock: Clock, on_departure: Departure
) -> DiskTier | None:
    capacity, path = settings.disk.capacity_bytes, settings.disk.path or folder
    if capacity is None:
        place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        capacity = min(MOST_DISK_BYTES, shutil.disk_usage(place).free // 10)
    if capacity == 0:
        return None
    return DiskTier(path, capacity_bytes=capacity, sealer=sealer, clock=clock, on_departure=on_departure)


def _publisher(settings: KvEventSettings, clock: Clock) -> KvEventPublisher | None:
    if settings.endpoint is None:
        return None
    return KvEventPublisher(
        settings.endpoint, replay_endpoint=settings.replay_endpoint, topic=settings.topic, clock=clock
    )


def _announced(
    observers: CacheObservers, publisher: KvEventPublisher | None, block_tokens: int, short: bool
) -> CacheObservers:
    """The observers, and the publisher of KV events beside them. What leaves RAM may still be behind it;
    routers want to know what is at once there, so events speak of RAM."""
    if publisher is None:
        return observers

    def stored(heads: Sequence[BlockHead]) -> None:
        publisher.publish(stored_events(heads, tier="ram", block_tokens=block_tokens, short_hashes=short))

    def removed(heads: Sequence[BlockHead]) -> None:
        # Shorter ones were never announced.
        whole = [head.id for head in heads if len(head.tokens) == block_tokens * TOKEN_BYTES]
        publisher.publish(removed_events(whole, tier="ram", short_hashes=short))

    return CacheObservers(
        evicted=observers.evicted,
        reused=observers.reused,
        stored=stored,
        removed=removed,
        cleared=lambda: publisher.publish([AllBlocksCleared()]),
        read=observers.read,
        written=observers.written,
    )

"""Opens the store of answers the settings name."""

from __future__ import annotations

from pathlib import Path

from stockpot.clock import Clock
from stockpot.recall.stores.backing import Backing
from stockpot.recall.stores.fronted_store import FrontedStore
from stockpot.recall.stores.store import AnswerStore
from stockpot.settings_recall import RecallSettings


def open_store(settings: RecallSettings, folder: Path, clock: Clock) -> AnswerStore:
    """Not started yet; an SQLite file goes into `folder`. Raises ConfigurationError."""
    backing: Backing
    if settings.store is None:
        from stockpot.recall.stores.sqlite_store import SqliteBacking

        backing = SqliteBacking(folder, capacity_bytes=settings.capacity_bytes)
    else:
        from stockpot.recall.stores.redis_store import RedisBacking

        backing = RedisBacking(
            settings.store.get_secret_value(), clock, capacity_bytes=settings.capacity_bytes
        )
    return FrontedStore(
        backing, clock, capacity_bytes=settings.capacity_bytes, memory_bytes=settings.memory_bytes
    )

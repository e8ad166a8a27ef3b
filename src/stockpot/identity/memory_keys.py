"""Keys in memory: for tests, and for whatever has no database."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from stockpot.identity.key_store import KeyStore, StoredKey


class MemoryKeyStore(KeyStore):
    """Gone with the process. `lookups` counts calls of `get`."""

    def __init__(self) -> None:
        self._keys: dict[str, StoredKey] = {}
        self._lock = threading.Lock()
        self.lookups = 0

    def create(self, key: StoredKey) -> None:
        with self._lock:
            if key.id in self._keys:
                raise ValueError(f"the key {key.id} exists")
            self._keys[key.id] = key

    def get(self, key_id: str) -> StoredKey | None:
        self.lookups += 1
        return self._keys.get(key_id)

    def list(self) -> Sequence[StoredKey]:
        return sorted(self._keys.values(), key=lambda key: (key.created_at, key.id))

    def revoke(self, key_id: str, at: float) -> None:
        with self._lock:
            key = self._keys.get(key_id)
            if key is not None and key.revoked_at is None:
                self._keys[key_id] = replace(key, revoked_at=at)

    def replace(self, key_id: str, digest: str, former_until: float) -> None:
        with self._lock:
            key = self._keys[key_id]
            self._keys[key_id] = replace(
                key, digest=digest, former_digest=key.digest, former_until=former_until
            )

    def has_user_keys(self) -> bool:
        return any(key.kind == "user" for key in self._keys.values())

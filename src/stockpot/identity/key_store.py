"""The seam to where virtual keys are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stockpot.caller import NOBODY, Limits

KeyKind = Literal["user", "admin"]


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as it is kept: everything but its secret. Times are seconds since 1970.

    `digest` is that of the whole key (`key.digest_of`). `tenant` "": its team's name, or without one the key
    itself, is the scope of its caches. `models` None: all. After a rotation `former_digest` is that of the
    key before, which holds until `former_until`; a second rotation ends the time of the first.
    """

    id: str
    digest: str
    name: str
    kind: KeyKind
    created_at: float
    team: str = ""
    tags: tuple[str, ...] = ()
    tenant: str = ""
    models: frozenset[str] | None = None
    limits: Limits = NOBODY.limits
    expires_at: float | None = None
    revoked_at: float | None = None
    former_digest: str = ""
    former_until: float = 0.0


class KeyStore(ABC):
    """Keeps keys. All methods may block, on any thread; they raise DatabaseUnavailable where it cannot be
    reached."""

    @abstractmethod
    def create(self, key: StoredKey) -> None:
        """Keep a new key; its id is not taken."""

    @abstractmethod
    def get(self, key_id: str) -> StoredKey | None:
        """One key, revoked and expired ones too."""

    @abstractmethod
    def list(self) -> Sequence[StoredKey]:
        """All keys, revoked and expired ones too, oldest first."""

    @abstractmethod
    def revoke(self, key_id: str, at: float) -> None:
        """The key and the one before it hold no more. The first time counts."""

    @abstractmethod
    def replace(self, key_id: str, digest: str, former_until: float) -> None:
        """Give a key a new secret. The one it had holds until `former_until`."""

    @abstractmethod
    def has_user_keys(self) -> bool:
        """Whether there was ever a key of kind user: revoking the last one opens nothing."""

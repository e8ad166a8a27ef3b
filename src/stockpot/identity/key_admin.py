"""What administrators do with virtual keys, from the command line and over HTTP alike; all is audited."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from stockpot.caller import NOBODY, Limits
from stockpot.clock import Clock
from stockpot.errors import RequestError
from stockpot.identity.key import digest_of, new_key, new_key_id
from stockpot.identity.key_store import KeyKind, KeyStore, StoredKey


class UnknownKey(RequestError):
    """There is no key with this id."""

    status = 404
    code = "unknown_key"
    exit_code = 1


class AuditTrail(Protocol):
    """Where changes are written down (`accounts.audit.AuditLog`)."""

    def append(
        self, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None
    ) -> object: ...


_DURATION = re.compile(r"([0-9]{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION_MAX_S = 3_650 * 86_400
_NAME_MAX = 128
_TAGS_MAX = 16
_LIMIT_MAX = 2**53  # what Lua, in Redis, counts exactly
_USD_MAX = 9_000_000
_TEAM = re.compile(r"(?:[a-z0-9][a-z0-9_.-]{0,63})?")


def duration_s(text: str) -> float:
    """Seconds of "90s", "5m", "2h", "30d". Raises ValueError."""
    match = _DURATION.fullmatch(text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else -1
    if not 0 <= seconds <= _DURATION_MAX_S:
        raise ValueError(f"{text[:40]!r} is no time such as '90s', '5m', '2h' or '30d', ten years at most")
    return float(seconds)


@dataclass(frozen=True, slots=True)
class NewKey:
    """What is wanted of a new key; see `StoredKey`. `expires_s` from now on. Raises RequestError for what
    does not fit."""

    name: str
    kind: KeyKind = "user"
    team: str = ""
    tags: tuple[str, ...] = ()
    tenant: str = ""
    models: frozenset[str] | None = None
    limits: Limits = NOBODY.limits
    expires_s: float | None = None

    def __post_init__(self) -> None:
        if not (self.name.strip() and self.name.isprintable() and len(self.name) <= _NAME_MAX):
            raise RequestError(
                f"A key needs a name: printable text, {_NAME_MAX} characters at most.", param="name"
            )
        for param, name in (("team", self.team), ("tenant", self.tenant)):
            if not _TEAM.fullmatch(name):
                raise RequestError(
                    f"{param} is {name[:64]!r}; use lower-case letters, digits, '_', '.', '-', 64 at most.",
                    param=param,
                )
        if len(self.tags) > _TAGS_MAX or not all(_is_tag(tag) for tag in self.tags):
            raise RequestError(
                f"Tags are at most {_TAGS_MAX} words of printable ASCII without commas, 64 characters each.",
                param="tags",
            )
        if not all(0 <= limit <= _LIMIT_MAX for limit in limits_of(self.limits).values()):
            raise RequestError(f"A limit is a number from 0 to {_LIMIT_MAX:,}.", param="limits")
        if any((usd or 0) > _USD_MAX for usd in (self.limits.usd_per_day, self.limits.usd_per_month)):
            raise RequestError(f"A budget is {_USD_MAX:,} US dollars at most.", param="limits")
        if self.kind == "admin" and (self.models is not None or self.limits or self.tenant):
            raise RequestError(
                "An administrator's key makes no requests: leave out models, limits and tenant.", param="kind"
            )


class KeyAdmin:
    """Creates, lists, revokes, rotates. Calls block; they raise DatabaseUnavailable.

    A change is audited before it is made: none is unseen, and one that then fails is in the log all the same.
    """

    def __init__(self, store: KeyStore, audit: AuditTrail, clock: Clock) -> None:
        self._store = store
        self._audit = audit
        self._clock = clock

    def create(self, wanted: NewKey, *, actor: str) -> tuple[StoredKey, str]:
        """The key, and its text, which is known now and never again."""
        now = self._clock.wall()
        key_id = new_key_id()
        text = new_key(key_id)
        key = StoredKey(
            id=key_id,
            digest=digest_of(text),
            name=wanted.name,
            kind=wanted.kind,
            created_at=now,
            team=wanted.team,
            tags=wanted.tags,
            tenant=wanted.tenant,
            models=wanted.models,
            limits=wanted.limits,
            expires_at=None if wanted.expires_s is None else now + wanted.expires_s,
        )
        self._audit.append(actor, "keys.create", key_id, shown(key))
        self._store.create(key)
        return key, text

    def list(self) -> Sequence[StoredKey]:
        """All keys, oldest first."""
        return self._store.list()

    def revoke(self, key_id: str, *, actor: str) -> StoredKey:
        """End a key. Raises UnknownKey. A key that is revoked already stays so."""
        key = self._get(key_id)
        if key.revoked_at is None:
            self._audit.append(actor, "keys.revoke", key_id, {"name": key.name})
            self._store.revoke(key_id, self._clock.wall())
        return self._get(key_id)

    def rotate(self, key_id: str, *, grace_s: float, actor: str) -> tuple[StoredKey, str]:
        """Give a key a new secret; the old one holds for `grace_s` more. Its id, and what has been counted of
        its limits, stay. Raises UnknownKey, RequestError for a key that is revoked."""
        key = self._get(key_id)
        if key.revoked_at is not None:
            raise RequestError(f"The key {key_id} is revoked; create a new one.", code="key_revoked")
        text = new_key(key_id)
        self._audit.append(actor, "keys.rotate", key_id, {"name": key.name, "grace_s": grace_s})
        self._store.replace(key_id, digest_of(text), self._clock.wall() + grace_s)
        return self._get(key_id), text

    def state(self, key: StoredKey) -> str:
        """active, expired or revoked."""
        if key.revoked_at is not None:
            return "revoked"
        is_over = key.expires_at is not None and self._clock.wall() >= key.expires_at
        return "expired" if is_over else "active"

    def _get(self, key_id: str) -> StoredKey:
        key = self._store.get(key_id)
        if key is None:
            raise UnknownKey(f"There is no key with the id {key_id[:100]!r}; 'stockpot keys list' shows all.")
        return key


def _is_tag(tag: str) -> bool:
    return 0 < len(tag) <= 64 and tag.isascii() and tag.isprintable() and "," not in tag


def limits_of(limits: Limits) -> dict[str, int | float]:
    """Those that are there."""
    return {name: limit for name, limit in asdict(limits).items() if limit is not None}


def shown(key: StoredKey) -> dict[str, Any]:
    """A key as JSON shows it: without its digest."""
    return {
        "id": key.id,
        "name": key.name,
        "kind": key.kind,
        "team": key.team,
        "tags": list(key.tags),
        "tenant": "" if key.kind == "admin" else key.tenant or key.team or key.id,
        "models": None if key.models is None else sorted(key.models),
        "limits": limits_of(key.limits),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }

"""Keys in the accounts database.

A rotated key keeps its row, and with it its id, its limits and its lines in the ledger. The digest it had
moves to a row of its own, `ID.former`, which says whose it is (`replaced_by`) and how long it holds
(`grace_until`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from stockpot.accounts.database import Database
from stockpot.caller import NOBODY, Limits
from stockpot.identity.key_store import KeyStore, StoredKey

_FORMER = ".former"


class SqlKeyStore(KeyStore):
    """See `accounts.schema` for the table."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._keys = database.tables.keys

    def create(self, key: StoredKey) -> None:
        with self._database.writing() as connection:
            connection.execute(insert(self._keys).values(_row(key)))

    def get(self, key_id: str) -> StoredKey | None:
        wanted = select(self._keys).where(self._keys.c.id.in_((key_id, key_id + _FORMER)))
        with self._database.reading() as connection:
            rows = {row.id: row for row in connection.execute(wanted)}
        row = rows.get(key_id)
        return None if row is None else _key(row, rows.get(key_id + _FORMER))

    def list(self) -> Sequence[StoredKey]:
        wanted = select(self._keys).order_by(self._keys.c.created_at, self._keys.c.id)
        with self._database.reading() as connection:
            rows = connection.execute(wanted).all()
        former = {row.replaced_by: row for row in rows if row.replaced_by is not None}
        return [_key(row, former.get(row.id)) for row in rows if row.replaced_by is None]

    def revoke(self, key_id: str, at: float) -> None:
        columns = self._keys.c
        with self._database.writing() as connection:
            connection.execute(
                update(self._keys)
                .where(columns.id == key_id, columns.revoked_at.is_(None))
                .values(revoked_at=at)
            )

    def replace(self, key_id: str, digest: str, former_until: float) -> None:
        columns = self._keys.c
        with self._database.writing() as connection:
            row = connection.execute(select(self._keys).where(columns.id == key_id).with_for_update()).one()
            former: dict[str, Any] = dict(row._mapping)  # pyright: ignore[reportPrivateUsage] - its public name
            former |= {"id": key_id + _FORMER, "replaced_by": key_id, "grace_until": former_until}
            connection.execute(delete(self._keys).where(columns.id == key_id + _FORMER))
            connection.execute(insert(self._keys).values(former))
            connection.execute(update(self._keys).where(columns.id == key_id).values(digest=digest))

    def has_user_keys(self) -> bool:
        wanted = select(self._keys.c.id).where(self._keys.c.kind == "user").limit(1)
        with self._database.reading() as connection:
            return connection.execute(wanted).first() is not None


def _row(key: StoredKey) -> dict[str, Any]:
    limits = {name: limit for name, limit in asdict(key.limits).items() if limit is not None}
    return {
        "id": key.id,
        "digest": key.digest,
        "name": key.name,
        "team": key.team,
        "tags": list(key.tags),
        "tenant": key.tenant,
        "models": None if key.models is None else sorted(key.models),
        "limits": limits,
        "kind": key.kind,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _key(row: Row[Any], former: Row[Any] | None) -> StoredKey:
    return StoredKey(
        id=row.id,
        digest=row.digest,
        name=row.name,
        kind=row.kind,
        created_at=row.created_at,
        team=row.team,
        tags=tuple(row.tags),
        tenant=row.tenant,
        models=None if row.models is None else frozenset(row.models),
        # Callers without limits share one object, which is quick to tell.
        limits=Limits(**row.limits) if row.limits else NOBODY.limits,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        former_digest="" if former is None else former.digest,
        former_until=0.0 if former is None else former.grace_until,
    )

"""Keys as they are kept: in memory and in a real database, by the same rules."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.accounts.database import open_database
from stockpot.caller import NOBODY, Limits
from stockpot.clock import VirtualClock
from stockpot.errors import RequestError
from stockpot.identity.key import digest_of, key_id_of, new_key, new_key_id
from stockpot.identity.key_admin import KeyAdmin, NewKey, UnknownKey, duration_s, shown
from stockpot.identity.key_store import KeyStore
from stockpot.identity.memory_keys import MemoryKeyStore
from stockpot.identity.sql_keys import SqlKeyStore


class Trail:
    """Remembers what was audited."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str, str]] = []

    def append(self, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None) -> None:
        self.lines.append((actor, action, target, repr(detail)))


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[KeyStore, None, None]:
    if request.param == "memory":
        yield MemoryKeyStore()
        return
    database = open_database(f"sqlite:///{tmp_path / 'stockpot.db'}")
    yield SqlKeyStore(database)
    database.close()


def test_a_key_carries_its_id_and_enough_chance() -> None:
    keys = {new_key(new_key_id()) for _ in range(1_000)}
    assert len({key_id_of(key) for key in keys}) == len(keys) == 1_000
    assert all(len(key.rpartition("-")[0]) < len(key) and len(key) == 6 + 12 + 1 + 43 for key in keys)


@given(st.text())
def test_what_is_no_key_has_no_id(text: str) -> None:
    assert key_id_of(text) is None
    assert key_id_of("sk-sp-" + text) is None
    assert len(digest_of(text + "\udcff")) == 64


def test_a_key_is_kept_without_its_secret(store: KeyStore) -> None:
    trail, clock = Trail(), VirtualClock(1_000.0)
    admin = KeyAdmin(store, trail, clock)
    wanted = NewKey(
        name="ci",
        team="search",
        tags=("nightly", "a b"),
        tenant="shared",
        models=frozenset({"small", "large"}),
        limits=Limits(requests_per_minute=60, usd_per_day=1.5),
        expires_s=3600,
    )
    key, text = admin.create(wanted, actor="ann")
    clock.advance(1)
    plain, _ = admin.create(NewKey("plain"), actor="ann")
    root, _ = admin.create(NewKey("root", kind="admin"), actor="ann")
    found = store.get(key.id)
    assert found is not None
    assert found == key
    assert (found.digest, found.expires_at) == (digest_of(text), 4_600.0)
    assert found.limits == wanted.limits
    other = store.get(plain.id)
    assert other is not None
    assert other.models is None
    assert other.limits is NOBODY.limits
    listed = store.list()
    assert listed[0].id == key.id
    assert {each.id for each in listed} == {key.id, plain.id, root.id}
    secret = text.rpartition(key.id)[2].removeprefix("-")
    assert secret not in repr((listed, trail.lines, shown(key)))
    assert key.digest not in repr((trail.lines, shown(key)))
    assert [line[:3] for line in trail.lines] == [
        ("ann", "keys.create", each.id) for each in (key, plain, root)
    ]


def test_a_rotated_key_keeps_its_id_and_a_second_rotation_ends_the_first(store: KeyStore) -> None:
    clock = VirtualClock(1_000.0)
    admin = KeyAdmin(store, Trail(), clock)
    key, first = admin.create(NewKey("ci", team="search"), actor="ann")
    rotated, second = admin.rotate(key.id, grace_s=60, actor="ann")
    assert (rotated.id, rotated.team, key_id_of(second)) == (key.id, "search", key.id)
    assert (rotated.digest, rotated.former_digest, rotated.former_until) == (
        digest_of(second),
        digest_of(first),
        1_060.0,
    )
    rotated, third = admin.rotate(key.id, grace_s=0, actor="ann")
    assert (rotated.digest, rotated.former_digest) == (digest_of(third), digest_of(second))
    assert [each.id for each in store.list()] == [key.id]


def test_a_revoked_key_stays_revoked_and_still_closes_the_door(store: KeyStore) -> None:
    clock = VirtualClock(1_000.0)
    admin = KeyAdmin(store, Trail(), clock)
    admin.create(NewKey("root", kind="admin"), actor="ann")
    assert not store.has_user_keys()
    key, _ = admin.create(NewKey("ci"), actor="ann")
    assert admin.revoke(key.id, actor="ann").revoked_at == 1_000.0
    clock.advance(5)
    assert admin.revoke(key.id, actor="ann").revoked_at == 1_000.0
    assert admin.state(admin.revoke(key.id, actor="ann")) == "revoked"
    assert store.has_user_keys()
    with pytest.raises(RequestError, match="revoked"):
        admin.rotate(key.id, grace_s=0, actor="ann")
    for act in (
        lambda: admin.revoke("nope", actor="ann"),
        lambda: admin.rotate("nope", grace_s=0, actor="a"),
    ):
        with pytest.raises(UnknownKey, match="nope"):
            act()


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a", "team": "A b"}, "team"),
        ({"name": "a", "tenant": "../x"}, "tenant"),
        ({"name": "a", "tags": ("x,y",)}, "tags"),
        ({"name": "a", "tags": tuple("abcdefghijklmnopq")}, "tags"),
        ({"name": "a", "limits": Limits(concurrency=-1)}, "limits"),
        ({"name": "a", "limits": Limits(usd_per_day=float("nan"))}, "limits"),
        ({"name": "a", "limits": Limits(usd_per_month=1e12)}, "limits"),
        ({"name": "a", "kind": "admin", "models": frozenset({"m"})}, "kind"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wanted: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        NewKey(**wanted)
    assert caught.value.param == param


def test_durations() -> None:
    assert [duration_s(text) for text in ("0s", "90s", "5m", "2h", "30d")] == [0, 90, 300, 7_200, 2_592_000]
    for text in ("", "5", "-1s", "1w", "99999d", "1.5h"):
        with pytest.raises(ValueError, match="no time such as"):
            duration_s(text)

"""From a key to its caller: quick, at most two seconds old, and indifferent to floods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from stockpot.caller import Limits
from stockpot.clock import VirtualClock
from stockpot.errors import Forbidden, Unauthenticated
from stockpot.identity.key import new_key, new_key_id
from stockpot.identity.key_admin import KeyAdmin, NewKey
from stockpot.identity.memory_keys import MemoryKeyStore
from stockpot.identity.rate import WrongKeys
from stockpot.identity.resolver import Resolver, TooManyKeys


class NoTrail:
    def append(
        self, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None
    ) -> None: ...


@dataclass
class Setup:
    clock: VirtualClock
    store: MemoryKeyStore
    admin: KeyAdmin
    resolver: Resolver

    def key(self, **wanted: object) -> tuple[str, str]:
        key, text = self.admin.create(NewKey("ci", **wanted), actor="t")  # pyright: ignore[reportArgumentType]
        return key.id, text


@asynccontextmanager
async def keys(known_max: int = 10_000) -> AsyncGenerator[Setup]:
    clock, store = VirtualClock(1_000.0), MemoryKeyStore()
    teams = {"search": Limits(concurrency=3)}
    resolver = Resolver(store, clock, teams=teams, known_max=known_max)
    yield Setup(clock, store, KeyAdmin(store, NoTrail(), clock), resolver)
    resolver.close()


async def test_a_key_becomes_its_caller() -> None:
    async with keys() as setup:
        key_id, text = setup.key(
            team="search", tags=("a",), models=frozenset({"m"}), limits=Limits(concurrency=1)
        )
        caller = await setup.resolver.resolve(text)
        assert (caller.tenant, caller.key_id, caller.key_name, caller.team) == (
            "search",
            key_id,
            "ci",
            "search",
        )
        assert (caller.tags, caller.models) == (("a",), frozenset({"m"}))
        assert (caller.limits, caller.team_limits) == (Limits(concurrency=1), Limits(concurrency=3))
        key_id, text = setup.key()
        assert (await setup.resolver.resolve(text)).tenant == key_id
        _, text = setup.key(team="search", tenant="own")
        assert (await setup.resolver.resolve(text)).tenant == "own"


async def test_what_is_known_is_asked_for_again_after_two_seconds() -> None:
    async with keys() as setup:
        key_id, text = setup.key()
        assert setup.resolver.resolve_now(text) is None
        caller = await setup.resolver.resolve(text)
        for _ in range(10):
            assert setup.resolver.resolve_now(text) is caller
            await setup.resolver.resolve(text)
        assert setup.store.lookups == 1
        setup.admin.revoke(key_id, actor="t")
        setup.clock.advance(1.9)
        assert setup.resolver.resolve_now(text) is caller  # not yet noticed
        setup.clock.advance(0.1)
        assert setup.resolver.resolve_now(text) is None
        for _ in range(2):
            with pytest.raises(Unauthenticated, match=f"{key_id} was revoked") as caught:
                await setup.resolver.resolve(text)
            assert caught.value.code == "key_revoked"
        with pytest.raises(Unauthenticated, match="revoked"):
            setup.resolver.resolve_now(text)


async def test_keys_end_when_they_expire_and_when_grace_has_passed() -> None:
    async with keys() as setup:
        _, text = setup.key(expires_s=1.0)
        await setup.resolver.resolve(text)
        setup.clock.advance(1.0)  # what is remembered does not prolong it
        with pytest.raises(Unauthenticated, match="expired"):
            await setup.resolver.resolve(text)
        key_id, old = setup.key()
        _, new = setup.admin.rotate(key_id, grace_s=10, actor="t")
        assert await setup.resolver.resolve(old) == await setup.resolver.resolve(new)
        setup.clock.advance(10)
        await setup.resolver.resolve(new)
        with pytest.raises(Unauthenticated, match="rotated"):
            await setup.resolver.resolve(old)


async def test_users_and_administrators_are_kept_apart() -> None:
    async with keys() as setup:
        _, user = setup.key()
        _, admin = setup.key(kind="admin")
        assert await setup.resolver.resolve_admin(admin) == "ci"
        with pytest.raises(Forbidden, match="administers and does nothing else"):
            await setup.resolver.resolve(admin)
        with pytest.raises(Forbidden, match="may not administer"):
            await setup.resolver.resolve_admin(user)


async def test_wrong_secrets_and_unknown_ids_sound_the_same() -> None:
    async with keys() as setup:
        key_id, text = setup.key()
        words: set[str] = set()
        for wrong in (new_key(key_id), new_key(new_key_id()), text + "x", text[:-1], "", "word", "ü"):
            with pytest.raises(Unauthenticated) as caught:
                await setup.resolver.resolve(wrong)
            words.add(str(caught.value))
            assert not setup.resolver.was_good(wrong)
        assert len(words) == 1


async def test_requests_with_one_key_wait_for_one_lookup_and_may_go_away() -> None:
    async with keys() as setup:
        _, text = setup.key()
        waiting = [asyncio.create_task(setup.resolver.resolve(text)) for _ in range(100)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(outcomes[0], asyncio.CancelledError)
        assert len({id(each) for each in outcomes[1:]}) == 1
        assert setup.store.lookups == 1


async def test_a_flood_of_invented_keys_keeps_nobody_out_and_fills_nothing() -> None:
    async with keys(known_max=50) as setup:
        _, text = setup.key()
        await setup.resolver.resolve(text)
        setup.clock.advance(5)
        refused = 0
        for _ in range(1_000):
            try:
                await setup.resolver.resolve(new_key(new_key_id()))
            except Unauthenticated:
                pass
            except TooManyKeys as error:
                refused += 1
                assert error.status == 429
                assert error.retry_after_s is not None
        assert refused == 800
        assert setup.store.lookups == 201
        await setup.resolver.resolve(text)  # it was good before
        again = new_key(new_key_id())
        setup.clock.advance(1)
        for _ in range(10):
            with pytest.raises(Unauthenticated):
                await setup.resolver.resolve(again)
        assert setup.store.lookups == 203  # that an id is none is remembered, too


async def test_the_first_key_closes_the_door() -> None:
    async with keys() as setup:
        assert setup.resolver.exist_now() is None
        setup.key(kind="admin")
        assert not await setup.resolver.keys_exist()
        assert setup.resolver.exist_now() is False
        key_id, _ = setup.key()
        setup.clock.advance(2)
        assert setup.resolver.exist_now() is None
        assert await setup.resolver.keys_exist()
        setup.admin.revoke(key_id, actor="t")
        setup.clock.advance(100)
        assert setup.resolver.exist_now() is True


def test_wrong_keys_are_counted_by_address_and_forgiven_in_time() -> None:
    clock = VirtualClock()
    wrong = WrongKeys(clock, a_minute=20, clients_max=100)
    for _ in range(20):
        assert wrong.wait_s("192.0.2.1") == 0
        wrong.count("192.0.2.1")
    assert 0 < wrong.wait_s("192.0.2.1") <= 3
    assert wrong.wait_s("192.0.2.2") == 0
    clock.advance(3)
    assert wrong.wait_s("192.0.2.1") == 0
    for number in range(1_000):
        wrong.count(f"2001:db8:0:7::{number:x}")  # one customer, many addresses
    assert wrong.wait_s("2001:db8:0:7:ffff::1%eth0") > 0
    assert wrong.wait_s("2001:db8:0:8::1") == 0
    for number in range(200):
        wrong.count(f"10.0.0.{number}")
    assert wrong.wait_s("2001:db8:0:7::1") == 0  # forgotten: memory is bounded
    wrong.count("::ffff:192.0.2.9")
    wrong.count("somewhere:else")

"""From a key to whose it is, quickly, and never later than two seconds behind the store."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from stockpot.caller import NOBODY, Caller, Limits
from stockpot.clock import Clock
from stockpot.errors import Forbidden, RequestError, Unauthenticated
from stockpot.identity.key import digest_of, key_id_of
from stockpot.identity.key_store import KeyKind, KeyStore, StoredKey
from stockpot.identity.rate import Bucket

LIFETIME_S = 2.0
"""What is known of a key is asked for again after this time: a revocation holds everywhere within it."""

_THREADS = 2
_LOOKUP_S = 10.0
_UNKNOWN_A_SECOND = 100
_UNKNOWN_AT_ONCE = 200
_NOBODYS_DIGEST = "0" * 64

T = TypeVar("T")


class KeysUnavailable(RequestError):
    """Where keys are kept does not answer. Nobody is let in on what was known before: it may be revoked."""

    status = 503
    code = "keys_unavailable"


class TooManyKeys(RequestError):
    """More keys that are not known were sent than are looked up."""

    status = 429
    code = "too_many_unknown_keys"


class _WrongSecret(Unauthenticated):
    """The key has the id of one that is known and is not that one. It may be what that was rotated to."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What the store said at `at_s`; `key` None: there is no such key."""

    at_s: float
    key: StoredKey | None
    caller: Caller


class Resolver:
    """Looks keys up, in threads, and remembers what it found for `LIFETIME_S`. On the event loop.

    Memory is bounded: `known_max` keys and as many ids that are none. So is work: requests with one key wait
    for one lookup, and of ids that were not keys before, a hundred a second are looked up. Who has a key that
    was good before is looked up at all times: a flood of invented keys keeps nobody out who was in.
    """

    def __init__(
        self,
        store: KeyStore,
        clock: Clock,
        *,
        teams: Mapping[str, Limits] | None = None,
        known_max: int = 10_000,
    ) -> None:
        """`teams` are the limits of teams."""
        self._store = store
        self._clock = clock
        self._teams = teams or {}
        self._known_max = known_max
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._unknown: OrderedDict[str, _Known] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[_Known]] = {}
        self._strangers = Bucket(_UNKNOWN_AT_ONCE, _UNKNOWN_A_SECOND, clock.monotonic())
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="keys")
        self._has_user_keys = False
        self._has_asked_at_s = -math.inf
        self._asking: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def take_teams(self, teams: Mapping[str, Limits]) -> None:
        """From now on these are the limits of teams; of keys that are known within `LIFETIME_S`."""
        self._teams = teams

    def resolve_now(self, key: str) -> Caller | None:
        """Whose key it is, where that is known and fresh; None: ask `resolve`. Raises as that does."""
        known = self._known.get(key_id_of(key) or "")
        if known is None or self._clock.monotonic() - known.at_s >= LIFETIME_S:
            return None
        try:
            return self._checked(key, known, "user").caller
        except _WrongSecret:
            return None

    async def resolve(self, key: str) -> Caller:
        """Whose key it is. Raises Unauthenticated for a key that is not known, expired or revoked, Forbidden
        for a key of an administrator, TooManyKeys, KeysUnavailable."""
        caller = (await self._looked_up(key, "user")).caller
        self._has_user_keys = True
        return caller

    async def resolve_admin(self, key: str) -> str:
        """The name of an administrator's key. Raises as `resolve` does, Forbidden for a key of a user."""
        known = await self._looked_up(key, "admin")
        return known.caller.key_name or known.caller.key_id

    def was_good(self, key: str) -> bool:
        """Whether this is a key that has been good, as far as is remembered."""
        known = self._known.get(key_id_of(key) or "")
        return known is not None and known.key is not None and _fits(key, known.key)

    async def keys_exist(self) -> bool:
        """Whether there was ever a key of a user; known within two seconds of the first."""
        if self._has_user_keys:
            return True
        if self._clock.monotonic() - self._has_asked_at_s >= LIFETIME_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask_for_any())
            await asyncio.shield(self._asking)
        return self._has_user_keys

    async def _ask_for_any(self) -> None:
        at_s = self._clock.monotonic()
        self._has_user_keys = await self._in_thread(self._store.has_user_keys)
        self._has_asked_at_s = at_s

    def exist_now(self) -> bool | None:
        """As `keys_exist`, where that is known and fresh."""
        if self._has_user_keys:
            return True
        return False if self._clock.monotonic() - self._has_asked_at_s < LIFETIME_S else None

    async def _looked_up(self, key: str, wanted: KeyKind) -> _Known:
        """What the store says of the key, checked. A key that was just rotated holds at once: what does not
        fit is compared with what is remembered, and then with what the store says now."""
        begun_s = self._clock.monotonic()
        known = await self._look_up(key)
        try:
            return self._checked(key, known, wanted)
        except _WrongSecret:
            if known.at_s >= begun_s:
                raise
        return self._checked(key, await self._look_up(key, since_s=begun_s), wanted)

    async def _look_up(self, key: str, *, since_s: float = -math.inf) -> _Known:
        """What the store says of the key's id: remembered (not from before `since_s`), or asked."""
        key_id = key_id_of(key)
        now_s = self._clock.monotonic()
        if key_id is None:
            return _Known(now_s, None, NOBODY)
        known = self._known.get(key_id) or self._unknown.get(key_id)
        if known is not None and now_s - known.at_s < LIFETIME_S and known.at_s >= since_s:
            return known
        task = self._lookups.get(key_id)
        if task is None:
            if not self.was_good(key):
                wait_s = self._strangers.wait_s(now_s)
                if wait_s > 0:
                    raise TooManyKeys(
                        "More keys that are not known are being sent than are looked up; try again in a"
                        " second.",
                        retry_after_s=wait_s,
                    )
                self._strangers.take(now_s)
            task = asyncio.create_task(self._ask(key_id))
            self._lookups[key_id] = task
            task.add_done_callback(lambda done: self._asked(key_id, done))
        # Shielded: of several requests that wait, one may go away.
        return await asyncio.shield(task)

    async def _ask(self, key_id: str) -> _Known:
        at_s = self._clock.monotonic()  # before it is asked: what it says may be that old
        key = await self._in_thread(lambda: self._store.get(key_id))
        known = _Known(at_s, key, NOBODY if key is None else self._caller_of(key))
        there, elsewhere = (self._unknown, self._known) if key is None else (self._known, self._unknown)
        elsewhere.pop(key_id, None)
        there[key_id] = known
        there.move_to_end(key_id)
        if len(there) > self._known_max:
            there.popitem(last=False)
        return known

    def _asked(self, key_id: str, done: asyncio.Task[_Known]) -> None:
        self._lookups.pop(key_id, None)
        if not done.cancelled():
            done.exception()  # whoever waited has been told

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(_LOOKUP_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError as error:
            raise KeysUnavailable(
                f"The keys cannot be looked up: the database has not answered for {_LOOKUP_S:g} s."
                " Try again in a moment.",
                retry_after_s=5,
            ) from error

    def _checked(self, key: str, known: _Known, wanted: KeyKind) -> _Known:
        """`known`, if the key is its, holds and may do what is wanted."""
        stored = known.key
        if stored is None:
            hmac.compare_digest(digest_of(key), _NOBODYS_DIGEST)  # takes as long as for a key that exists
        if stored is None or not _fits(key, stored):
            raise (Unauthenticated if stored is None else _WrongSecret)(
                "The API key is not one of this server's; check it."
            )
        now = self._clock.wall()
        if stored.revoked_at is not None:
            raise Unauthenticated(f"The API key {stored.id} was revoked; use another.", code="key_revoked")
        if stored.expires_at is not None and now >= stored.expires_at:
            raise Unauthenticated(f"The API key {stored.id} has expired; use another.", code="key_expired")
        if stored.former_digest and now >= stored.former_until and digest_of(key) == stored.former_digest:
            raise Unauthenticated(
                f"The API key {stored.id} was rotated and its time of grace has passed; use the new one.",
                code="key_rotated",
            )
        if stored.kind != wanted:
            raise Forbidden(
                f"The API key {stored.id} is an administrator's: it administers and does nothing else. Use a"
                " key of kind user for this."
                if stored.kind == "admin"
                else f"The API key {stored.id} may not administer; use a key of an administrator for this."
            )
        return known

    def _caller_of(self, key: StoredKey) -> Caller:
        return Caller(
            tenant=key.tenant or key.team or key.id,
            key_id=key.id,
            key_name=key.name,
            team=key.team,
            tags=key.tags,
            models=key.models,
            limits=key.limits,
            team_limits=self._teams.get(key.team, NOBODY.team_limits),
        )


def _fits(key: str, stored: StoredKey) -> bool:
    """Whether it is this key, or the one before its rotation; takes the same time for both."""
    digest = digest_of(key)
    is_present = hmac.compare_digest(digest, stored.digest)
    return hmac.compare_digest(digest, stored.former_digest or _NOBODYS_DIGEST) or is_present

"""Allowances counted in Redis, for several gateways together."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from stockpot.allowances import redis_scripts
from stockpot.allowances.periods import day_left_s, day_of, month_left_s
from stockpot.allowances.store import (
    AllowanceStore,
    Granted,
    Limit,
    Order,
    Refused,
    Report,
    Scope,
    StoreLost,
)
from stockpot.clock import Clock
from stockpot.errors import ConfigurationError

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from stockpot.settings_gateway import AllowanceSettings

_LOG = logging.getLogger(__name__)
_BATCH_MAX = 128
_RENEWED_AT_ONCE = 500
_WAITING_MAX = 20_000

_COUNTED = {
    Limit.TOKENS_PER_DAY: "d",
    Limit.TOKENS_PER_MONTH: "m",
    Limit.USD_PER_DAY: "u",
    Limit.USD_PER_MONTH: "v",
}
_BY_MONTH = (Limit.TOKENS_PER_MONTH, Limit.USD_PER_MONTH)

T = TypeVar("T")


class _Script:
    """A script and the name by which Redis remembers it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


_Call = tuple[_Script, tuple[str, ...], tuple[str | int, ...], "asyncio.Future[Any]"]


class RedisStore(AllowanceStore):
    """Redis 7 or newer, or Valkey, one primary; with a `maxmemory-policy` that evicts nothing, or budgets are
    forgotten.

    Calls that come while others are on their way travel together after them, in order: under load a round
    trip serves many requests. None waits longer than `timeout_s` for its turn on the wire.
    """

    def __init__(self, settings: AllowanceSettings, *, clock: Clock | None = None) -> None:
        """`clock` None: the time of Redis; one of one's own is for tests."""
        import redis.asyncio

        if settings.redis_url is None:
            raise ConfigurationError("There is no allowances.redis_url to keep allowances in.")
        password = settings.redis_password
        credentials: dict[str, Any] = {} if password is None else {"password": password.get_secret_value()}
        try:
            self._redis: Redis = redis.asyncio.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
                settings.redis_url, socket_connect_timeout=settings.timeout_s, **credentials
            )
        except ValueError:  # its words may hold a part of the password
            raise ConfigurationError(
                "allowances.redis_url does not fit; use redis://HOST:PORT/DB, rediss:// or unix://, and write"
                " what is special in a password as %XX (or set allowances.redis_password)."
            ) from None
        self._prefix = f"{settings.prefix}:allow"
        self._timeout_s = settings.timeout_s
        self._lease_ms = round(settings.lease_s * 1000)
        self._clock = clock
        self._reserve = _Script(redis_scripts.RESERVE)
        self._settle = _Script(redis_scripts.SETTLE)
        self._renew = _Script(redis_scripts.RENEW)
        self._report = _Script(redis_scripts.REPORT)
        self._waiting: deque[_Call] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def reserve(self, order: Order) -> Granted | Refused:
        limits = [("" if limit is None else limit) for scope in order.scopes for limit in scope.limits]
        reply = await self._submit(
            self._reserve,
            self._keys(order),
            (self._now(), order.id, order.tokens, order.nanousd, self._lease_ms, *limits),
        )
        if reply[0] == 1:
            left = float(reply[1])
            return Granted(None if left < 0 else left)
        scope, limit, used, wait_ms = int(reply[1]), Limit(reply[2]), int(reply[3]), int(reply[4])
        wait_s = None if wait_ms < 0 else wait_ms / 1000
        if wait_s == 0:  # until the next period
            now_s = int(reply[5]) / 1000
            wait_s = month_left_s(now_s) if limit in _BY_MONTH else day_left_s(now_s)
        return Refused(order.scopes[scope], limit, used, wait_s)

    def settle(self, order: Order, tokens: int, nanousd: int) -> asyncio.Future[None] | None:
        return self._submit(self._settle, self._keys(order), (self._now(), order.id, tokens, nanousd))

    async def renew(self, orders: Sequence[Order]) -> None:
        by_scope: dict[str, list[str]] = defaultdict(list)
        for order in orders:
            for scope in order.scopes:
                by_scope[self._key(scope)].append(order.id)
        calls = [
            self._submit(
                self._renew,
                (f"{key}:held",),
                (self._now(), self._lease_ms, *ids[start : start + _RENEWED_AT_ONCE]),
            )
            for key, ids in by_scope.items()
            for start in range(0, len(ids), _RENEWED_AT_ONCE)
        ]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def report(self, report: Report) -> None:
        counted = "".join(word for limit, word in _COUNTED.items() if report.scope.limits[limit] is not None)
        await self._submit(
            self._report,
            (f"{self._prefix}:report:{report.id}", self._key(report.scope)),
            (self._now(), day_of(report.at), report.tokens, report.nanousd, counted),
        )

    async def ping(self) -> None:
        # A command that writes: a server that is full or a replica answers PING and is of no use.
        await self._in_time(lambda: self._redis.set(f"{self._prefix}:ping", "1", ex=60))

    async def close(self) -> None:
        if self._sender is not None:
            await asyncio.wait([self._sender], timeout=2 * self._timeout_s)
            self._sender.cancel()
        with contextlib.suppress(OSError, self._error()):
            await self._redis.aclose()

    def _submit(
        self, script: _Script, keys: tuple[str, ...], arguments: tuple[str | int, ...]
    ) -> asyncio.Future[Any]:
        """Put a call in the line, at once."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if len(self._waiting) >= _WAITING_MAX:
            future.set_exception(StoreLost(f"{_WAITING_MAX:,} calls wait for Redis already"))
            return future
        self._waiting.append((script, keys, arguments, future))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
        return future

    async def _send(self) -> None:
        """Send what waits until nothing does. One failure fails all that wait: they would fail likewise,
        each after its own time."""
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH_MAX))]
            try:
                replies = await self._in_time(lambda batch=batch: self._run(batch))
            except StoreLost as error:
                batch += self._waiting
                self._waiting.clear()
                replies: list[Any] = [error] * len(batch)
            except BaseException:
                for call in (*batch, *self._waiting):
                    call[3].cancel()
                self._waiting.clear()
                raise
            for (*_, future), reply in zip(batch, replies, strict=True):
                if future.done():  # whoever waited is gone
                    continue
                if isinstance(reply, Exception):
                    future.set_exception(reply if isinstance(reply, StoreLost) else _lost(reply))
                    future.exception()  # nobody may be there to look at it: not a fault
                else:
                    future.set_result(reply)

    async def _run(self, batch: Sequence[_Call]) -> list[Any]:
        from redis.exceptions import NoScriptError

        replies = await self._exchange(batch)
        missing = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:  # first use, or Redis was restarted; what was not found was not run
            for script in {batch[place][0] for place in missing}:
                await self._redis.script_load(script.text)
            again = await self._exchange([batch[place] for place in missing])
            for place, reply in zip(missing, again, strict=True):
                replies[place] = reply
        return replies

    async def _exchange(self, batch: Sequence[_Call]) -> list[Any]:
        pipeline: Any = self._redis.pipeline(transaction=False)
        for script, keys, arguments, _ in batch:
            pipeline.execute_command("EVALSHA", script.sha, len(keys), *keys, *arguments)
        return await pipeline.execute(raise_on_error=False)

    async def _in_time(self, work: Callable[[], Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work()
        except TimeoutError as error:
            raise StoreLost(f"Redis has not answered within {self._timeout_s:g} s") from error
        except (OSError, self._error()) as error:
            raise _lost(error) from error

    def _error(self) -> type[Exception]:
        from redis.exceptions import RedisError

        return RedisError

    def _now(self) -> str | int:
        return "" if self._clock is None else round(self._clock.wall() * 1000)

    def _key(self, scope: Scope) -> str:
        return f"{self._prefix}:{scope.kind}:{scope.id}"

    def _keys(self, order: Order) -> tuple[str, ...]:
        keys: list[str] = []
        for scope in order.scopes:
            key = self._key(scope)
            keys += (key, f"{key}:held", f"{key}:gone")
        return tuple(keys)


def _lost(error: Exception) -> StoreLost:
    return StoreLost(f"Redis cannot be used ({type(error).__name__}: {error})")

"""One HTTP client for one backend: pooled connections, bounded reads, every failure with its cause."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from stockpot.backends.sse_reader import BrokenStream, SseReader
from stockpot.backends.upstream_errors import Failures
from stockpot.clock import Clock
from stockpot.errors import DeadlineExceeded, UpstreamError, cause_of
from stockpot.requests import Generation
from stockpot.settings_gateway import BackendSettings

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

T = TypeVar("T")

ANSWER_BYTES_MAX = 64 * 2**20
ERROR_BYTES_MAX = 64 * 2**10
_DRAIN_S = 1.0
_KEEP_ALIVE_S = 30.0


class Upstream:
    """Opened on the loop it is used on; `requests` and `failures` (by cause) count what was posted.

    An exchange ends in one of two ways: its answer was read to its end and the connection is kept, or
    the connection is closed at once, which is how a backend learns that nobody listens any more.
    """

    def __init__(
        self, name: str, settings: BackendSettings, *, clock: Clock, headers: Mapping[str, str]
    ) -> None:
        self.failures: Counter[str] = Counter()
        self.requests = 0
        self.fail = Failures(name)
        self._settings = settings
        self._clock = clock
        self._headers = {
            "accept-encoding": "identity",
            "user-agent": "stockpot",
            "content-type": "application/json",
            **{name.lower(): value.get_secret_value() for name, value in settings.headers.items()},
            **headers,
        }
        self._session: ClientSession | None = None
        self._responses: set[ClientResponse] = set()
        self._draining: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Make the pool; connects to nothing. Idempotent."""
        if self._session is not None:
            return
        import aiohttp

        limit = 2 * self._settings.max_concurrency
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=limit, limit_per_host=limit, keepalive_timeout=_KEEP_ALIVE_S, ttl_dns_cache=30
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            auto_decompress=False,
            trust_env=False,
            # All other limits of time depend on what is awaited, and are set where it is.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout_s),
        )

    async def close(self) -> None:
        """Close all connections, those in use too; whoever reads one is woken with an error. Idempotent."""
        session, self._session = self._session, None
        for response in tuple(self._responses):
            response.close()
        for task in tuple(self._draining):
            task.cancel()
        if session is not None:
            await session.close()

    async def post(self, url: str, body: bytes, generation: Generation | None = None) -> bytes:
        """The whole body of the answer."""
        async with self.exchange(url, body, generation) as exchange:
            return await exchange.whole()

    async def get(self, url: str, *, within_s: float) -> bytes:
        """The whole body of an answer to a GET; counted nowhere."""
        try:
            async with (
                asyncio.timeout(within_s),
                self._exchange(url, None, {}, self._clock.monotonic() + 2 * within_s, None) as exchange,
            ):
                return await exchange.whole()
        except TimeoutError as error:
            raise self.fail.error("timeout", f"did not answer within {within_s:g} s.") from error

    @asynccontextmanager
    async def exchange(
        self, url: str, body: bytes, generation: Generation | None = None
    ) -> AsyncGenerator[Exchange]:
        """Post `body` (JSON); entered when the answer's head came and its status is 200.

        Raises UpstreamError, or DeadlineExceeded when `generation.deadline_s` has passed; what is raised
        within is counted too.
        """
        now_s = self._clock.monotonic()
        headers: dict[str, str] = {}
        deadline_s: float | None = None
        if generation is not None:
            headers["x-request-id"] = generation.request_id
            if generation.trace_parent:
                headers["traceparent"] = generation.trace_parent
            if generation.deadline_s is not None:
                deadline_s = now_s + generation.deadline_s
        self.requests += 1
        try:
            async with self._exchange(
                url, body, headers, now_s + self._settings.first_byte_timeout_s, deadline_s
            ) as exchange:
                yield exchange
        except (asyncio.CancelledError, GeneratorExit):
            self.failures["cancelled"] += 1
            raise
        except Exception as error:
            self.failures[cause_of(error)] += 1
            raise

    @asynccontextmanager
    async def _exchange(
        self,
        url: str,
        body: bytes | None,
        headers: Mapping[str, str],
        first_byte_at_s: float,
        deadline_at_s: float | None,
    ) -> AsyncGenerator[Exchange]:
        from aiohttp import ClientError
        from yarl import URL

        session = self._session
        if session is None:
            raise self.fail.error("connect", "is not open; the gateway is starting or stopping.")
        limits = _Limits(
            self._clock, self.fail, first_byte_at_s, self._settings.idle_timeout_s, deadline_at_s
        )
        target = URL(url, encoded=True)
        try:
            response = await limits.hold(
                session.get(target, headers=headers, allow_redirects=False)
                if body is None
                else session.post(target, data=body, headers=headers, allow_redirects=False)
            )
        except (ClientError, OSError, ValueError) as error:
            limits.close()
            raise self.fail.of_exchange(error, answering=False) from error
        except BaseException:
            limits.close()
            raise
        exchange = Exchange(response, limits, self.fail)
        self._responses.add(response)
        try:
            if response.status != 200:
                told = await exchange.error_body()
                raise self.fail.of_answer(response.status, response.headers, told, now_s=self._clock.wall())
            if response.headers.get("content-encoding", "identity") != "identity":
                raise self.fail.error("format", "compressed its answer, though it was asked not to.")
            yield exchange
        finally:
            limits.close()
            self._responses.discard(response)
            self._finish(response, reusable=exchange.complete)

    def _finish(self, response: ClientResponse, *, reusable: bool) -> None:
        if not reusable:
            response.close()
        elif response.content.at_eof():
            response.release()
        else:
            # The end of the body may come a moment after `[DONE]`; nobody waits for it.
            task = asyncio.get_running_loop().create_task(_drain(response))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)


class Exchange:
    """An answer that is being read, whole or as a stream. `complete` once nothing of it is missing."""

    def __init__(self, response: ClientResponse, limits: _Limits, fail: Failures) -> None:
        self.complete = False
        self._response = response
        self._limits = limits
        self._fail = fail
        self._answering = False
        self._sse: SseReader | None = None

    async def whole(self) -> bytes:
        """The body, at most ANSWER_BYTES_MAX."""
        pieces: list[bytes] = []
        size = 0
        while piece := await self._piece():
            size += len(piece)
            if size > ANSWER_BYTES_MAX:
                raise self._fail.error("format", f"sent more than {ANSWER_BYTES_MAX} bytes.")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def error_body(self) -> bytes:
        """The beginning of the body of a refusal; what goes wrong here matters no more."""
        told = b""
        try:
            while len(told) < ERROR_BYTES_MAX and (piece := await self._piece()):
                told += piece
        except UpstreamError:
            return told
        return told[:ERROR_BYTES_MAX]

    async def payloads(self) -> list[bytes]:
        """The next payloads of the stream, as many as came together; none when the body has ended."""
        if self._sse is None:
            kind = self._response.headers.get("content-type", "")
            if not kind.lower().startswith("text/event-stream"):
                raise self._fail.instead_of_stream(await self.error_body())
            self._sse = SseReader()
        try:
            if self._sse.broken is not None:
                raise self._sse.broken
            while piece := await self._piece():
                if payloads := self._sse.feed(piece):
                    return payloads
        except BrokenStream as error:
            raise self._fail.error("format", f"sent a broken answer: {error}.") from error
        return []

    async def _piece(self) -> bytes:
        """What has come, waiting for it; empty at the end of the body."""
        from aiohttp import ClientError

        try:
            content = self._response.content
            # A short answer has come with its head: nothing is to be waited for, so no timer is needed.
            piece = content.read_nowait()
            if not piece and not content.at_eof():
                piece = await self._limits.hold(content.readany())
        except (ClientError, OSError) as error:
            raise self._fail.of_exchange(error, answering=self._answering) from error
        if piece:
            self._answering = True
            self._limits.piece_came()
        else:
            self.complete = True
        return piece


class _Limits:
    """How long the next piece may take: the first byte, then the silence between pieces, and the deadline of
    the whole.

    One timer serves all waits of an exchange: when it fires, it looks whether the wait of now is due, and is
    set anew where not. A timer for each wait would cost a stream more than reading its pieces does.
    """

    def __init__(
        self,
        clock: Clock,
        fail: Failures,
        first_byte_at_s: float,
        idle_s: float,
        deadline_at_s: float | None,
    ) -> None:
        self._clock = clock
        self._fail = fail
        self._idle_s = idle_s
        self._first_byte_at_s: float | None = first_byte_at_s
        self._deadline_at_s = deadline_at_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at_s = self._due_s = math.inf  # by the loop's clock
        self._waiting: asyncio.Task[Any] | None = None
        self._expired = False

    def piece_came(self) -> None:
        self._first_byte_at_s = None

    def close(self) -> None:
        """Nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def hold(self, awaited: Awaitable[T]) -> T:
        """Await it within the time that is left. Raises UpstreamError or DeadlineExceeded."""
        now_s = self._clock.monotonic()
        first_at_s = self._first_byte_at_s
        left_s = self._idle_s if first_at_s is None else first_at_s - now_s
        deadline_s = None if self._deadline_at_s is None else self._deadline_at_s - now_s
        is_deadline = deadline_s is not None and deadline_s <= left_s
        if deadline_s is not None and is_deadline:
            left_s = deadline_s
        self._due_s = self._loop.time() + left_s
        if self._due_s < self._fires_at_s:
            self._set(left_s)
        task = self._waiting = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            return await awaited
        except BaseException as error:
            # As asyncio.timeout does it: only the cancellation asked for here is turned into an error.
            if not (
                self._expired
                and task.uncancel() <= cancellations
                and isinstance(error, asyncio.CancelledError)
            ):
                raise
            if is_deadline:
                raise DeadlineExceeded(
                    "The request's deadline passed before its answer was complete; allow it more time."
                ) from error
            waited = "no byte of an answer" if first_at_s is not None else "no further piece of its answer"
            raise self._fail.error("timeout", f"sent {waited} in time; try again.") from error
        finally:
            self._waiting = None

    def _set(self, left_s: float) -> None:
        self.close()
        self._fires_at_s = self._loop.time() + left_s
        self._timer = self._loop.call_later(max(left_s, 0.0), self._fired)

    def _fired(self) -> None:
        self._timer, self._fires_at_s = None, math.inf
        if self._waiting is None:
            return  # the next wait sets it
        left_s = self._due_s - self._loop.time()
        if left_s > 0:
            self._set(left_s)
        else:
            self._expired = True
            self._waiting.cancel()


async def _drain(response: ClientResponse) -> None:
    """Read what is left, for a moment, so that the connection can be used again."""
    from aiohttp import ClientError

    try:
        async with asyncio.timeout(_DRAIN_S):
            while await response.content.readany():
                pass
        response.release()
    except (ClientError, OSError):
        return
    finally:
        response.close()

"""Carries a backend's events to the client: as one answer, or as a stream.

Both close the backend's stream, whatever happens, before they return: at the end, on an error, and at once
when the client goes away (also while the request waits for its first token).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stockpot.errors import StockpotError
from stockpot.events import Completed, Delta, Event, Finished, Progress, Queued, Started
from stockpot.requests import Dialect
from stockpot.wire import sse
from stockpot.wire.disconnect import ClientGone, while_connected
from stockpot.wire.errors import error_event, failure_of, request_id_in, respond
from stockpot.wire.keep_alive import KeepAlive
from stockpot.wire.progress import Waiting
from stockpot.wire.usage import headers_of, recall_headers_of

KEEP_ALIVE_S = 15.0
"""Of silence in a stream, until a comment breaks it."""


class Collector(ABC):
    """Gathers the events of one request into one answer."""

    @abstractmethod
    def delta(self, event: Delta) -> None: ...

    @abstractmethod
    def finished(self, event: Finished) -> None: ...

    @abstractmethod
    def answer(self, event: Completed) -> Any:
        """The body, encodable by msgspec."""


class Narrator(ABC):
    """Tells the events of one request as bytes of an SSE stream; b"" where there is nothing to say yet.

    `last` ends a stream that is whole, where its dialect is OpenAI's; empty where an API has no such end.
    """

    last: bytes = sse.DONE

    def started(self, event: Started) -> bytes:
        """The prompt is known and waits no longer."""
        del event
        return b""

    @abstractmethod
    def delta(self, event: Delta) -> bytes: ...

    @abstractmethod
    def finished(self, event: Finished) -> bytes: ...

    @abstractmethod
    def completed(self, event: Completed) -> bytes:
        """What comes before `last`."""

    def failed(self, error: StockpotError) -> bytes | None:
        """How a stream that has begun ends in an error; None: as the dialect tells errors."""
        del error
        return None


class CollectedAnswer(Response):
    """Waits for the whole answer, then sends it."""

    def __init__(
        self, events: AsyncGenerator[Event], collector: Collector, *, dialect: Dialect = "openai"
    ) -> None:
        # Without Response.__init__, which prepares a body and headers that this one does not have.
        self.background = None
        self._events = events
        self._collector = collector
        self._dialect: Dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events), while_connected(receive):
                completed = await self._collected()
        except ClientGone:
            return
        except StockpotError as error:
            await _refuse(error, self._dialect, scope, receive, send)
            return
        body = msgspec.json.encode(self._collector.answer(completed))
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", b"application/json"),
            *headers_of(completed),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _collected(self) -> Completed:
        collector = self._collector
        completed: Completed | None = None
        # To the end, not to `Completed` alone: a backend may still have something to put away behind it.
        async for event in self._events:
            match event:
                case Delta():
                    collector.delta(event)
                case Finished():
                    if failure := failure_of(event):
                        raise failure
                    collector.finished(event)
                case Completed():
                    completed = event
                case Queued() | Started() | Progress():
                    pass
        if completed is None:
            raise RuntimeError("the events of a request ended without Completed")
        return completed


class StreamedAnswer(Response):
    """Sends each token as it comes.

    The status line waits for the backend's first event, so that a request it refuses gets its status.
    Afterwards an error can only be told inside the stream, which it ends (without `last`). While the request
    waits, comments say why; `progress_events` says it in events instead.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event],
        narrator: Narrator,
        *,
        dialect: Dialect = "openai",
        progress_events: bool = False,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self.background = None  # as in CollectedAnswer
        self._events = events
        self._narrator = narrator
        self._dialect: Dialect = dialect
        self._waiting = Waiting(events=progress_events)
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async with aclosing(self._events), while_connected(receive):
                first = await anext(self._events)
                begun = True
                headers = list(sse.HEADERS)
                if isinstance(first, Queued) and first.recalled is not None:
                    headers += recall_headers_of(first.recalled)
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                last = await self._streamed(first, send)
        except ClientGone:
            return
        except StockpotError as error:
            if begun:
                raise
            await _refuse(error, self._dialect, scope, receive, send)
            return
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _streamed(self, first: Event, send: Send) -> bytes:
        """Send all but the last bytes, and return those: they go out with the end of the response."""
        narrator = self._narrator
        # The end of a choice is held until the next event: it is nearly always followed at once by the end
        # of the request, and every send is a system call.
        held, whole = b"", False
        keep_alive = KeepAlive(send, self._keep_alive_s)
        try:
            if isinstance(first, Queued) and (chunk := self._waiting.told(first)):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            async for event in self._events:
                match event:
                    case Delta():
                        chunk = narrator.delta(event)
                    case Finished():
                        if failure := failure_of(event):
                            raise failure
                        held += narrator.finished(event)
                        continue
                    case Completed():
                        held += narrator.completed(event)
                        whole = True
                        continue
                    case Queued() | Progress():
                        chunk = self._waiting.told(event)
                    case Started():
                        chunk = narrator.started(event)
                if chunk:
                    await send({"type": "http.response.body", "body": held + chunk, "more_body": True})
                    keep_alive.touched()
                    held = b""
        except StockpotError as error:
            told = narrator.failed(error)
            return held + (error_event(error, self._dialect) if told is None else told)
        finally:
            keep_alive.stop()
        if not whole:
            raise RuntimeError("the events of a request ended without Completed")
        return held + narrator.last if self._dialect == "openai" else held


async def _refuse(error: StockpotError, dialect: Dialect, scope: Scope, receive: Receive, send: Send) -> None:
    await respond(error, dialect, request_id=request_id_in(scope))(scope, receive, send)

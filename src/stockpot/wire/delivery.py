"""Carries a backend's events to the client: as one answer, or as a stream.

Both close the backend's stream, whatever happens, before they return: at the end, on an error, and at once
when the client goes away (also while the request waits for its first token).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stockpot.errors import StockpotError
from stockpot.events import Completed, Delta, Event, Finished, Progress, Queued, Started
from stockpot.wire import sse
from stockpot.wire.disconnect import ClientGone, while_connected
from stockpot.wire.errors import body_of, failure_of, json_response


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
    """Tells the events of one request as bytes of an SSE stream; b"" where there is nothing to say yet."""

    @abstractmethod
    def delta(self, event: Delta) -> bytes: ...

    @abstractmethod
    def finished(self, event: Finished) -> bytes: ...

    @abstractmethod
    def completed(self, event: Completed) -> bytes:
        """What comes before `[DONE]`."""


class CollectedAnswer(Response):
    """Waits for the whole answer, then sends it."""

    def __init__(self, events: AsyncGenerator[Event], collector: Collector) -> None:
        super().__init__()
        self._events = events
        self._collector = collector

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events), while_connected(receive):
                body = await self._collected()
        except ClientGone:
            return
        await json_response(body)(scope, receive, send)

    async def _collected(self) -> Any:
        body: Any = None
        async for event in self._events:
            match event:
                case Delta():
                    self._collector.delta(event)
                case Finished():
                    if failure := failure_of(event):
                        raise failure
                    self._collector.finished(event)
                case Completed():
                    body = self._collector.answer(event)
                case Queued() | Started() | Progress():
                    pass
        return body


class StreamedAnswer(Response):
    """Sends each token as it comes.

    The status line waits for the backend's first event, so that a request it refuses gets its status.
    Afterwards an error can only be told inside the stream, which it ends (without `[DONE]`).
    """

    def __init__(self, events: AsyncGenerator[Event], narrator: Narrator) -> None:
        super().__init__()
        self._events = events
        self._narrator = narrator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        try:
            async with aclosing(self._events), while_connected(receive):
                await anext(self._events)
                await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
                last = await self._streamed(send)
        except ClientGone:
            return
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _streamed(self, send: Send) -> bytes:
        """Send all but the last bytes, and return those: they go out with the end of the response."""
        narrator = self._narrator
        # The end of a choice is held until the next event: it is nearly always followed at once by the end
        # of the request, and every send is a system call.
        held = b""
        try:
            async for event in self._events:
                match event:
                    case Delta():
                        chunk = narrator.delta(event)
                        if chunk:
                            await send(
                                {"type": "http.response.body", "body": held + chunk, "more_body": True}
                            )
                            held = b""
                    case Finished():
                        if failure := failure_of(event):
                            raise failure
                        held += narrator.finished(event)
                    case Completed():
                        held += narrator.completed(event) + sse.DONE
                    case Queued() | Started() | Progress():
                        pass
        except StockpotError as error:
            return held + sse.Framer().event(body_of(error))
        return held

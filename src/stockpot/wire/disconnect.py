"""Notices a client that goes away while its request is served."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

_QUICK_S = 0.02
"""For so long nobody listens: an answer that is quick is over by then, and a task for each of them would cost
as much as reading the request. A client that goes meanwhile is noticed at the end of it."""


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class while_connected:  # noqa: N801 - read as a statement: `async with while_connected(receive):`
    """Run the body; when the client goes, cancel it where it waits and raise ClientGone.

    The request's body must have been read: from then on `receive` has nothing to say but that the client is
    gone. The cancellation is delivered once, so cleaning up may wait.
    """

    __slots__ = ("_cancellations_before", "_gone", "_listener", "_receive", "_task", "_timer")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._listener: asyncio.Task[None] | None = None
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancellations_before = task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(_QUICK_S, self._listen)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._listener is not None:
            self._listener.remove_done_callback(self._cancel)
            self._listener.cancel()
        # As asyncio.timeout does it: only what we asked for becomes ours, a cancellation from outside passes.
        if (
            self._gone
            and isinstance(error, asyncio.CancelledError)
            and self._task.uncancel() <= self._cancellations_before
        ):
            raise ClientGone from None

    def _listen(self) -> None:
        self._listener = asyncio.get_running_loop().create_task(_disconnect(self._receive))
        self._listener.add_done_callback(self._cancel)

    def _cancel(self, _: asyncio.Task[None]) -> None:
        self._gone = True
        self._task.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

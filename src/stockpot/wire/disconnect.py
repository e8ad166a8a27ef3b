"""Notices a client that goes away while its request is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.types import Receive


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncGenerator[None, None]:
    """Run the body; when the client goes, cancel it where it waits and raise ClientGone.

    The request's body must have been read: from then on `receive` has nothing to say but that the client is
    gone. The cancellation is delivered once, so cleaning up may wait.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def cancel(_: asyncio.Task[None]) -> None:
        nonlocal gone
        gone = True
        task.cancel()

    cancellations_before = task.cancelling()
    listener = asyncio.create_task(_disconnect(receive))
    listener.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError:
        # As asyncio.timeout does it: only what we asked for becomes ours, a cancellation from outside passes.
        if gone and task.uncancel() <= cancellations_before:
            raise ClientGone from None
        raise
    finally:
        listener.remove_done_callback(cancel)
        listener.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

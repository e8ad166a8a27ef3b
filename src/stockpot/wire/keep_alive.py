"""Comments in a stream that is silent, so that no proxy in between takes it for dead."""

from __future__ import annotations

import asyncio

from starlette.types import Send

from stockpot.wire import sse


class KeepAlive:
    """Sends a comment after each `silence_s` in which `touched` was not called, from `start` to `stop`.

    One timer for a stream, set anew only when it fires: a chunk costs no more than remembering the time.
    Everything that is sent is whole events, so a comment always stands between two.
    """

    __slots__ = ("_loop", "_quiet_since_s", "_send", "_sending", "_silence_s", "_timer")

    def __init__(self, send: Send, silence_s: float) -> None:
        self._send = send
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._quiet_since_s = self._loop.time()
        self._timer = self._loop.call_later(silence_s, self._look)
        self._sending: asyncio.Task[None] | None = None

    def touched(self) -> None:
        """Something was sent."""
        self._quiet_since_s = self._loop.time()

    def stop(self) -> None:
        """Nothing is sent from now on."""
        self._timer.cancel()
        if self._sending is not None:
            self._sending.cancel()

    def _look(self) -> None:
        silent_s = self._loop.time() - self._quiet_since_s
        # A comment that is still on its way means that the client does not read: more would only pile up.
        if silent_s >= self._silence_s and (self._sending is None or self._sending.done()):
            self._sending = self._loop.create_task(self._comment())
            silent_s = 0.0
            self.touched()
        self._timer = self._loop.call_later(max(self._silence_s - silent_s, 0.001), self._look)

    async def _comment(self) -> None:
        try:
            await self._send(
                {"type": "http.response.body", "body": sse.comment("keep-alive"), "more_body": True}
            )
        except OSError:
            return  # the client is gone, which `while_connected` sees to

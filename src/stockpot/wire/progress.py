"""Tells a waiting client of a stream why it waits: its place in the queue, and how far its prompt is read."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from stockpot.events import Progress, Queued
from stockpot.wire.sse import Framer, comment

EVENT_NAME = b"stockpot.progress"


class ProgressBody(msgspec.Struct, frozen=True):
    """The data of one event. `position` requests stand before this one; of `total` prompt tokens that were
    not cached, `done` are prefilled."""

    state: Literal["queued", "prefill"]
    position: int | UnsetType = UNSET
    done: int | UnsetType = UNSET
    total: int | UnsetType = UNSET


class Waiting:
    """Says each change once, in comments, or in events where the client asked for them."""

    __slots__ = ("_events", "_position")

    def __init__(self, *, events: bool) -> None:
        self._events = events
        self._position = 0

    def told(self, event: Queued | Progress) -> bytes:
        """What goes out for an event; b"" for what the client knows."""
        if isinstance(event, Progress):
            if self._events:
                return self._named(ProgressBody("prefill", done=event.done, total=event.total))
            return comment(f"prefill {event.done}/{event.total}")
        if event.position == self._position:
            return b""
        self._position = event.position
        if self._events:
            return self._named(ProgressBody("queued", position=event.position))
        return comment(f"queued position={event.position}")

    def _named(self, body: ProgressBody) -> bytes:
        return Framer().named(EVENT_NAME, body)

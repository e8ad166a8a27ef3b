"""Follows the KV events of one backend over ZeroMQ, so that its prefix index says what it holds now.

    SUB       (topic, sequence number, payload)            sequence: 8 bytes, big-endian
    DEALER    ("", first sequence number wanted)  ->  ("", sequence number, payload) ..., ("", -1, "")

The format is vLLM's (`vllm/distributed/kv_events.py`), which Stockpot publishes too. What was missed is asked
for again. Whatever cannot be recovered empties the index: it may know less than is true, never more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from stockpot.routing.kv_event_reader import BatchReader
from stockpot.routing.prefix_index import IndexStats, PrefixIndex

if TYPE_CHECKING:
    import zmq
    import zmq.asyncio

LOG = logging.getLogger(__name__)

RECEIVE_HWM = 100_000
MESSAGE_BYTES_MAX = 64 * 2**20
REPLAY_SILENCE_S = 5.0
"""A replay that says nothing for this long has failed."""
REPLAY_RETRY_S = 5.0
"""A backend that was not there when it was asked first is asked again after this."""
BREATH = 8
"""Messages applied in a row before others have their turn."""
END_OF_REPLAY = -1
NOTHING_APPLIED = -1


@dataclass(frozen=True, slots=True)
class FollowerStats:
    """A snapshot; counts since the start. `live`: the index is what the backend told."""

    live: bool
    batches: int
    gaps: int
    recovered: int
    garbage: int
    unknown: int
    index: IndexStats


class _ReplayFailed(Exception):
    """No complete answer to a request for what was missed."""


class KvEventFollower:
    """One backend's events, applied to `index` on the event loop.

    `address` and `replay_address` are ZeroMQ addresses to connect to; without the second, a gap empties the
    index. Nothing raises while it runs: `live` says whether there is anything to go by.
    """

    def __init__(
        self,
        name: str,
        address: str,
        replay_address: str | None,
        index: PrefixIndex,
        *,
        replay_silence_s: float = REPLAY_SILENCE_S,
    ) -> None:
        self.index = index
        self._name = name
        self._address = address
        self._replay_address = replay_address
        self._replay_silence_s = replay_silence_s
        self._reader = BatchReader(index)
        self._task: asyncio.Task[None] | None = None
        self._live = False
        # The last batch the index contains: its number, its time, and its bytes in short.
        self._applied = NOTHING_APPLIED
        self._applied_ts = float("-inf")
        self._applied_digest = 0
        self._streamed = NOTHING_APPLIED  # the last number on the subscription itself
        self._batches = self._gaps = self._recovered = self._garbage = 0

    @property
    def live(self) -> bool:
        """Whether the index goes by what the backend told: it has been heard, and following goes on."""
        return self._live

    def start(self) -> None:
        """Begin to follow, in a task of the running loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(
                self._run(), name=f"kv events of {self._name}"
            )

    async def stop(self) -> None:
        """Leave off. Idempotent."""
        task, self._task = self._task, None
        self._live = False
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def stats(self) -> FollowerStats:
        return FollowerStats(
            self._live,
            self._batches,
            self._gaps,
            self._recovered,
            self._garbage,
            self._reader.unknown,
            self.index.stats(),
        )

    async def _run(self) -> None:
        import zmq
        import zmq.asyncio

        context = zmq.asyncio.Context()
        try:
            await self._follow(context)
        except zmq.ZMQError as error:
            LOG.error(  # noqa: TRY400  the message says it all
                "KV events of backend %r cannot be followed at %s (%s); what it has cached is estimated from"
                " here on. Correct kv_events and kv_replay, or leave them out.",
                self._name,
                self._address,
                error,
            )
        finally:
            self._live = False
            context.destroy(linger=0)

    async def _follow(self, context: zmq.asyncio.Context) -> None:
        import zmq

        subscription = context.socket(zmq.SUB)
        subscription.set(zmq.RCVHWM, RECEIVE_HWM)
        subscription.set(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        subscription.set(zmq.SUBSCRIBE, b"")
        subscription.connect(self._address)
        # Subscribed first, then asked for the past: what comes meanwhile waits, and is known when it is seen
        # a second time.
        await self._learn_the_past(context, subscription)
        received = 0
        while True:
            match await subscription.recv_multipart():
                case [_, number, payload] if len(number) == 8 and number[0] < 0x80:
                    await self._receive(context, int.from_bytes(number, "big"), payload)
                case _:
                    self._garbage += 1
            received += 1
            if received % BREATH == 0:
                await asyncio.sleep(0)

    async def _learn_the_past(self, context: zmq.asyncio.Context, subscription: zmq.asyncio.Socket) -> None:
        """Ask until the backend answers, or publishes: it may start after us."""
        if self._replay_address is None:
            return
        while not await subscription.poll(0):
            try:
                await self._replay(context)
            except _ReplayFailed:
                await subscription.poll(round(REPLAY_RETRY_S * 1000))
            else:
                self._live = True
                return

    async def _receive(self, context: zmq.asyncio.Context, number: int, payload: bytes) -> None:
        """One message of the subscription."""
        try:
            ts = self._reader.time_of(payload)
        except msgspec.DecodeError as error:
            # Its number means as much as its bytes. If it was one of ours, the next one shows a gap.
            self._garbage += 1
            LOG.debug("what backend %r published as number %d is no batch: %s", self._name, number, error)
            return
        streamed, self._streamed = self._streamed, number
        if number <= self._applied:
            # One socket delivers in order, and a batch seen in a replay is no younger than the last of it.
            # Anything else is the first we see of a publisher that has begun again.
            if number > streamed and ts <= self._applied_ts:
                return
            self._forget("its publisher has started again")
        if number > self._applied + 1:
            await self._close_gap(context, number)
        if number > self._applied:
            self._apply(number, payload)

    async def _close_gap(self, context: zmq.asyncio.Context, number: int) -> None:
        """Bring in what came before `number`; where that cannot be had, forget what it might contradict."""
        first = self._applied == NOTHING_APPLIED
        self._gaps += not first
        try:
            before = self._batches
            await self._replay(context)
            self._recovered += self._batches - before
        except _ReplayFailed as error:
            if not first:
                self._forget(f"events before number {number} were missed, and {error}")
            return
        if NOTHING_APPLIED < self._applied < number - 1:
            self._forget(f"the events from {self._applied + 1} to {number - 1} are not to be had any more")

    async def _replay(self, context: zmq.asyncio.Context) -> None:
        """Apply what is kept of the events since the last one applied. That one is asked for again: if it is
        not what it was, the publisher is another, and all it keeps is wanted. Raises _ReplayFailed."""
        while True:
            begun_at = self._applied
            received = 0
            other = False
            async with aclosing(self._kept_since(context, max(begun_at, 0))) as kept:
                async for number, payload in kept:
                    received += 1
                    if number == self._applied:
                        other = number == begun_at and hash(payload) != self._applied_digest
                        if other:
                            break
                    elif number > self._applied:
                        if number > self._applied + 1 and self._applied != NOTHING_APPLIED:
                            self._forget(f"the events before number {number} are not to be had any more")
                        self._apply(number, payload)
                    if received % BREATH == 0:
                        await asyncio.sleep(0)
            if not other:
                return
            self._forget("its publisher is another than before")

    async def _kept_since(
        self, context: zmq.asyncio.Context, first: int
    ) -> AsyncGenerator[tuple[int, bytes]]:
        """The answer to one request for events from number `first` on. Raises _ReplayFailed."""
        import zmq

        if self._replay_address is None:
            raise _ReplayFailed("no kv_replay address is set")
        # A socket for each request: no answer to an earlier one can get in between.
        asking = context.socket(zmq.DEALER)
        try:
            asking.set(zmq.RCVHWM, RECEIVE_HWM)
            asking.set(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
            asking.set(zmq.LINGER, 0)
            asking.connect(self._replay_address)
            await asking.send(b"", zmq.SNDMORE)
            await asking.send(first.to_bytes(8, "big"))
            while await asking.poll(round(self._replay_silence_s * 1000)):
                match await asking.recv_multipart():
                    case [*_, number, payload] if len(number) == 8:
                        decoded = int.from_bytes(number, "big", signed=True)
                        if decoded == END_OF_REPLAY:
                            return
                        yield decoded, payload
                    case _:
                        self._garbage += 1
            raise _ReplayFailed(f"{self._replay_address} was silent for {self._replay_silence_s:g} s")
        finally:
            asking.close()

    def _apply(self, number: int, payload: bytes) -> None:
        try:
            self._reader.apply(payload)
            self._applied_ts = self._reader.time_of(payload)
            self._live = True
        except (msgspec.DecodeError, OverflowError, TypeError) as error:
            # It may have taken blocks away. Asking for it again would bring the same bytes.
            self._garbage += 1
            if self._live:
                self._forget(f"batch {number} cannot be read: {error}")
            self._live = False
        self._applied = number
        self._applied_digest = hash(payload)
        self._batches += 1

    def _forget(self, why: str) -> None:
        LOG.warning("forgot what backend %r has cached: %s", self._name, why)
        self.index.clear()
        self._applied = NOTHING_APPLIED
        self._applied_ts = float("-inf")
        self._applied_digest = 0

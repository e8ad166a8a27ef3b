"""KV events on ZeroMQ: published as they happen, kept for a while, sent again to those who missed some.

    PUB     (topic, sequence number, payload)                       sequence: 8 bytes, big-endian
    ROUTER  ("", first sequence number wanted) from a REQ or DEALER
            ("", sequence number, payload) for each batch kept since, ..., ("", -1, "")

Nothing here holds up who publishes. A batch that finds the queue full pushes the oldest out, a subscriber
that does not read loses what comes meanwhile; either way the sequence numbers it sees jump, and it asks for
the missing ones, or, where these are kept no longer, forgets what it knew of this node.

Events carry the token ids of prompts: bind where only those connect who may read them.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from stockpot.clock import Clock, SystemClock
from stockpot.errors import ConfigurationError
from stockpot.kv.kv_events import KvEvent, KvEventBatch, encode

if TYPE_CHECKING:
    import zmq

LOG = logging.getLogger(__name__)

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
REPLAYS_AT_ONCE = 8
"""Further requests wait in the socket, or are lost when that is full too; who asked asks again."""
TURN = 256
"""Messages sent in a row before the thread looks after its other work."""
FLUSH_S = 1.0
LINGER_MS = 500
REPLAY_RETRY_MS = 10
REPLAY_STALL_S = 10.0
REQUEST_BYTES = 1024
WARN_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class PublisherStats:
    """A snapshot; counts of batches since start."""

    published: int
    dropped: int
    """Pushed out of a full queue, or not to be encoded. Each took a sequence number."""
    replayed: int
    refused_requests: int
    kept: int
    kept_bytes: int


@dataclass(slots=True)
class _Replay:
    """What is still to be sent to one client; `moved_s` is when something last could be."""

    client: bytes
    messages: deque[tuple[bytes, bytes]]
    moved_s: float


class KvEventPublisher:
    """Publishes batches of KV events from a thread of its own.

    `endpoint` and `replay_endpoint` are ZeroMQ addresses to bind; port 0 takes any free one. At most
    `queue_batches` wait to be sent, the last `buffer_steps` batches, of together at most `buffer_bytes`, are
    kept for replay, and `hwm` messages for each slow subscriber.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:5557",
        *,
        replay_endpoint: str | None = None,
        topic: str = "",
        data_parallel_rank: int = 0,
        queue_batches: int = 10_000,
        buffer_steps: int = 10_000,
        buffer_bytes: int = 64 * 2**20,
        hwm: int = 10_000,
        clock: Clock | None = None,
    ) -> None:
        if min(queue_batches, hwm) < 1:
            raise ConfigurationError(
                f"KV events need room for at least one batch, not queue_batches={queue_batches}, hwm={hwm}."
            )
        self._endpoint = endpoint
        self._replay_endpoint: str | None = replay_endpoint
        self._topic = topic.encode()
        self._rank = data_parallel_rank
        self._queue_batches = queue_batches
        self._buffer_steps = buffer_steps
        self._buffer_bytes = buffer_bytes
        self._hwm = hwm
        self._clock = clock or SystemClock()

        # Between the threads, under the lock, which nobody holds for longer than a few instructions.
        self._lock = threading.Lock()
        self._queue: deque[tuple[float, Iterable[KvEvent]]] = deque()
        self._pushed_out = 0  # since the last batch was taken; all of them older than what the queue holds
        self._woken = False
        self._closing = False
        self._wake: socket.socket | None = None
        self._thread: threading.Thread | None = None

        # The thread's own. Others read the counts.
        self._sequence = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._replays: deque[_Replay] = deque()
        self._published = 0
        self._dropped = 0
        self._warn_again_s = float("-inf")
        self._replayed = 0
        self._refused_requests = 0

    @property
    def endpoint(self) -> str:
        """Where events are published; after `start` with the port that was bound."""
        return self._endpoint

    @property
    def replay_endpoint(self) -> str | None:
        """Where missed events can be asked for; None if they cannot."""
        return self._replay_endpoint

    def start(self) -> None:
        """Bind and begin to send, first what was published before. Once; `ConfigurationError` if an address
        cannot be bound."""
        import zmq

        if self._thread is not None or self._closing:
            raise RuntimeError("a KV event publisher starts once; make another one")
        context = zmq.Context()
        replay: zmq.Socket[bytes] | None = None
        replay_endpoint: str | None = None
        try:
            publisher = context.socket(zmq.PUB)
            publisher.set(zmq.SNDHWM, self._hwm)
            endpoint = _bind(publisher, self._endpoint)
            if self._replay_endpoint is not None:
                replay = context.socket(zmq.ROUTER)
                # Without this a client's full pipe swallows messages; with it, sending says so and we wait.
                replay.set(zmq.ROUTER_MANDATORY, 1)
                replay.set(zmq.MAXMSGSIZE, REQUEST_BYTES)
                replay_endpoint = _bind(replay, self._replay_endpoint)
        except ConfigurationError:
            context.destroy(linger=0)
            raise
        self._endpoint, self._replay_endpoint = endpoint, replay_endpoint
        woken, wake = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        self._thread = threading.Thread(
            target=self._run, args=(context, publisher, replay, woken), name="kv-events", daemon=True
        )
        with self._lock:
            self._wake = wake
            self._woken = True  # the thread looks at the queue before it waits
        self._thread.start()

    def publish(self, events: Iterable[KvEvent]) -> None:
        """Hand over events that happened now. Never waits, never raises; ignored after `close`.

        `events` may be lazy, as of `kv_events.stored_events`: it is gone through on the publisher's thread.
        A batch without events is not sent.
        """
        happened_s = self._clock.wall()
        with self._lock:
            if self._closing:
                return
            if len(self._queue) >= self._queue_batches:
                self._queue.popleft()
                self._pushed_out += 1
            self._queue.append((happened_s, events))
            self._wake_thread()

    def stats(self) -> PublisherStats:
        """May be called from any thread."""
        return PublisherStats(
            self._published,
            self._dropped,
            self._replayed,
            self._refused_requests,
            len(self._kept),
            self._kept_bytes,
        )

    def close(self) -> None:
        """Send what is queued, as far as a second allows, and stop. Idempotent."""
        with self._lock:
            self._closing = True
            self._woken = False  # the thread may be past its look at `_closing`, and about to wait
            self._wake_thread()
        if self._thread is None:
            return
        self._thread.join(FLUSH_S + 4 * LINGER_MS / 1000)
        if self._thread.is_alive():
            LOG.warning(
                "the thread of KV events on %s is still busy; it ends with the process", self._endpoint
            )
            return
        with self._lock:
            wake, self._wake = self._wake, None
        if wake is not None:
            wake.close()

    def _wake_thread(self) -> None:
        """The lock is held. Two bytes are on their way at most, so there is always room."""
        if not self._woken and self._wake is not None:
            self._woken = True
            with suppress(OSError):  # the thread has failed, which it has said
                self._wake.send(b"\0")

    # The thread.

    def _run(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        publisher: zmq.Socket[bytes],
        replay: zmq.Socket[bytes] | None,
        woken: socket.socket,
    ) -> None:
        import zmq

        try:
            self._serve(publisher, replay, woken)
            self._flush(publisher)
        except zmq.ZMQError as error:
            LOG.error(  # noqa: TRY400  the message says it all
                "KV events on %s end here, restart the server to have them again: %s", self._endpoint, error
            )
        finally:
            context.destroy(linger=LINGER_MS)
            woken.close()

    def _serve(
        self, publisher: zmq.Socket[bytes], replay: zmq.Socket[bytes] | None, woken: socket.socket
    ) -> None:
        import zmq

        poller = zmq.Poller()
        poller.register(woken.fileno(), zmq.POLLIN)
        while not self._closing:
            more = self._publish_some(publisher)
            if replay is not None:
                self._accept(replay)
                more |= self._replay_some(replay)
                # While all places are taken further requests wait in the socket, and must not wake us.
                if len(self._replays) < REPLAYS_AT_ONCE:
                    poller.register(replay, zmq.POLLIN)
                elif replay in poller:
                    poller.unregister(replay)
            wait_ms = 0 if more else REPLAY_RETRY_MS if self._replays else None
            poller.poll(wait_ms)
            with suppress(BlockingIOError):
                woken.recv(64)

    def _flush(self, publisher: zmq.Socket[bytes]) -> None:
        deadline_s = self._clock.monotonic() + FLUSH_S
        while self._publish_some(publisher):
            if self._clock.monotonic() > deadline_s:
                LOG.warning("%d batches of KV events were not sent before the end", len(self._queue))
                return

    def _publish_some(self, publisher: zmq.Socket[bytes]) -> bool:
        """Send up to `TURN` batches; whether more wait."""
        for _ in range(TURN):
            with self._lock:
                pushed_out, self._pushed_out = self._pushed_out, 0
                if not self._queue:
                    self._woken = False
                    return False
                happened_s, events = self._queue.popleft()
            if pushed_out:
                self._pass_over(pushed_out, "the queue was full")
            try:
                batch = KvEventBatch(happened_s, tuple(events), self._rank)
                payload = encode(batch) if batch.events else None
            except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
                self._pass_over(1, f"not to be encoded: {error}")
                continue
            if payload is not None:
                publisher.send_multipart((self._topic, self._sequence.to_bytes(8, "big"), payload))
                self._published += 1
                self._keep(payload)
        return True

    def _pass_over(self, batches: int, why: str) -> None:
        """Each takes a number, which nobody will see: that is how consumers learn of it."""
        self._sequence += batches
        self._dropped += batches
        now_s = self._clock.monotonic()
        if now_s >= self._warn_again_s:
            self._warn_again_s = now_s + WARN_EVERY_S
            LOG.warning(
                "KV events were dropped, %d batches since the start; the last: %s", self._dropped, why
            )

    def _keep(self, payload: bytes) -> None:
        self._kept.append((self._sequence, payload))
        self._kept_bytes += len(payload)
        self._sequence += 1
        while len(self._kept) > self._buffer_steps or self._kept_bytes > self._buffer_bytes:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _accept(self, replay: zmq.Socket[bytes]) -> None:
        import zmq

        while len(self._replays) < REPLAYS_AT_ONCE:
            try:
                frames = replay.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            match frames:
                case [client, b"", start] if len(start) == 8:
                    self._replays.append(
                        _Replay(client, self._kept_since(start), moved_s=self._clock.monotonic())
                    )
                case _:
                    self._refused_requests += 1
                    LOG.debug(
                        "a replay of KV events was asked for with %d frames that mean nothing", len(frames)
                    )

    def _kept_since(self, start: bytes) -> deque[tuple[bytes, bytes]]:
        first = int.from_bytes(start, "big")
        kept = ((at.to_bytes(8, "big"), payload) for at, payload in self._kept if at >= first)
        return deque((*kept, (END_OF_REPLAY, b"")))

    def _replay_some(self, replay: zmq.Socket[bytes]) -> bool:
        """Give each client a turn; whether one could take more at once. A client that takes nothing for
        `REPLAY_STALL_S` is given up."""
        import zmq

        more = False
        for _ in range(len(self._replays)):
            turn = self._replays.popleft()
            try:
                for _ in range(min(TURN, len(turn.messages))):
                    replay.send_multipart((turn.client, b"", *turn.messages[0]), zmq.NOBLOCK)
                    self._replayed += turn.messages.popleft()[0] != END_OF_REPLAY
                    turn.moved_s = self._clock.monotonic()
                more |= bool(turn.messages)
            except zmq.Again:
                if self._clock.monotonic() - turn.moved_s > REPLAY_STALL_S:
                    continue
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                continue  # the client has gone
            if turn.messages:
                self._replays.append(turn)
        return more


def _bind(bound: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind; the address with the port that was taken."""
    import zmq

    try:
        bound.bind(endpoint)
    except zmq.ZMQError as error:
        raise ConfigurationError(
            f"KV events cannot be offered on {endpoint!r}: {error.strerror}. Set another endpoint, "
            "such as 'tcp://127.0.0.1:0' for any free port, or turn KV events off."
        ) from error
    return bound.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

"""Load on an OpenAI chat endpoint from a process of its own, cheaply: it shares processors with the server.

`python -m stockpot.bench.load_generator` takes a plan as JSON on stdin and gives a reading as JSON on stdout;
`run_load` does that. A request costs it some 15 us: connections are kept, requests are bytes with a number
put in, answers are looked at just closely enough to know their end.

Closed loop: `connections` clients, each asks again as soon as it is answered. Open loop (`rate_per_s`):
requests come at their times whatever the server does, and latency counts from the time a request was due,
so that those a slow server keeps from being sent are counted too. Streams: each connection reads one answer
of the mock provider, whose chunks say when they were sent.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import msgspec

from stockpot.bench.http_stream import BodyDecoder, EventSplitter
from stockpot.bench.statistics import percentile
from stockpot.errors import ServerUnreachable

_SYSTEM = " ".join(["You answer briefly, in the language of the question, and never make anything up."] * 10)
_NUMBER = "00000000"
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_SENT_AT = re.compile(rb"@(\d+\.\d+)@")
_HEAD_BYTES_MAX = 1 << 16


class LoadPlan(msgspec.Struct, frozen=True):
    """Until `requests` are answered or `seconds` have passed, whichever is given; each stream ends by itself.
    After `give_up_s` more, what is still unanswered has failed."""

    url: str
    key: str
    model: str
    connections: int
    requests: int = 0
    seconds: float = 0.0
    rate_per_s: float = 0.0
    stream: bool = False
    give_up_s: float = 120.0


class Times(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, values_s: list[float]) -> Times:
        """Summarise. Raises ValueError for no values."""
        p50, p95, p99, most = (percentile(values_s, share) * 1e3 for share in (0.5, 0.95, 0.99, 1.0))
        return cls(p50, p95, p99, most)


class LoadReading(msgspec.Struct, frozen=True):
    """What was seen. `latency` of whole answers, from when each was due; `delay` of the chunks of streams,
    from provider to reader. `failure` is the first one, in words."""

    answered: int
    failed: int
    wall_s: float
    latency: Times | None
    delay: Times | None
    chunks: int
    failure: str

    @property
    def per_s(self) -> float:
        return self.answered / self.wall_s


async def run_load(plan: LoadPlan) -> LoadReading:
    """Carry out `plan` in a process of its own. Raises ServerUnreachable where that fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        told, words = await process.communicate(msgspec.json.encode(plan))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise ServerUnreachable(
            f"The load on {plan.url} ended with code {process.returncode}: {words.decode(errors='replace')}"
        )
    return msgspec.json.decode(told, type=LoadReading)


class _Requests:
    """Requests that differ in one number: no server may take two for the same."""

    def __init__(self, plan: LoadPlan) -> None:
        messages = [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": f"Question {_NUMBER}: what is a gateway good for, in a few words?"},
        ]
        content: dict[str, object] = {"model": plan.model, "messages": messages, "max_tokens": 512}
        if plan.stream:
            content["stream"] = True
        body = msgspec.json.encode(content)
        address = urlsplit(plan.url)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Authorization: Bearer {plan.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._before, self._after = (head.encode() + body).split(_NUMBER.encode())
        self._sent = 0

    def next(self) -> bytes:
        self._sent += 1
        return self._before + b"%08d" % self._sent + self._after


class _Run:
    """The figures of a run, and when it is over."""

    def __init__(self) -> None:
        self.latencies_s: list[float] = []
        self.delays_s: list[float] = []
        self.answered = self.failed = 0
        self.failure = ""
        self.last_s = 0.0

    def is_over(self, due_s: float, status: int, words: bytes) -> None:
        """One request is answered."""
        self.last_s = time.monotonic()
        if status == 200:
            self.answered += 1
            self.latencies_s.append(self.last_s - due_s)
        else:
            self.fail(f"status {status}: {words[:300].decode(errors='replace')}")

    def fail(self, why: str) -> None:
        self.failed += 1
        self.failure = self.failure or why


class _Client(asyncio.Protocol):
    """One connection, one request at a time; `free` is called when it can take the next."""

    def __init__(self, run: _Run, free: Callable[[_Client], None]) -> None:
        self._run = run
        self._free = free
        self._transport: asyncio.Transport
        self._asking = self.lost = False
        self._due_s = 0.0
        self._status = 0
        self._head = b""
        self._body: BodyDecoder | None = None
        self._words = b""
        self._events: EventSplitter | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes, due_s: float) -> None:
        self._asking, self._due_s = True, due_s
        self._head, self._words = b"", b""
        self._body = self._events = None
        self._transport.write(request)

    def close(self) -> None:
        self._asking = False
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._asking:
            self._asking = False
            self._run.fail(f"the connection was closed: {exc!r}")
            self._free(self)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        if self._body is None:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                if len(self._head) > _HEAD_BYTES_MAX:
                    self._transport.abort()
                return
            head, data = self._head[: end + 2], self._head[end + 4 :]
            self._begin(head)
        assert self._body is not None
        content = self._body.feed(data)
        if self._events is not None:
            for line in self._events.feed(content):
                for sent_at in _SENT_AT.finditer(line):
                    self._run.delays_s.append(now_s - float(sent_at[1]))
        elif self._status != 200:
            self._words += content
        if self._body.complete:
            self._asking = False
            self._run.is_over(self._due_s, self._status, self._words)
            self._free(self)

    def _begin(self, head: bytes) -> None:
        self._status = int(head[9:12])
        length = _CONTENT_LENGTH.search(head)
        if length:
            self._body = BodyDecoder({"content-length": length[1].decode()})
        else:
            self._body = BodyDecoder({"transfer-encoding": "chunked"})
        if b"text/event-stream" in head:
            self._events = EventSplitter()


async def _carry_out(plan: LoadPlan) -> LoadReading:
    run, requests = _Run(), _Requests(plan)
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    load = _Open(plan, requests, done) if plan.rate_per_s else _Closed(plan, requests, done)
    address = urlsplit(plan.url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    clients = [
        (await loop.create_connection(lambda: _Client(run, load.free), host, port))[1]
        for _ in range(plan.connections)
    ]
    start_s = time.monotonic()
    load.begin(clients)
    try:
        async with asyncio.timeout(plan.seconds + plan.give_up_s):
            await done.wait()
    except TimeoutError:
        for _ in range(load.unanswered()):
            run.fail(f"not answered within {plan.give_up_s:g} s after the last was sent")
    for client in clients:
        client.close()
    return LoadReading(
        run.answered,
        run.failed,
        max(run.last_s - start_s, 1e-9),
        Times.of(run.latencies_s) if run.latencies_s else None,
        Times.of(run.delays_s) if run.delays_s else None,
        len(run.delays_s),
        run.failure,
    )


class _Closed:
    """Each client asks as soon as it is answered; streams once."""

    def __init__(self, plan: LoadPlan, requests: _Requests, done: asyncio.Event) -> None:
        self._plan = plan
        self._requests = requests
        self._done = done
        self._begun = self._under_way = 0
        self._until_s = 0.0

    def begin(self, clients: list[_Client]) -> None:
        now_s = time.monotonic()
        self._until_s = now_s + self._plan.seconds if self._plan.seconds else float("inf")
        for client in clients:
            self._ask(client, now_s)

    def unanswered(self) -> int:
        return self._under_way

    def free(self, client: _Client) -> None:
        self._under_way -= 1
        now_s = time.monotonic()
        enough = self._plan.requests and self._begun >= self._plan.requests
        if self._plan.stream or enough or client.lost or now_s >= self._until_s:
            if not self._under_way:
                self._done.set()
        else:
            self._ask(client, now_s)

    def _ask(self, client: _Client, now_s: float) -> None:
        self._begun += 1
        self._under_way += 1
        client.ask(self._requests.next(), now_s)


class _Open:
    """Requests at their times; one that finds no client free waits, and its latency counts that."""

    def __init__(self, plan: LoadPlan, requests: _Requests, done: asyncio.Event) -> None:
        self._plan = plan
        self._requests = requests
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._free: list[_Client] = []
        self._waiting: deque[float] = deque()
        self._left = int(plan.rate_per_s * plan.seconds)
        self._under_way = 0

    def begin(self, clients: list[_Client]) -> None:
        self._free = list(clients)
        self._due(time.monotonic())

    def unanswered(self) -> int:
        return self._under_way + len(self._waiting) + self._left

    def free(self, client: _Client) -> None:
        self._under_way -= 1
        if self._waiting and not client.lost:
            self._ask(client, self._waiting.popleft())
            return
        if not client.lost:
            self._free.append(client)
        if not self.unanswered():
            self._done.set()

    def _due(self, due_s: float) -> None:
        self._left -= 1
        if self._left > 0:
            next_s = due_s + 1 / self._plan.rate_per_s
            # Not `call_at`: uvloop's clock is not exactly that of `time.monotonic`.
            self._loop.call_later(max(0.0, next_s - time.monotonic()), self._due, next_s)
        if self._free:
            self._ask(self._free.pop(), due_s)
        else:
            self._waiting.append(due_s)

    def _ask(self, client: _Client, due_s: float) -> None:
        self._under_way += 1
        client.ask(self._requests.next(), due_s)


if __name__ == "__main__":
    import uvloop

    _reading = uvloop.run(_carry_out(msgspec.json.decode(sys.stdin.buffer.read(), type=LoadPlan)))
    sys.stdout.buffer.write(msgspec.json.encode(_reading))

"""Keeps what was asked, as it was sent, and what came of it: what `stockpot doctor` reads.

The last requests are held in memory, within bytes, and written to a file only where one is set: prompts are
private. A body is kept as it came, for key order and white space are among the causes of broken prefixes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from stockpot.records import RequestRecord
from stockpot.settings_telemetry import RecordingSettings

_LOG = logging.getLogger(__name__)

BodyShape = Literal["openai-chat", "openai-responses", "anthropic", "completion"]
"""In whose words a body is."""

_UNDER_WAY_MAX = 4_096
_UNWRITTEN_MAX = 1_024
_PRIVATE = 0o600


class RecordedRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request: a line of a recording, and what GET /admin/requests tells of it. `at` is when it arrived
    (Unix time), `provider` the kind of server that answered, `tenant` whose caches it used."""

    at: float
    request_id: str
    shape: BodyShape
    body: msgspec.Raw
    client_request_id: str = ""
    model: str = ""
    backend: str = ""
    provider: str = ""
    session: str = ""
    tenant: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    ttft_s: float | None = None
    total_s: float = 0.0
    cost_usd: float = 0.0
    cause: str = ""


@dataclass(slots=True)
class RecordingStats:
    """`lost`: not written to the file, because it could not be or because too many waited."""

    held: int = 0
    held_bytes: int = 0
    written: int = 0
    lost: int = 0


class Recording:
    """A `records.RecordObserver`. `asked` comes before the record of the same request. On the event loop; the
    file is written on a thread, and a file that cannot be written is no request's error."""

    def __init__(self, settings: RecordingSettings, provider_of: Callable[[str], str]) -> None:
        self._settings = settings
        self._provider_of = provider_of
        self._under_way: OrderedDict[str, tuple[BodyShape, bytes]] = OrderedDict()
        self._under_way_bytes = 0
        self._held: deque[RecordedRequest] = deque()
        self._writer: _Writer | None = None
        self.stats = RecordingStats()

    async def start(self) -> None:
        """Be ready to write, where a file is set."""
        if self._settings.path is not None:
            self._writer = _Writer(self._settings.path, self._settings.path_bytes, self.stats)

    async def close(self) -> None:
        """Write what waits. Idempotent."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.close()

    def asked(self, request_id: str, shape: BodyShape, body: bytes) -> None:
        """A request that was understood, and will be tried."""
        if len(body) > self._settings.memory_bytes:
            return
        self._under_way[request_id] = (shape, body)
        self._under_way_bytes += len(body)
        while len(self._under_way) > _UNDER_WAY_MAX or self._under_way_bytes > self._settings.memory_bytes:
            _, (_, oldest) = self._under_way.popitem(last=False)
            self._under_way_bytes -= len(oldest)

    def observe_request(self, record: RequestRecord) -> None:
        asked = self._under_way.pop(record.request_id, None)
        if asked is None:
            return
        shape, body = asked
        self._under_way_bytes -= len(body)
        recorded = RecordedRequest(
            at=record.at,
            request_id=record.request_id,
            shape=shape,
            body=msgspec.Raw(body),
            client_request_id=record.client_request_id,
            model=record.model or record.requested_model,
            backend=record.backend,
            provider=self._provider_of(record.backend),
            session=record.session,
            tenant=record.caller.tenant,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            written_tokens=record.written_tokens,
            completion_tokens=record.completion_tokens,
            estimated=record.estimated,
            ttft_s=record.ttft_s,
            total_s=record.total_s,
            cost_usd=record.cost.nanousd / 1e9,
            cause=record.cause or "",
        )
        self._hold(recorded, len(body))
        if self._writer is not None:
            self._writer.write(recorded)

    def last(self, count: int, tenant: str | None = None) -> Sequence[RecordedRequest]:
        """The last ones (of a tenant), oldest first."""
        found = [each for each in self._held if tenant is None or each.tenant == tenant]
        return found[-count:]

    def _hold(self, recorded: RecordedRequest, size_bytes: int) -> None:
        self._held.append(recorded)
        self.stats.held_bytes += size_bytes
        while len(self._held) > self._settings.requests or (
            self.stats.held_bytes > self._settings.memory_bytes
        ):
            self.stats.held_bytes -= len(bytes(self._held.popleft().body))
        self.stats.held = len(self._held)


class _Writer:
    """Appends lines to a file on a thread of its own; the file before it is kept as `NAME.1`."""

    def __init__(self, path: Path, most_bytes: int, stats: RecordingStats) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._stats = stats
        self._encoder = msgspec.json.Encoder()
        self._unwritten = 0
        self._failed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stockpot-recording")

    def write(self, recorded: RecordedRequest) -> None:
        if self._unwritten >= _UNWRITTEN_MAX:
            self._stats.lost += 1
            return
        self._unwritten += 1
        self._thread.submit(self._append, recorded)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    def _append(self, recorded: RecordedRequest) -> None:
        # A body may be spread over lines; a line of a recording is one line.
        body = bytes(recorded.body)
        if b"\n" in body or b"\r" in body:
            body = body.replace(b"\r", b" ").replace(b"\n", b" ")  # between tokens: in texts they are escaped
            recorded = msgspec.structs.replace(recorded, body=msgspec.Raw(body))
        line = self._encoder.encode(recorded) + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size + len(line) > self._most_bytes:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _PRIVATE)
            try:
                os.write(file, line)  # in one piece, though several servers may write to it
            finally:
                os.close(file)
        except OSError as error:
            self._stats.lost += 1
            if not self._failed:
                _LOG.warning(
                    "requests cannot be recorded in %s (%s); they are served all the same", self._path, error
                )
            self._failed = True
        else:
            self._stats.written += 1
            self._failed = False
        finally:
            self._unwritten -= 1

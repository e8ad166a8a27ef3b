"""A Redis of a benchmark's own: on a free port of this machine, in memory alone, with failures on demand."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from stockpot.bench.server import free_port
from stockpot.clock import SystemClock
from stockpot.errors import ServerUnreachable
from stockpot.kv.redis_connection import RedisOptions, open_connection
from stockpot.kv.resp import Command, RedisFailure, Reply

_HOST = "127.0.0.1"
_PROGRAMS = ("redis-server", "valkey-server")
_START_S = 20.0
_POLL_S = 0.02
_ANSWER_S = 10.0
_READ_BYTES = 65_536


class RedisProcess:
    """Keeps its port from one start to the next. Made by `private_redis`."""

    def __init__(self, program: str, folder: Path, maxmemory_bytes: int) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._command = (
            *(program, "--bind", _HOST, "--port", str(self.port), "--dir", str(folder)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            *("--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", "allkeys-lru"),
        )

    @property
    def url(self) -> str:
        return redis_url(self.port)

    async def start(self) -> None:
        """Start it, empty, and wait until it answers. Raises ServerUnreachable."""
        process = self._process = self._spawn()
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            if (code := process.poll()) is not None:
                raise ServerUnreachable(f"{self._command[0]} ended with exit code {code} as it started.")
            with suppress(RedisFailure):
                await asyncio.to_thread(self.ask)
                return
            await asyncio.sleep(_POLL_S)
        raise ServerUnreachable(f"{self._command[0]} did not answer within {_START_S:g} s.")

    def stop(self) -> None:
        """End it at once, as a crash would. Idempotent."""
        if self._process is not None:
            self._process.kill()  # ends a paused one as well
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It keeps its connections and says nothing (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def ask(self, *commands: Command, size_bytes: int = 0) -> list[Reply]:
        """Replies to commands, past the tier; `size_bytes` is about how much they are. Blocks. Raises
        RedisFailure."""
        connection = open_connection(
            RedisOptions(self.url), clock=SystemClock(), timeout_s=_ANSWER_S, connect_timeout_s=_ANSWER_S
        )
        try:
            return connection.exchange(commands, size_bytes)
        finally:
            connection.close()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C at the terminal is for the benchmark, which stops it itself.
            start_new_session=True,
        )

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)


@asynccontextmanager
async def private_redis(*, maxmemory_bytes: int = 0) -> AsyncGenerator[RedisProcess]:
    """Start a Redis and stop it at the end. `maxmemory_bytes`: the least recently used keys go then; 0 is no
    limit. Raises ServerUnreachable where none is installed or it does not start."""
    program = next((path for name in _PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        raise ServerUnreachable(
            f"This benchmark needs one of {', '.join(_PROGRAMS)} and finds none on the PATH: install the "
            "package redis-server or valkey-server of your system."
        )
    with tempfile.TemporaryDirectory(prefix="stockpot-redis-") as folder:
        redis = RedisProcess(program, Path(folder), maxmemory_bytes)
        try:
            await redis.start()
            yield redis
        finally:
            redis.stop()


class SlowProxy:
    """Stands before a Redis and holds back each piece of its answers for `delay_s`, which may be changed at
    any time. Made by `slow_proxy`."""

    def __init__(self, target_port: int) -> None:
        self.delay_s = 0.0
        self.port = 0
        self._target_port = target_port

    @property
    def url(self) -> str:
        return redis_url(self.port)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one client's connection on until either side ends it."""
        try:
            far_reader, far_writer = await asyncio.open_connection(_HOST, self._target_port)
        except OSError:
            writer.close()
            return
        try:
            ways = (
                self._pass(reader, far_writer, delayed=False),
                self._pass(far_reader, writer, delayed=True),
            )
            tasks = [asyncio.create_task(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            writer.close()
            far_writer.close()

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, delayed: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(_READ_BYTES):
                if delayed:
                    await asyncio.sleep(self.delay_s)
                target.write(data)
                await target.drain()


@asynccontextmanager
async def slow_proxy(target_port: int) -> AsyncGenerator[SlowProxy]:
    """A proxy before the server on `target_port` of this machine; its connections end with it."""
    proxy = SlowProxy(target_port)
    connections: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(proxy.serve(reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.start_server(accept, _HOST, 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        open_ones = list(connections)
        for task in open_ones:
            task.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)


def redis_url(port: int) -> str:
    """The address of a Redis on this machine."""
    return f"redis://{_HOST}:{port}/0"

"""A server in a process of its own, from cold start to the end, for as long as a benchmark needs it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import psutil

from stockpot.bench.http_stream import fetch
from stockpot.errors import ServerUnreachable

_HOST = "127.0.0.1"
_POLL_S = 0.1
_STOP_S = 30.0
_FIRST_START_S = 900.0
"""A first start fetches the model and finds its encoding."""
_LOG_LINES_SHOWN = 8
_NOTHING_ON_DISK: Mapping[str, object] = {"capacity_bytes": 0}
"""The disk tier of a server whose settings say nothing of it: blocks of an earlier run would falsify this
one."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start a server. `environment` is added to this process's own; `ready_path` answers 200 once
    requests can be served, which must happen within `start_s`."""

    name: str
    arguments: tuple[str, ...]
    port: int
    ready_path: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    start_s: float = 300.0

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers. `process` is None where it was not started here."""

    url: str
    pid: int
    process: subprocess.Popen[bytes] | None = None

    async def kill(self) -> None:
        """End it at once (SIGKILL), as a crash would; returns when it is gone. Raises ValueError for a server
        that was not started here."""
        if self.process is None:
            raise ValueError(f"The server at {self.url} was not started here and is not ours to kill.")
        await asyncio.to_thread(_kill, self.process)

    def rss_bytes(self) -> int:
        """Resident memory now, of the process and its children (shared pages count in each)."""
        return sum(_rss_bytes(process) for process in _family(self.pid))

    def peak_rss_bytes(self) -> int:
        """The most resident memory so far, summed over the processes that still live."""
        return sum(_peak_rss_bytes(process) for process in _family(self.pid))


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return probe.getsockname()[1]


def stockpot_command(
    settings: Mapping[str, Mapping[str, object]], *, name: str = "stockpot"
) -> ServerCommand:
    """`stockpot serve` with `settings` (by section, as in the TOML file) over those of the environment. The
    disk tier is off where they say nothing of it."""
    port = free_port()
    cache = settings.get("cache", {})
    settings = {**settings, "cache": {**cache, "disk": cache.get("disk", _NOTHING_ON_DISK)}}
    environment = dict(_variables("STOCKPOT_", settings))
    code = "from stockpot.cli.main import main; main()"
    arguments = (sys.executable, "-c", code, "serve", "--host", _HOST, "--port", str(port))
    return ServerCommand(
        name, (*arguments, "--log-level", "warning"), port, "/ready", environment, _FIRST_START_S
    )


def _variables(beginning: str, settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Environment variables for settings in sections."""
    for key, value in settings.items():
        name = beginning + key.upper()
        if isinstance(value, Mapping):
            yield from _variables(name + "__", cast("Mapping[str, Any]", value))
        elif isinstance(value, (str, Path)):
            yield name, str(value)
        else:
            yield name, json.dumps(value)


@asynccontextmanager
async def running_server(command: ServerCommand) -> AsyncGenerator[RunningServer]:
    """Start, wait until ready; stop at the end, with everything the server started.

    Raises ServerUnreachable with the last lines of its log where the server does not come up.
    """
    with tempfile.TemporaryFile() as log:
        process = await asyncio.to_thread(_start, command, log)
        try:
            await _wait_until_ready(command, process, log)
            yield RunningServer(command.url, process.pid, process)
        finally:
            await asyncio.to_thread(_stop, process)


def _start(command: ServerCommand, log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command.arguments,
        env={**os.environ, **command.environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # Ctrl-C at the terminal is for the benchmark, which then stops its servers itself.
        start_new_session=True,
    )


async def _wait_until_ready(command: ServerCommand, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline_s = time.monotonic() + command.start_s
    while time.monotonic() < deadline_s:
        if (code := process.poll()) is not None:
            raise ServerUnreachable(
                f"{command.name} ended with {_exit_words(code)} before it was ready. "
                f"Its last words:\n{_tail(log)}"
            )
        with suppress(ServerUnreachable):
            if (await fetch(command.url + command.ready_path, timeout_s=5.0)).status == 200:
                return
        await asyncio.sleep(_POLL_S)
    raise ServerUnreachable(
        f"{command.name} was not ready within {command.start_s:g} s. Its last words:\n{_tail(log)}"
    )


def _exit_words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES_SHOWN:]) or "(none)"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait, then end the whole session: some servers leave workers behind."""
    if process.returncode is not None:
        return  # its pid may be another's by now
    family = _family(process.pid)
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    _end(process, family)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        _end(process, _family(process.pid))


def _end(process: subprocess.Popen[bytes], family: Sequence[psutil.Process]) -> None:
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _peak_rss_bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # gone, or not Linux: the current size is the best that is known
        pass
    return _rss_bytes(process)

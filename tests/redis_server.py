"""A real redis-server for a test: on a free port, in a folder of its own, without persistence."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stockpot.clock import SystemClock
from stockpot.kv.redis_connection import RedisOptions, open_connection
from stockpot.kv.resp import Argument, Reply

START_S = 20.0


class RedisServer:
    """Started by `start`, stopped by `stop`; the port stays the same, so that it can come back."""

    def __init__(self, folder: Path, *arguments: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.folder = folder
        self.arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, *, answers: Callable[[], bool] | None = None) -> None:
        """Start it, empty, and wait until it answers."""
        command = [
            *("redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no", "--loglevel", "warning"),
            *self.arguments,
        ]
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + START_S
        while not (answers or self.answers)():
            assert self._process.poll() is None, (self.folder / "redis.log").read_text()
            assert time.monotonic() < deadline_s, "redis-server does not answer"
            time.sleep(0.01)

    def stop(self) -> None:
        """End it at once, as a crash would. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It keeps its connections and says nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def restart_empty(self) -> None:
        self.stop()
        self.start()

    def answers(self) -> bool:
        """Any answer will do: it may want a password."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                probe.sendall(b"PING\r\n")
                return probe.recv(1) in (b"+", b"-")
        except OSError:
            return False

    def ask(self, *words: Argument, options: RedisOptions | None = None) -> Reply:
        """One command past the tier under test."""
        connection = open_connection(
            options or RedisOptions(self.url), clock=SystemClock(), timeout_s=10, connect_timeout_s=10
        )
        try:
            return connection.exchange([words], 2**30)[0]
        finally:
            connection.close()

    def all_keys(self, pattern: str = "*") -> list[bytes]:
        """Sorted names of keys."""
        found = self.ask(b"KEYS", pattern.encode())
        assert isinstance(found, list)
        return sorted(key for key in found if isinstance(key, bytes))

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)


class SlowProxy:
    """A TCP proxy before a server. Answers pass in pieces of `piece_bytes`, each after `delay_s`; both may be
    changed while it runs."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.piece_bytes = 65_536
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def close(self) -> None:
        self._closing.set()
        for each in (self._listener, *self._open):
            end(each)
        for thread in self._threads:
            thread.join(timeout=10)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [client, server]
            self._run(self._pass, client, server, False)
            self._run(self._pass, server, client, True)

    def _pass(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(self.piece_bytes if is_answer else 65_536):
                if is_answer and self.delay_s and self._closing.wait(self.delay_s):
                    break
                target.sendall(data)
        except OSError:
            pass
        finally:
            end(source)
            end(target)

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


def end(connection: socket.socket) -> None:
    """Wake whoever waits on it, then close it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def make_certificates(folder: Path) -> Sequence[Path]:
    """An authority, a certificate for 127.0.0.1 signed by it, and its key."""
    ca, ca_key, request = folder / "ca.pem", folder / "ca.key", folder / "server.csr"
    certificate, key, names = folder / "server.pem", folder / "server.key", folder / "names"
    names.write_text("subjectAltName=IP:127.0.0.1\n")
    new = ("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for command in (
        (*new, "-x509", "-days", "2", "-subj", "/CN=test authority", "-keyout", ca_key, "-out", ca),
        (*new, "-subj", "/CN=test server", "-keyout", key, "-out", request),
        (
            *("openssl", "x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial"),
            *("-days", "2", "-extfile", names, "-out", certificate),
        ),
    ):
        subprocess.run(command, check=True, capture_output=True)
    return ca, certificate, key

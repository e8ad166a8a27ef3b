"""How Redis is reached: address, credentials, TLS, timeouts; connections that are kept for the next call."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from stockpot.clock import Clock
from stockpot.errors import ConfigurationError
from stockpot.kv.resp import Command, ErrorReply, FailureCause, RedisFailure, RespConnection

if TYPE_CHECKING:
    import ssl

    import redis

_SCHEMES = ("redis", "rediss", "unix")
_PORT = 6379

_ADVICE: dict[str, tuple[FailureCause, str]] = {
    "NOAUTH": ("error", "The server wants a password: set cache.redis.password."),
    "WRONGPASS": ("error", "The server refuses these credentials: check cache.redis.username and password."),
    "NOPERM": (
        "error",
        "The user may not do that: grant it +@read +@write +ping +info on the keys PREFIX:*.",
    ),
    "OOM": ("error", "The server is full: raise its maxmemory, or set maxmemory-policy allkeys-lru."),
    "READONLY": ("error", "This is a replica: let cache.redis.url name the primary."),
    "MISCONF": (
        "error",
        "The server cannot save to its disk and refuses writes: free its disk, or set save ''.",
    ),
    "LOADING": ("down", "The server is still loading its data; nothing to do."),
    "MASTERDOWN": ("down", "A replica without its primary: let cache.redis.url name the primary."),
    "MOVED": ("error", "This is a Redis Cluster, which is not supported: use a single primary."),
    "CLUSTERDOWN": ("error", "This is a Redis Cluster, which is not supported: use a single primary."),
}


@dataclass(frozen=True, slots=True, repr=False)
class RedisOptions:
    """Which Redis (7 or newer, or Valkey), and as whom.

    `url` is redis://HOST:PORT/DB, rediss:// for TLS, or unix:///PATH?db=DB; credentials in it are used
    where `username` and `password` are not given. With TLS the server's certificate is checked against
    `ca_file`, or the system's authorities, unless `verify` is off; `cert_file` and `key_file` are this
    client's own. Every key begins with `prefix` and a colon.
    """

    url: str = "redis://127.0.0.1:6379/0"
    username: str | None = None
    password: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    verify: bool = True
    prefix: str = "stockpot"

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in _SCHEMES:
            raise ConfigurationError(
                f"cache.redis.url begins with {parts.scheme!r}: use redis://, rediss:// (TLS) or unix://"
            )
        try:
            _ = parts.port, self.database
        except ValueError as error:
            raise ConfigurationError(
                f"the port or the database number in cache.redis.url is none ({error})"
            ) from None
        if parts.scheme == "unix" and not parts.path:
            raise ConfigurationError("cache.redis.url names no socket: use unix:///PATH")
        if self.key_file is not None and self.cert_file is None:
            raise ConfigurationError("cache.redis.key_file needs cache.redis.cert_file beside it")
        for file in (self.ca_file, self.cert_file, self.key_file):
            if file is not None and not file.is_file():
                raise ConfigurationError(f"there is no file {file}, which cache.redis names for TLS")
        if not self.prefix or any(letter.isspace() for letter in self.prefix):
            raise ConfigurationError(f"cache.redis.prefix is {self.prefix!r}: use a word without spaces")

    def __repr__(self) -> str:
        """Without credentials, so that it can stand in logs."""
        return f"RedisOptions({self.address}, prefix={self.prefix!r})"

    @property
    def parts(self) -> SplitResult:
        """The URL, taken apart."""
        return urlsplit(self.url)

    @property
    def address(self) -> str:
        """The URL without credentials."""
        parts = self.parts
        place = parts.path if parts.scheme == "unix" else f"{self.host}:{self.port}"
        return f"{parts.scheme}://{place}/{self.database}"

    @property
    def host(self) -> str:
        return self.parts.hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        return self.parts.port or _PORT

    @property
    def database(self) -> int:
        parts = self.parts
        if parts.scheme == "unix":
            return int(parts.query.removeprefix("db=") or 0)
        return int(parts.path.strip("/") or 0)

    @property
    def credentials(self) -> tuple[str | None, str | None]:
        """User name and password."""
        parts = self.parts
        username = self.username or (unquote(parts.username) if parts.username else None)
        password = self.password or (unquote(parts.password) if parts.password else None)
        return username, password


def failure_of(reply: ErrorReply) -> RedisFailure:
    """What an error reply means for the caller, and for the operator."""
    cause, advice = _ADVICE.get(reply.code, ("error", ""))
    return RedisFailure(cause, f"Redis answered: {reply.message}", advice)


def open_connection(
    options: RedisOptions, *, clock: Clock, timeout_s: float, connect_timeout_s: float
) -> RespConnection:
    """Connect, authenticate, choose the database, PING; RedisFailure when any of it does not work.

    Connecting is bounded by `connect_timeout_s`, the handshake by `timeout_s`; resolving a host name takes
    what the system's resolver takes.
    """
    try:
        connected = _connected(options, connect_timeout_s)
    except TimeoutError as error:
        raise RedisFailure("timeout", f"no connection to {options.address} in time") from error
    except OSError as error:
        raise RedisFailure(
            "error",
            f"no connection to {options.address}: {error}",
            "Check that the server runs, and cache.redis.url (and, with TLS, cache.redis.ca_file).",
        ) from error
    connection = RespConnection(connected, clock=clock, timeout_s=timeout_s)
    try:
        for reply in connection.exchange(_greeting(options)):
            if isinstance(reply, ErrorReply):
                raise failure_of(reply)
    except RedisFailure:
        connection.close()
        raise
    return connection


def open_client(options: RedisOptions, *, timeout_s: float | None, connect_timeout_s: float) -> redis.Redis:
    """A client of the `redis` package for the same server, for what is not a matter of megabytes (streams,
    pub/sub). It connects when first used, and does not retry. `timeout_s` None waits for ever, as a
    subscriber does."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    username, password = options.credentials
    tls: dict[str, object] = {}
    if options.parts.scheme == "rediss":
        tls = {
            "ssl_ca_certs": None if options.ca_file is None else str(options.ca_file),
            "ssl_certfile": None if options.cert_file is None else str(options.cert_file),
            "ssl_keyfile": None if options.key_file is None else str(options.key_file),
            "ssl_cert_reqs": "required" if options.verify else "none",
            "ssl_check_hostname": options.verify,
        }
    scheme = options.parts.scheme
    host = f"[{options.host}]" if ":" in options.host else options.host
    place = (
        f"unix://{options.parts.path}?db={options.database}"
        if scheme == "unix"
        else f"{scheme}://{host}:{options.port}/{options.database}"
    )
    return redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        place,
        username=username,
        password=password,
        socket_timeout=timeout_s,
        socket_connect_timeout=connect_timeout_s,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        **tls,
    )


class RedisPool:
    """Idle connections, at most `limit`, for whichever thread calls next."""

    def __init__(
        self,
        options: RedisOptions,
        *,
        clock: Clock,
        timeout_s: float,
        connect_timeout_s: float,
        limit: int = 4,
    ) -> None:
        self._options = options
        self._clock = clock
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._limit = limit
        self._idle: list[RespConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def connection(self) -> Generator[RespConnection]:
        """A connection for one caller. It is kept unless replies are pending; after a RedisFailure the idle
        ones go as well, since the server may have been restarted."""
        connection = self._take()
        try:
            yield connection
        except RedisFailure:
            connection.close()
            self.clear()
            raise
        finally:
            self.give(connection)

    def connect(self) -> RespConnection:
        """A new connection, past the idle ones."""
        return open_connection(
            self._options,
            clock=self._clock,
            timeout_s=self._timeout_s,
            connect_timeout_s=self._connect_timeout_s,
        )

    def give(self, connection: RespConnection) -> None:
        """Keep a connection for the next call, if it can serve one; else close it."""
        alive = connection.is_alive()
        with self._lock:
            if alive and not self._closed and len(self._idle) < self._limit:
                self._idle.append(connection)
                return
        connection.close()

    def clear(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close the idle connections, now and later ones."""
        self._closed = True
        self.clear()

    def _take(self) -> RespConnection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self.connect()
            if connection.is_alive():
                return connection
            connection.close()


def _connected(options: RedisOptions, timeout_s: float) -> socket.socket:
    if options.parts.scheme == "unix":
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.settimeout(timeout_s)
        with _closed_on_error(unix):
            unix.connect(unquote(options.parts.path))
        return unix
    plain = socket.create_connection((options.host, options.port), timeout=timeout_s)
    with _closed_on_error(plain):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if options.parts.scheme == "redis":
            return plain
        return _tls_context(options).wrap_socket(plain, server_hostname=options.host)


def _tls_context(options: RedisOptions) -> ssl.SSLContext:
    import ssl

    context = ssl.create_default_context(cafile=None if options.ca_file is None else str(options.ca_file))
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if options.cert_file is not None:
        context.load_cert_chain(options.cert_file, options.key_file)
    return context


@contextmanager
def _closed_on_error(connecting: socket.socket) -> Generator[None]:
    with contextlib.ExitStack() as undo:
        undo.callback(connecting.close)
        yield
        undo.pop_all()


def _greeting(options: RedisOptions) -> list[Command]:
    username, password = options.credentials
    commands: list[Command] = []
    if password is not None:
        names = () if username is None else (username.encode(),)
        commands.append((b"AUTH", *names, password.encode()))
    if options.database:
        commands.append((b"SELECT", options.database))
    # A server that wants a password calls a long command a protocol error; PING it answers with NOAUTH.
    return [*commands, (b"PING",)]

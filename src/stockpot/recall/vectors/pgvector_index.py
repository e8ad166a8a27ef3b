"""The index all nodes share: PostgreSQL with pgvector (0.8 or newer).

A table for each number of dimensions with vectors in half precision, an HNSW graph over all of them, and the
partition as a filter of the search: a small partition is read whole; in a big one the graph is searched on
until enough of the partition are found (`hnsw.iterative_scan`). The tables hold digests and vectors, no text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from stockpot.clock import Clock, SystemClock
from stockpot.errors import ConfigurationError
from stockpot.recall.vectors.embedder import Vectors
from stockpot.recall.vectors.index import Near, VectorIndex

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

_Connection = Any
"""A `psycopg.AsyncConnection`, which takes statements as literals alone: here the name of a table is made."""

_VERSION_MIN = (0, 8)
_CONNECTIONS = 4
_CONNECTS_IN_S = 5.0
_ANSWERS_IN_S = 0.4
_ADDS_IN_S = 5.0
_LEFT_ALONE_S = 5.0
"""After a failure it finds nothing for so long, without being asked."""
_FEW = 1_000
"""Rows of a partition that are compared one by one. The planner's own choice goes wrong where it knows badly
how many there are, and the graph of a million is given up long before ten of a few are found in it."""
_DIMENSIONS_MAX = 4_000
"""Of a graph over halves; more dimensions are always compared one by one."""
_VECTORS_MAX = 1_000_000
_TRIMMED_EVERY = 1_000
_LOCK = 0x5770_636B
"""Tables are made by one node at a time: `IF NOT EXISTS` alone fails when two do."""


class PgvectorIndex(VectorIndex):
    """On the event loop. `failures` counts calls that failed: they found nothing, or added nothing (the entry
    is found again by the same request alone, and by meaning when the index is rebuilt). Of more than
    `vectors_max` in a table the oldest leave."""

    def __init__(self, url: str, *, clock: Clock | None = None, vectors_max: int = _VECTORS_MAX) -> None:
        self._url = url.replace("postgresql+psycopg://", "postgresql://")
        self._clock = clock or SystemClock()
        self._vectors_max = vectors_max
        self._free: asyncio.Queue[_Connection | None] = asyncio.Queue()
        self._tables: set[int] = set()
        self._count = 0
        self._added = 0
        self._away_until_s = float("-inf")
        self._left: set[asyncio.Task[Any]] = set()
        self._closed = False
        self.failures = 0

    @property
    def lasts(self) -> bool:
        return True

    def __len__(self) -> int:
        return self._count

    async def start(self) -> None:
        """Raises ConfigurationError where the server cannot be reached or has no pgvector."""
        try:
            import psycopg
        except ImportError as error:
            raise ConfigurationError(
                "recall.semantic.index_url needs psycopg; install stockpot[postgres]."
            ) from error
        self._closed = False
        while self._free.qsize() < _CONNECTIONS:
            self._free.put_nowait(None)
        try:
            version = await self._within(_CONNECTS_IN_S, self._extension)
        except (psycopg.Error, OSError, TimeoutError) as error:
            raise ConfigurationError(
                "The vector index of recall.semantic.index_url cannot be used (the database must be there,"
                f" and 'CREATE EXTENSION vector' have been run in it by one who may): {error or 'no answer'}."
            ) from error
        if tuple(int(part) for part in version.split(".")[:2]) < _VERSION_MIN:
            raise ConfigurationError(
                f"The database of recall.semantic.index_url has pgvector {version}, and 0.8 is needed;"
                " install it and run 'ALTER EXTENSION vector UPDATE'."
            )

    async def close(self) -> None:
        self._closed = True
        for task in self._left:
            task.cancel()
        while not self._free.empty():
            connection = self._free.get_nowait()
            if connection is not None:
                await connection.close()

    async def add(self, partition: bytes, key: bytes, vector: Vectors) -> None:
        async def add(connection: _Connection) -> None:
            table = await self._table(connection, len(vector))
            done = await connection.execute(
                f"INSERT INTO {table} (key, partition, vector) VALUES (%s, %s, %s::halfvec)"
                " ON CONFLICT (key) DO UPDATE"
                " SET partition = excluded.partition, vector = excluded.vector, added = DEFAULT"
                " RETURNING (xmax = 0)::int",
                (key, partition, _text(vector)),
            )
            self._count += (await done.fetchone())[0]
            self._added += 1
            if self._added % min(_TRIMMED_EVERY, self._vectors_max) == 0:
                gone = await connection.execute(
                    f"DELETE FROM {table} WHERE added <= (SELECT max(added) FROM {table}) - %s",
                    (self._vectors_max,),
                )
                self._count -= gone.rowcount

        await self._tried(add, _ADDS_IN_S)

    async def search(self, partition: bytes, vector: Vectors, count: int) -> Sequence[Near]:
        async def search(connection: _Connection) -> list[Near]:
            table = await self._table(connection, len(vector))
            asked = {"partition": partition, "vector": _text(vector), "few": _FEW, "count": 2 * count}
            rows = await connection.execute(
                "SELECT count(*) FROM"
                f" (SELECT FROM {table} WHERE partition = %(partition)s LIMIT %(few)s) few",
                asked,
            )
            distance = "vector <=> %(vector)s::halfvec"
            # The graph knows the bare distance alone. No plan is kept: it would be one for any partition.
            order = distance if (await rows.fetchone())[0] == _FEW else f"({distance}) + 0"
            found = await connection.execute(
                f"SELECT key, 1 - ({distance}) FROM {table} WHERE partition = %(partition)s"
                f" ORDER BY {order} LIMIT %(count)s",
                asked,
                prepare=False,
            )
            return [Near(bytes(key), float(similarity)) for key, similarity in await found.fetchall()]

        near = await self._tried(search, _ANSWERS_IN_S) or []
        # The graph gives them nearly in order.
        return sorted(near, key=lambda each: -each.similarity)[:count]

    async def remove(self, partition: bytes, key: bytes) -> None:
        async def remove(connection: _Connection) -> None:
            for dimensions in tuple(self._tables):
                table = await self._table(connection, dimensions)
                done = await connection.execute(
                    f"DELETE FROM {table} WHERE key = %s AND partition = %s", (key, partition)
                )
                self._count -= done.rowcount

        await self._tried(remove, _ADDS_IN_S)

    async def _extension(self, connection: _Connection) -> str:
        """Its version; it is there."""
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        version = await connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        return str((await version.fetchone())[0])

    async def _table(self, connection: _Connection, dimensions: int) -> str:
        """The table's name; it is there."""
        name = f"stockpot_recall_{dimensions:d}"
        if dimensions in self._tables:
            return name
        statements = [
            f"CREATE TABLE IF NOT EXISTS {name} (key bytea PRIMARY KEY, partition bytea NOT NULL,"
            f" vector halfvec({dimensions:d}) NOT NULL, added bigint GENERATED ALWAYS AS IDENTITY)",
            f"CREATE INDEX IF NOT EXISTS {name}_partition ON {name} (partition)",
            f"CREATE INDEX IF NOT EXISTS {name}_added ON {name} (added)",
        ]
        if dimensions <= _DIMENSIONS_MAX:
            statements.append(
                f"CREATE INDEX IF NOT EXISTS {name}_graph ON {name} USING hnsw (vector halfvec_cosine_ops)"
            )
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            for statement in statements:
                await connection.execute(statement)
        # An estimate: to count a big one takes too long here.
        rows = await connection.execute(
            "SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = %s::regclass", (name,)
        )
        estimate = (await rows.fetchone())[0]
        if dimensions not in self._tables:
            self._tables.add(dimensions)
            self._count += estimate
        return name

    async def _tried(self, work: Callable[[_Connection], Awaitable[T]], within_s: float) -> T | None:
        """What `work` gives; None where the database does not answer."""
        import psycopg

        if self._clock.monotonic() < self._away_until_s:
            self.failures += 1
            return None
        try:
            return await self._within(within_s, work)
        except (psycopg.OperationalError, psycopg.InterfaceError, OSError, TimeoutError) as error:
            self.failures += 1
            self._away_until_s = self._clock.monotonic() + _LEFT_ALONE_S
            _LOG.warning(
                "recall: the vector index does not answer, nothing is found by meaning for %g s (%s: %s)",
                *(_LEFT_ALONE_S, type(error).__name__, error),
            )
        except psycopg.Error as error:
            self.failures += 1
            self._tables.clear()  # one that somebody dropped is made again
            _LOG.warning("recall: the vector index refused (%s: %s)", type(error).__name__, error)
        return None

    async def _within(self, seconds: float, work: Callable[[_Connection], Awaitable[T]]) -> T:
        """Raises TimeoutError. Does not wait for what it gives up: the driver takes up to ten seconds to
        take a statement back from a server that hangs, and the connection is not used again before."""
        task = asyncio.create_task(self._on_connection(work))
        try:
            await asyncio.wait({task}, timeout=seconds)
        finally:
            if not task.done():
                task.cancel()
                self._left.add(task)
                task.add_done_callback(self._ended)
        if task in self._left:
            raise TimeoutError(f"no answer within {seconds:g} s")
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()  # nobody waits for it any more

    async def _on_connection(self, work: Callable[[_Connection], Awaitable[T]]) -> T:
        async with self._connection() as connection:
            return await work(connection)

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[_Connection]:
        """One of the few. One on which something failed is closed, and made anew when it is wanted."""
        import psycopg

        connection = await self._free.get()
        sound = False
        try:
            if connection is None or connection.closed:
                connection = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
                # Words for later, where the extension is not loaded yet.
                await connection.execute("SET hnsw.iterative_scan = relaxed_order")
                await connection.execute("SET hnsw.ef_search = 100")
            yield connection
            sound = not self._closed
        finally:
            self._free.put_nowait(connection if sound else None)
            if connection is not None and not sound:
                await connection.close()


def _text(vector: Vectors) -> str:
    """As pgvector reads it; more digits than a half has."""
    return f"[{','.join(map('{:.6g}'.format, vector.tolist()))}]"

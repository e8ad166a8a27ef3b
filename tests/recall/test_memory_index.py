"""The index in this process while it changes its form, at its bounds, and after much has come and gone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.recall.vectors.embedder import Vectors
from stockpot.recall.vectors.memory_index import MemoryIndex
from stockpot.recall.vectors.numpy_index import NumpyPartition

WIDTH = 32


def units(count: int, seed: int = 0, width: int = WIDTH) -> Vectors:
    made = np.random.default_rng(seed).normal(size=(count, width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, seed: int, centres: Vectors) -> Vectors:
    """As questions lie: many near few, some between."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.05, 0.9, size=(count, 1))
    made = centres[rng.zipf(1.3, count) % len(centres)] + spread * units(count, seed, centres.shape[1])
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def number_of(found: bytes) -> int:
    return int.from_bytes(found, "big")


async def test_changes_while_a_graph_is_made_are_in_it() -> None:
    index = MemoryIndex(exact_up_to=3_000)
    rows = units(9_000)
    for number in range(3_001):
        await index.add(b"p", key(number), rows[number])
    # The graph is being made now, or soon.
    there = set(range(3_001))
    for number in range(3_001, 9_000):
        await index.add(b"p", key(number), rows[number])
        there.add(number)
        if number % 3 == 0:
            await index.remove(b"p", key(number // 2))
            there.discard(number // 2)
        if number % 500 == 0:
            found = await index.search(b"p", rows[number], 1)
            assert [number_of(each.key) for each in found] == [number]
    assert len(index) == len(there)
    for number in range(0, 9_000, 60):
        found = await index.search(b"p", rows[number], 4)
        assert {number_of(each.key) for each in found} <= there
        assert (number in [number_of(each.key) for each in found]) == (number in there)
    await index.close()


async def test_many_at_once_leave_the_count_right() -> None:
    index = MemoryIndex(exact_up_to=1_200, vectors_max=4_000)
    rows = units(6_000)

    async def change(number: int) -> None:
        partition = b"%d" % (number % 3)
        await index.add(partition, key(number), rows[number])
        if number % 5 == 0:
            await index.remove(partition, key(number))

    await asyncio.gather(*(change(number) for number in range(6_000)))
    found = [await index.search(b"%d" % partition, rows[0], 6_000) for partition in range(3)]
    assert len(index) == sum(map(len, found)) <= 4_000
    await index.close()


async def test_a_partition_that_is_too_big_alone_loses_what_came_first() -> None:
    for exact_up_to in (5, 1_000):
        index = MemoryIndex(vectors_max=20, exact_up_to=exact_up_to)
        rows = units(60)
        for number, row in enumerate(rows):
            await index.add(b"p", key(number), row)
            if number >= 30:
                await index.add(b"p", key(number - 10), rows[number - 10])  # is the latest again
        assert len(index) == 20
        found = await index.search(b"p", rows[0], 60)
        assert len(found) == 20
        assert {number_of(each.key) for each in found} == set(range(40, 60))
        await index.close()


async def test_what_cannot_be_compared_is_not_found() -> None:
    index = MemoryIndex()
    await index.add(b"p", key(1), units(1)[0])
    await index.add(b"p", key(2), units(1, width=8)[0])
    assert not await index.search(b"p", units(1, width=8)[0], 3)
    assert [number_of(each.key) for each in await index.search(b"p", units(1)[0], 3)] == [1]
    assert len(index) == 1
    await index.close()


async def test_closing_does_not_wait_for_a_graph() -> None:
    index = MemoryIndex(exact_up_to=2_000)
    for number, row in enumerate(units(2_001)):
        await index.add(b"p", key(number), row)
    async with asyncio.timeout(20):
        await index.close()
        await index.close()


async def test_very_many_partitions_of_one_are_cheap() -> None:
    index = MemoryIndex()
    row = units(1, width=384)[0]
    tracemalloc.start()
    for number in range(2_000):
        await index.add(key(number), key(number), row)
    each_bytes = tracemalloc.get_traced_memory()[0] / 2_000
    tracemalloc.stop()
    assert each_bytes < 3_000  # 1,536 of them are the vector
    await index.close()


async def test_a_graph_finds_the_nearest_of_clusters_also_after_all_was_replaced() -> None:
    centres = units(150, seed=9, width=384)
    index = MemoryIndex(exact_up_to=1_000)
    count = 3_000
    for generation in range(3):
        rows = clustered(count, generation, centres)
        for number, row in enumerate(rows):
            if generation:
                await index.remove(b"p", key((generation - 1) * count + number))
            await index.add(b"p", key(generation * count + number), row)
        hits = 0
        asked = clustered(100, 77 + generation, centres)
        for vector in asked:
            best = {generation * count + int(place) for place in np.argsort(-(rows @ vector))[:8]}
            hits += len(best & {number_of(each.key) for each in await index.search(b"p", vector, 8)})
        assert hits >= 0.95 * 8 * len(asked)
        assert len(index) == count
    await index.close()


def test_the_embedder_can_be_loaded_after_a_graph_was_made() -> None:
    # In a process of its own: where the libraries are loaded in the wrong order it dies.
    program = (
        "import asyncio; from stockpot.recall.vectors.usearch_index import UsearchPartition;"
        "from stockpot.recall.vectors.minilm import MiniLm; UsearchPartition(8);"
        "asyncio.run(MiniLm().start())"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200)), max_size=400))
@settings(max_examples=50, deadline=None)
def test_the_exact_form_is_exact_as_it_grows_and_shrinks(changes: list[tuple[bool, int]]) -> None:
    rows = units(201)
    partition, there = NumpyPartition(), dict[int, None]()
    for is_added, number in changes:
        there.pop(number, None)
        if is_added:
            partition.add(key(number), rows[number])
            there[number] = None
        else:
            partition.remove(key(number))
    for number in list(there)[:2]:
        assert partition.remove_oldest()
        del there[number]
    keys, vectors = partition.vectors()
    assert [number_of(each) for each in keys] == list(there)
    assert not there or np.array_equal(np.stack(vectors), rows[list(there)])
    similar = {number: float(rows[number] @ rows[200]) for number in there}
    best = sorted(similar, key=lambda number: -similar[number])[:8]
    found = partition.search(rows[200], 8)
    assert [number_of(each.key) for each in found] == best
    assert [each.similarity for each in found] == pytest.approx(
        [similar[number] for number in best], abs=1e-6
    )

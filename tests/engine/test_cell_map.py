"""Properties: sequences on a map hold what they were given, whatever comes and goes between."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stockpot.engine.cell_map import CellMap
from stockpot.engine.driver import Batch, OutOfCells, Span
from stockpot.engine.fake_driver import FakeDriver

SEQUENCES = 4
Step = tuple[str, int, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["decode", "copy", "cut", "move", "defragment"]),
        st.integers(0, SEQUENCES - 1),
        st.integers(0, SEQUENCES - 1),
        st.integers(1, 20),
    ),
    max_size=40,
)


def decode(driver: FakeDriver, sequence: int, tokens: list[int], start: int) -> NDArray[np.float32]:
    n = len(tokens)
    return driver.decode(
        Batch(
            np.array(tokens, np.int32),
            np.arange(start, start + n, dtype=np.int32),
            np.full(n, sequence, np.int32),
            np.arange(n) == n - 1,
        )
    )


def perform(driver: FakeDriver, held: list[list[int]], step: Step) -> None:
    """Do one step with the driver and with plain lists; steps that do not fit are left out."""
    call, a, b, n = step
    match call:
        case "decode":
            tokens = [(7 * len(held[a]) + 31 * a + i) % 256 for i in range(n)]
            decode(driver, a, tokens, len(held[a]))
            held[a] += tokens
        case "copy" if a != b and len(held[b]) < len(held[a]):
            start, end = len(held[b]), min(len(held[b]) + n, len(held[a]))
            if held[b] == held[a][:start]:
                driver.copy(a, b, Span(start, end))
                held[b] += held[a][start:end]
        case "cut":
            driver.cut(a, n)
            del held[a][n:]
        case "move" if held[a] and not held[b]:
            spans = [Span(i, min(i + n, len(held[a]))) for i in range(0, len(held[a]), n)]
            blocks = list(zip(spans, driver.export_spans(a, spans), strict=True))
            driver.cut(a)
            driver.import_spans(b, blocks, Span(0, spans[-1].end))
            held[b], held[a] = held[a], []
        case "defragment":
            driver.defragment()
        case _:
            pass


@given(STEPS, st.booleans())
@settings(max_examples=150)
def test_any_course_of_events_leaves_sequences_as_computed_alone(steps: list[Step], one_run: bool) -> None:
    driver = FakeDriver(cells=64, max_sequences=SEQUENCES, max_batch_tokens=64, one_run=one_run)
    held: list[list[int]] = [[] for _ in range(SEQUENCES)]
    for step in steps:
        used = driver.used_cells()
        try:
            perform(driver, held, step)
        except OutOfCells:
            if step[0] == "decode":
                assert driver.used_cells() == used
            else:
                return  # the source of a move is gone already
    driver.defragment()
    for sequence, tokens in enumerate(held):
        if tokens and driver.used_cells() < driver.cells:
            alone = FakeDriver(cells=128, max_sequences=1, max_batch_tokens=128)
            row = decode(driver, sequence, [9], len(tokens))
            driver.cut(sequence, len(tokens))
            assert np.array_equal(row, decode(alone, 0, [*tokens, 9], 0))
    for sequence in range(SEQUENCES):
        driver.cut(sequence)
    assert driver.used_cells() == 0


def highest_cell_by_pages(used: NDArray[np.bool_], page: int) -> int:
    """llama_kv_cache_cell_max(cache, pad) of ik_llama.cpp 0.1.5, line by line."""
    last = len(used)
    i = len(used)
    while i > 0:
        if used[i - 1]:
            for j in range(last, i, -1):
                if used[j - 1]:
                    return j
            return i
        last = i
        i -= page
    return 0


@given(st.lists(st.booleans(), min_size=8, max_size=64), st.sampled_from([4, 8]))
def test_pages_miss_what_the_library_misses(cells: list[bool], page: int) -> None:
    used = np.array([*cells, *[False] * (-len(cells) % page), True] + [False] * (page - 1))
    used[len(used) - page] = cells[0]
    places = np.flatnonzero(used)
    if not len(places):
        return
    cell_map = CellMap(cells=len(used), sequences=1)
    cell_map.append(0, places[:-1])
    looked_at = max(page, -(-highest_cell_by_pages(used, page) // page) * page)
    assert cell_map.missed_by_pages(page, places[-1:]) == (int(places[-1]) >= looked_at)


def test_gaps_are_counted_below_the_highest_used_cell() -> None:
    cells = CellMap(cells=64, sequences=2)
    first, second = np.arange(10), np.arange(10, 20)
    assert cells.gaps_below(first) == 0
    cells.append(0, first)
    cells.append(1, second)
    cells.cut(0, 0)
    assert cells.gaps_below(np.arange(20, 24)) == 10
    assert cells.gaps_below(np.arange(4)) == 6

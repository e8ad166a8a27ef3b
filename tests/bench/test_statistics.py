"""Statistics against their definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.bench.statistics import Spread, mean, median, percentile, slope
from stockpot.bench.token_trie import distinct_tokens

_VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(_VALUES, st.integers(0, 100))
def test_percentile_is_the_smallest_value_that_reaches_the_share(values: list[float], percent: int) -> None:
    found = percentile(values, percent / 100)
    assert found in values
    assert 100 * sum(value <= found for value in values) >= percent * len(values)
    assert found == min(values) or 100 * sum(value < found for value in values) < percent * len(values)


def test_percentiles_of_a_hundred() -> None:
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [1, 50, 95, 99, 100]


def test_median_and_mean() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5
    assert mean([1, 2, 6]) == 3
    assert Spread.of([2.0]) == Spread(2, 2, 2, 2)


def test_no_values_have_no_statistics() -> None:
    for function in (mean, median, Spread.of):
        with pytest.raises(ValueError, match="no values"):
            function([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        percentile([1], 50)


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_slope_of_a_line_is_its_slope(rise: float, start: float) -> None:
    xs = [0.0, 1.0, 2.0, 5.0]
    assert slope(xs, [start + rise * x for x in xs]) == pytest.approx(rise, abs=1e-9)


def test_slope_without_spread_is_zero() -> None:
    assert slope([2, 2], [1, 5]) == 0
    with pytest.raises(ValueError, match="2 x and 1 y"):
        slope([1, 2], [1])


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12))
def test_distinct_tokens_are_the_nodes_of_the_trie(prompts: list[list[int]]) -> None:
    nodes = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
    assert distinct_tokens(prompts) == len(nodes)

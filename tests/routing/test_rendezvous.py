"""Rendezvous hashing: who leaves moves only its own keys, and the shares are what was asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.routing.rendezvous import chosen, ranked

KEYS = [f"session {number}" for number in range(3000)]
NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=8, unique=True)


@given(key=st.text(), names=NAMES, data=st.data())
def test_the_ranking_of_those_who_stay_never_changes(key: str, names: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    rest = [name for name in names if name != gone]
    assert [name for name in ranked(key, names) if name != gone] == ranked(key, rest)
    assert ranked(key, reversed(names)) == ranked(key, names)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_keys_are_shared_evenly(count: int) -> None:
    favourites = Counter(ranked(key, [f"worker-{number}" for number in range(count)])[0] for key in KEYS)
    assert len(favourites) == count
    assert max(favourites.values()) < 1.2 * len(KEYS) / count


@given(
    key=st.text(),
    weights=st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 100), min_size=2),
    factor=st.floats(1, 50),
    data=st.data(),
)
def test_a_name_that_gains_weight_only_takes(
    key: str, weights: dict[str, float], factor: float, data: st.DataObject
) -> None:
    heavier = data.draw(st.sampled_from(sorted(weights)))
    before = chosen(key, weights.items())
    after = chosen(key, {**weights, heavier: weights[heavier] * factor}.items())
    assert after in (before, heavier)


def test_shares_follow_the_weights() -> None:
    drawn = Counter(chosen(key, [("old", 90.0), ("new", 10.0), ("never", 0.0)]) for key in KEYS)
    assert set(drawn) == {"old", "new"}
    assert 0.07 < drawn["new"] / len(KEYS) < 0.13


def test_nobody_to_choose_from() -> None:
    with pytest.raises(ValueError, match="weight"):
        chosen("key", [("a", 0.0)])

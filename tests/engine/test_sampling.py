"""Choosing tokens: against plain reference implementations, and the promises of seeds and batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stockpot.engine.constraint import ConstraintFactory
from stockpot.engine.fake_driver import FakeVocabulary
from stockpot.engine.sampling import NoToken, Pick, Sampler, choose
from stockpot.errors import RequestError
from stockpot.requests import OutputFormat, Sampling

VOCABULARY = FakeVocabulary()
SIZE = VOCABULARY.size
NOTHING = np.array([], np.int32)


def sampler(sampling: Sampling, *, seed: int = 0, **rest: Any) -> Sampler:
    usual: dict[str, Any] = {"vocabulary": VOCABULARY, "prompt": NOTHING}
    return Sampler(sampling, seed=seed, **{**usual, **rest})


def row_of(values: dict[int, float], *, rest: float = -1000) -> NDArray[np.float32]:
    row = np.full(SIZE, rest, np.float32)
    for token, logit in values.items():
        row[token] = logit
    return row


def normal_rows(rows: int, *, seed: int = 0, size: int = SIZE) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (rows, size)).astype(np.float32)


def tokens(picks: list[Pick | NoToken]) -> list[int]:
    return [pick.token_id for pick in picks if isinstance(pick, Pick)]


def chosen(row: NDArray[np.float32], sampling: Sampling, *, times: int, **rest: Any) -> set[int]:
    """The tokens that `times` draws from the same row give."""
    drawing = sampler(sampling, **rest)
    found: set[int] = set()
    for _ in range(times):
        found.update(tokens(choose(row[None], [drawing])))
    return found


def softmax(row: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float64]:
    scaled = row.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def reference_support(row: NDArray[np.float32], sampling: Sampling) -> list[int]:
    """What the filters leave, computed by sorting everything."""
    order = np.argsort(-row, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    probabilities = softmax(row[order], sampling.temperature)
    before = np.cumsum(probabilities) - probabilities
    kept = (before < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[0])
    return order[kept].tolist()


def test_temperature_zero_takes_the_likeliest_of_each_row_and_the_lowest_of_equals() -> None:
    rows = np.stack([row_of({7: 1.0}), row_of({9: 2.0, 200: 2.0})])
    assert tokens(choose(rows, [sampler(Sampling(temperature=0))] * 2)) == [7, 9]


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e-5, 1e-3])
def test_tiny_temperatures_are_greedy_without_overflow(temperature: float) -> None:
    row = row_of({7: 10.0, 8: 9.0}, rest=-3e38)
    assert chosen(row, Sampling(temperature=temperature), times=20) == {7}


def test_logits_are_only_read() -> None:
    rows = normal_rows(3)
    rows.setflags(write=False)
    before = rows.copy()
    samplers = [
        sampler(Sampling(temperature=0)),
        sampler(Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01), logprobs=3),
        sampler(Sampling(repetition_penalty=1.3, logit_bias={5: 3.0}), banned=(258,)),
    ]
    assert len(tokens(choose(rows, samplers))) == 3
    assert np.array_equal(rows, before)


@given(seed=st.integers(), choice=st.integers(0, 8), others=st.integers(0, 4))
@settings(max_examples=30)
def test_a_seed_decides_the_draws_whoever_shares_the_batch(seed: int, choice: int, others: int) -> None:
    rows = normal_rows(5)
    sampling = Sampling(temperature=0.9, top_p=0.95)
    alone = sampler(sampling, seed=seed, choice=choice)
    expected = [tokens(choose(row[None], [alone]))[0] for row in rows]

    together = sampler(sampling, seed=seed, choice=choice)
    neighbours = [sampler(Sampling(), seed=index) for index in range(others)]
    found: list[int] = []
    for row in rows:
        batch = np.stack([*normal_rows(others, seed=1), row])
        found.append(tokens(choose(batch, [*neighbours, together]))[-1])
    assert found == expected


def test_seeds_and_choices_draw_differently() -> None:
    row = normal_rows(1)
    drawings = [sampler(Sampling(temperature=1.5), seed=s, choice=c) for s in (-1, 1, 2**63) for c in (0, 1)]
    texts = {tuple(tokens(choose(row, [drawing]))[0] for _ in range(20)) for drawing in drawings}
    assert len(texts) == len(drawings)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.2),
        Sampling(temperature=0.7, top_k=6, top_p=0.9, min_p=0.05),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling: Sampling) -> None:
    row = row_of({3 * token: 0.4 * token for token in range(10)})
    support = reference_support(row, sampling)
    expected = softmax(row[support], sampling.temperature)
    drawing = sampler(sampling, seed=5)
    draws = 4000
    counts: dict[int, int] = {}
    for _ in range(draws):
        token = tokens(choose(row[None], [drawing]))[0]
        counts[token] = counts.get(token, 0) + 1
    assert set(counts) <= set(support)
    for token, probability in zip(support, expected, strict=True):
        spread = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts.get(token, 0) / draws - probability) < 5 * spread + 1e-9


@given(
    seed=st.integers(0, 2**32),
    spread=st.floats(0.1, 8),
    size=st.integers(SIZE, 3000),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0.05, 3),
        top_k=st.one_of(st.just(0), st.integers(1, 400)),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.9999)),
        min_p=st.one_of(st.just(0.0), st.floats(0.0001, 1)),
    ),
)
@settings(max_examples=150)
def test_every_draw_is_one_the_filters_leave(seed: int, spread: float, size: int, sampling: Sampling) -> None:
    row = np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)
    # A little slack at the edge: the reference adds in double precision.
    slack = replace(sampling, top_p=min(1.0, sampling.top_p * 1.0001), min_p=sampling.min_p * 0.9999)
    assert chosen(row, sampling, times=20, seed=seed) <= set(reference_support(row, slack))


def test_filters_leave_exactly_the_reference_tokens() -> None:
    row = normal_rows(1, seed=3)[0]
    for sampling in (
        Sampling(temperature=3, top_k=4),
        Sampling(temperature=3, top_k=12, top_p=0.8),
        Sampling(temperature=0.5, top_p=0.6),
        Sampling(temperature=3, min_p=0.3),
    ):
        assert chosen(row, sampling, times=2000) == set(reference_support(row, sampling))


def test_equal_logits_can_all_be_drawn_at_any_vocabulary_size() -> None:
    for size in (SIZE, 64, 65, 63, 1):
        row = np.zeros(size, np.float32)
        found = chosen(row, Sampling(), times=20 * size + 20, seed=2)
        assert found <= set(range(size))
        assert len(found) > 0.95 * size
    assert chosen(np.zeros(SIZE, np.float32), Sampling(top_k=3), times=100) == {0, 1, 2}


def test_presence_and_frequency_count_the_output_and_not_the_prompt() -> None:
    row = row_of({65: 1.0, 66: 0.9, 67: 0.2})[None]
    prompt = np.array([65, 65, 65], np.int32)
    presence = sampler(Sampling(temperature=0, presence_penalty=0.5), prompt=prompt)
    assert [tokens(choose(row, [presence]))[0] for _ in range(4)] == [65, 66, 65, 65]
    frequency = sampler(Sampling(temperature=0, frequency_penalty=0.5), prompt=prompt)
    assert [tokens(choose(row, [frequency]))[0] for _ in range(5)] == [65, 66, 65, 66, 67]


def test_repetition_penalty_counts_prompt_and_output_and_works_on_both_signs() -> None:
    prompt = np.array([65], np.int32)
    positive = row_of({65: 1.0, 66: 0.9, 67: 0.8})[None]
    repetition = sampler(Sampling(temperature=0, repetition_penalty=2.0), prompt=prompt)
    assert [tokens(choose(positive, [repetition]))[0] for _ in range(3)] == [66, 67, 65]
    negative = row_of({65: -1.0, 66: -1.5})[None]
    repetition = sampler(Sampling(temperature=0, repetition_penalty=2.0), prompt=prompt)
    assert tokens(choose(negative, [repetition])) == [66]


def test_penalties_remember_more_tokens_than_they_first_had_room_for() -> None:
    penalised = sampler(Sampling(temperature=0, presence_penalty=2.0))
    row = np.linspace(1, 0, SIZE, dtype=np.float32)[None]
    assert [tokens(choose(row, [penalised]))[0] for _ in range(SIZE)] == list(range(SIZE))


def test_logit_bias_and_banned_tokens() -> None:
    row = row_of({65: 1.0, 66: 0.5, 258: 3.0})[None]
    assert tokens(choose(row, [sampler(Sampling(temperature=0))])) == [258]
    assert tokens(choose(row, [sampler(Sampling(temperature=0), banned=(258,))])) == [65]
    biased = sampler(Sampling(temperature=0, logit_bias={66: 1.0, 65: -100}), banned=(258,))
    assert tokens(choose(row, [biased])) == [66]


@pytest.mark.parametrize("token", [-1, SIZE, 10**12])
def test_logit_bias_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(RequestError, match=f"token {token}; .* 0 to {SIZE - 1}") as caught:
        sampler(Sampling(logit_bias={token: 1.0}))
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_end_their_row_alone(damage: float, temperature: float) -> None:
    rows = normal_rows(2)
    rows[0, 100] = damage
    samplers = [sampler(Sampling(temperature=temperature)) for _ in rows]
    first, second = choose(rows, samplers)
    assert isinstance(first, NoToken)
    assert "not finite" in first.reason
    assert isinstance(second, Pick)


def test_no_token_left_is_said_and_says_why() -> None:
    row = normal_rows(1)
    (outcome,) = choose(row, [sampler(Sampling(), banned=tuple(range(SIZE)))])
    assert isinstance(outcome, NoToken)
    assert "leave no token" in outcome.reason
    constraint = ConstraintFactory(VOCABULARY).compile(OutputFormat("json_object"))
    (outcome,) = choose(row, [sampler(Sampling(), constraint=constraint, banned=(ord("{"),))])
    assert isinstance(outcome, NoToken)
    assert "constrained output" in outcome.reason
    (outcome,) = choose(row, [sampler(Sampling(logit_bias={5: math.inf}))])
    assert isinstance(outcome, NoToken)
    assert "logit_bias" in outcome.reason


def test_a_complete_constrained_output_is_known_to_the_sampler() -> None:
    constraint = ConstraintFactory(VOCABULARY).compile(OutputFormat("json_schema", {"const": True}))
    constrained = sampler(Sampling(temperature=0), constraint=constraint)
    written = b""
    while not constrained.complete:
        written += VOCABULARY.piece(tokens(choose(normal_rows(1), [constrained]))[0])
    assert written == b"true"
    assert not sampler(Sampling()).complete


def test_log_probabilities_are_of_the_model_before_any_filter() -> None:
    row = normal_rows(1, seed=8)
    expected = np.log(softmax(row[0]))
    best = int(row.argmax())
    asked = sampler(Sampling(temperature=0.3, top_k=1, logit_bias={best: -100}), logprobs=5)
    (pick,) = choose(row, [asked])
    assert isinstance(pick, Pick)
    assert pick.detail is not None
    assert pick.token_id != best
    assert pick.detail.chosen.token_id == pick.token_id
    assert pick.detail.chosen.logprob == pytest.approx(expected[pick.token_id], abs=1e-5)
    assert [entry.token_id for entry in pick.detail.top] == np.argsort(-row[0])[:5].tolist()
    for entry in pick.detail.top:
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-5)
        assert entry.data == VOCABULARY.piece(entry.token_id, special=True)


def test_log_probabilities_of_the_chosen_token_alone() -> None:
    (pick,) = choose(normal_rows(1), [sampler(Sampling(), logprobs=0)])
    assert isinstance(pick, Pick)
    assert pick.detail is not None
    assert pick.detail.top == ()
    (pick,) = choose(normal_rows(1), [sampler(Sampling())])
    assert isinstance(pick, Pick)
    assert pick.detail is None


def test_rows_and_samplers_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        choose(normal_rows(2), [sampler(Sampling())])

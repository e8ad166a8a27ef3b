"""Bounds against known values; a calibration that holds on streams made for it to fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.recall.evidence.bounds import (
    beta_cdf,
    beta_quantile,
    clopper_pearson,
    count_upper,
    gamma_upper,
    normal_quantile,
)
from stockpot.recall.evidence.budget import Budget
from stockpot.recall.evidence.calibration import HORIZON, Calibration, Terms
from stockpot.recall.evidence.fitting import fit
from stockpot.recall.evidence.support import Support, features_of, support_of
from stockpot.recall.questions.question import Likeness

TERMS = Terms(0.95)


def at(similarity: float, support: Support | None = None) -> tuple[float, ...]:
    return features_of(Likeness(similarity=similarity), support or Support(), None)


def name(number: int) -> bytes:
    return number.to_bytes(8, "big")


@pytest.mark.parametrize(
    ("wrong", "of", "lower", "upper"),
    [
        (0, 10, 0.0, 0.308498),  # 1 - 0.025 ** (1 / 10)
        (10, 10, 0.691502, 1.0),
        (1, 10, 0.002529, 0.445016),  # the textbook's table
        (5, 10, 0.187086, 0.812914),
        (3, 1000, 0.000619, 0.008742),
    ],
)
def test_clopper_pearson(wrong: int, of: int, lower: float, upper: float) -> None:
    assert clopper_pearson(wrong, of, 0.95) == pytest.approx((lower, upper), abs=2e-6)


def test_of_nothing_anything_is_possible() -> None:
    assert clopper_pearson(0, 0, 0.95) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 wrong of 2"):
        clopper_pearson(3, 2, 0.95)


@settings(deadline=None)
@given(of=st.integers(1, 60), wrong=st.integers(0, 60), share=st.floats(0.01, 0.99))
def test_the_beta_function_counts_binomials(of: int, wrong: int, share: float) -> None:
    wrong = min(wrong, of - 1)
    chances = [1.0]  # of 0, 1, ... wrong ones, by adding one after another
    for _ in range(of):
        chances = [
            (chances[k] if k < len(chances) else 0) * (1 - share) + (chances[k - 1] * share if k else 0)
            for k in range(len(chances) + 1)
        ]
    assert beta_cdf(share, wrong + 1, of - wrong) == pytest.approx(sum(chances[wrong + 1 :]), abs=1e-9)


@settings(deadline=None)
@given(probability=st.floats(0.001, 0.999), a=st.floats(0.5, 5_000), b=st.floats(0.5, 5_000))
def test_quantiles_are_where_they_say(probability: float, a: float, b: float) -> None:
    assert beta_cdf(beta_quantile(probability, a, b), a, b) == pytest.approx(probability, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "quantile"),
    [(0.5, 3.3174), (1.0, 4.6052), (2.0, 6.6384), (10.0, 18.7831)],  # of the gamma distribution, at 0.99
)
def test_the_quick_bound_is_near_the_exact_one(shape: float, quantile: float) -> None:
    assert gamma_upper(shape, shape, normal_quantile(0.99)) == pytest.approx(quantile, rel=0.02)


@pytest.mark.parametrize(
    ("expected", "count"),
    [(0.04, 0), (0.06, 1), (0.3, 1), (0.4, 2), (1.0, 3), (10.0, 15)],  # Poisson's quantiles at 0.95
)
def test_of_few_answers_one_wrong_is_a_whole_one(expected: float, count: int) -> None:
    assert count_upper(expected / 100, 0.0, 100, normal_quantile(0.95)) == count


def test_a_rate_that_is_not_known_well_has_more_counted() -> None:
    z = normal_quantile(0.95)
    known, unknown = count_upper(0.01, 0.0, 500, z), count_upper(0.01, 0.01**2, 500, z)
    assert (known, unknown) == (9, 16)  # Poisson's; a geometric distribution with the same mean
    assert count_upper(0.01, 0.0, 10_000, z) == pytest.approx(117, abs=1.5)
    assert count_upper(0.0, 0.0, 500, z) == 0


def test_before_there_is_evidence_nothing_is_estimated() -> None:
    calibration = Calibration(1_000, TERMS)
    for number in range(40):
        calibration.add(at(0.9), name(number), b"q", "", wrong=False, stands_for=1)
    calibration.refit()
    assert calibration.estimate(at(0.9)) is None


def test_the_error_falls_with_similarity_and_the_bound_lies_above() -> None:
    calibration, random = Calibration(8_000, TERMS), np.random.default_rng(1)
    for number in range(4_000):
        similarity = float(random.uniform(0.5, 1))
        wrong = bool(random.random() < 1 / (1 + np.exp(20 * (similarity - 0.7))))
        calibration.add(at(similarity), name(number), b"q", "", wrong=wrong, stands_for=1)
    calibration.refit()
    estimates = [calibration.estimate(at(similarity)) for similarity in (0.98, 0.85, 0.7, 0.55)]
    assert all(estimates)
    errors, uppers = zip(*(each for each in estimates if each), strict=True)
    assert list(errors) == sorted(errors) and list(uppers) == sorted(uppers)
    assert errors[0] < 0.02 and uppers[0] < 0.03
    assert errors[2] == pytest.approx(0.5, abs=0.12)


def test_where_similarity_says_nothing_the_bound_is_above_the_rate() -> None:
    calibration, random = Calibration(8_000, TERMS), np.random.default_rng(2)
    for number in range(4_000):
        wrong = bool(random.random() < 0.1)
        calibration.add(at(float(random.uniform(0.5, 1))), name(number), b"q", "", wrong=wrong, stands_for=1)
    calibration.refit()
    for similarity in (0.6, 0.8, 0.99):
        estimate = calibration.estimate(at(similarity))
        assert estimate is not None and estimate[1] > 0.08


def test_an_audited_answer_stands_for_those_that_were_not() -> None:
    """What is rarely looked at, because it is given, counts with all it stands for."""
    few, many = Calibration(8_000, TERMS), Calibration(8_000, TERMS)
    for number in range(2_000):
        for calibration in (few, many):
            calibration.add(at(0.99), name(number), b"a", "", wrong=False, stands_for=1)
    for number in range(100):
        few.add(at(0.6), name(number), b"b", "", wrong=number % 2 == 0, stands_for=1)
        many.add(at(0.6), name(number), b"b", "", wrong=number % 2 == 0, stands_for=20)
    few.refit()
    many.refit()
    (low, high) = (calibration.estimate(at(0.6)) for calibration in (few, many))
    assert low is not None and high is not None
    assert high[1] > 3 * low[1] > 3 * 50 / 2_100


def test_a_pair_is_seen_once_and_the_oldest_leave() -> None:
    calibration = Calibration(100, TERMS)
    for number in range(250):
        calibration.add(at(0.9), name(number), b"q", "", wrong=number % 5 == 0, stands_for=1)
    assert len(calibration) == 100
    assert calibration.seen(name(149), b"q") is None
    assert calibration.seen(name(151), b"q") is True
    calibration.correct(name(151), b"q")
    assert calibration.seen(name(151), b"q") is False
    calibration.refit()
    assert sum(point.seen for point in calibration.curve) <= 100


def test_one_writers_flood_about_one_entry_weighs_little() -> None:
    honest, flooded = Calibration(8_000, TERMS), Calibration(8_000, TERMS)
    for number in range(400):
        for calibration in (honest, flooded):
            calibration.add(at(0.8), name(number), b"q", "", wrong=number % 4 == 0, stands_for=1)
    for number in range(4_000):
        flooded.add(at(0.8), b"one", name(number), "mallory", wrong=False, stands_for=1)
    honest.refit()
    flooded.refit()
    before, after = honest.estimate(at(0.8)), flooded.estimate(at(0.8))
    assert before is not None and after is not None
    assert after[0] > 0.9 * before[0] and after[1] > 0.9 * before[1]


def test_one_writers_flood_about_many_entries_is_bounded_by_the_others() -> None:
    calibration = Calibration(16_000, TERMS)
    for number in range(1_000):
        calibration.add(at(0.8), name(number), b"q", "honest", wrong=number % 4 == 0, stands_for=1)
    for number in range(1_000, 15_000):
        calibration.add(at(0.8), name(number), b"q", "mallory", wrong=False, stands_for=1)
    calibration.refit()
    estimate = calibration.estimate(at(0.8))
    assert estimate is not None
    assert estimate[1] > 0.14  # not 250 / 15,000


def clear(high: int, low: int) -> Calibration:
    """Candidates that are as like as can be, all right, and others of which half are wrong."""
    calibration = Calibration(16_000, TERMS)
    for number in range(high):
        calibration.add(at(0.99), name(number), b"a", "", wrong=False, stands_for=1)
    for number in range(low):
        calibration.add(at(0.5), name(number), b"b", "", wrong=number % 2 == 0, stands_for=1)
    calibration.refit()
    return calibration


def test_a_threshold_that_gives_to_few_requests_has_to_be_the_safer() -> None:
    calibration = clear(1_000, 1_000)
    often = calibration.estimate(at(0.99))
    calibration.refit(comparable=0.03)  # the other requests found nothing near: 150 of 10,000 are given to
    seldom = calibration.estimate(at(0.99))
    assert often is not None and seldom is not None
    assert often[0] == seldom[0]
    assert often[1] < 0.006 < seldom[1] == pytest.approx(1 / 150, rel=0.05)


def test_of_all_requests_the_share_of_wrong_ones_is_smaller() -> None:
    calibration = clear(2_000, 2_000)
    of_given = calibration.estimate(at(0.99))
    calibration.take(Terms(0.95, of_requests=True))
    of_requests = calibration.estimate(at(0.99))
    assert of_given is not None and of_requests is not None
    assert of_requests[0] == of_given[0]
    assert of_requests[1] == pytest.approx(of_given[1] / 2, rel=0.1)
    calibration.refit(comparable=0.5)  # as many requests had nothing to compare with
    halved = calibration.estimate(at(0.99))
    assert halved is not None and halved[1] == pytest.approx(of_given[1] / 4, rel=0.2)


def test_what_is_added_during_a_fit_waits_for_the_next() -> None:
    calibration = clear(2_000, 2_000)
    before = calibration.estimate(at(0.99))
    sample = calibration.sample()
    for number in range(2_000):
        calibration.add(at(0.99), name(number), b"late", "", wrong=True, stands_for=1)
    calibration.install(fit(sample), 1.0)
    assert calibration.estimate(at(0.99)) == before
    assert calibration.refit_is_due
    calibration.refit()
    after = calibration.estimate(at(0.99))
    assert before is not None and after is not None and after[0] > 10 * before[0]


def test_a_neighbourhood_votes() -> None:
    near = [Likeness(similarity=similarity) for similarity in (0.95, 0.93, 0.9, 0.6)]
    assert support_of(0, [b"x", b"x", b"x", b"x"], near) == Support(3, 0, 0.35, True)
    assert support_of(0, [b"x", b"x", b"y", b"x"], near) == Support(2, 1, 0.05, False)
    opposed = support_of(1, [b"y", b"x", b"x", b"x"], near)
    assert opposed == Support(2, 1, -0.02, False) and opposed.contradicted
    assert support_of(0, [b"x"], near[:1]) == Support()


def spent(budget: Budget, error: float, terms: Terms, *, every: int = 1, of: int = 10_000) -> float:
    """Requests, of which one in `every` could be given an answer that is wrong with chance `error`: what it
    costs to give those that the budget allows, at one per cent accepted."""
    for number in range(of):
        budget.looked_up()
        if number % every == 0:
            budget.found_eligible()
            if budget.allows(error, terms, 0.01):
                budget.give(error)
    return budget.charged


def test_a_budget_gives_what_stays_within_it() -> None:
    budget = Budget()
    # What is forgiven, and no more: at twice the accepted error it never recovers.
    assert 0 < spent(budget, 0.02, TERMS) < 3
    for _ in range(1_000):
        budget.give(0.001)
    assert budget.allows(0.02, TERMS, 0.01)


def test_where_few_could_be_given_an_answer_little_is_forgiven() -> None:
    often, seldom = spent(Budget(), 0.02, TERMS), spent(Budget(), 0.02, TERMS, every=100)
    assert 0 < seldom < 0.01 * HORIZON / 100 < often


def test_of_all_requests_more_may_be_wrong_than_of_the_few_given() -> None:
    of_requests = spent(Budget(), 0.04, Terms(0.95, of_requests=True), every=10)
    assert 10 * spent(Budget(), 0.04, TERMS, every=10) < of_requests < 0.01 * 10_000


def test_audits_that_surprise_make_estimates_larger_and_lucky_ones_not_smaller() -> None:
    lucky, unlucky = Budget(), Budget()
    for number in range(200):
        lucky.audit(0.01, wrong=False, was_given=True)
        unlucky.audit(0.01, wrong=number % 10 == 0, was_given=True)
    assert lucky.surprise == 1
    assert unlucky.surprise > 2


def test_what_passed_a_bound_has_to_hold_once_before_it_is_given() -> None:
    budget = Budget()
    for number in range(199 + 200):
        assert not budget.is_confirmed(TERMS, 0.01)
        budget.audit(0.005, wrong=number == 198, was_given=False)
    assert budget.is_confirmed(TERMS, 0.01)
    assert not budget.is_confirmed(TERMS, 0.001)  # who accepts less wants more to have been right
    budget.audit(0.005, wrong=True, was_given=False)
    assert budget.is_confirmed(TERMS, 0.01)
    assert budget.is_confirmed(TERMS, 0.05)


def test_after_a_wrong_answer_the_next_are_checked_until_enough_were_right() -> None:
    budget = Budget()
    budget.audit(0.01, wrong=True, was_given=False)
    assert budget.checks_due == 0  # nobody was given it
    budget.audit(0.01, wrong=True, was_given=True)
    due = budget.checks_due
    budget.check()
    budget.audit(0.01, wrong=True, was_given=False)
    assert budget.checks_due == due > 0
    for _ in range(due):
        budget.check()
        budget.audit(0.01, wrong=False, was_given=False)
    assert budget.checks_due == 0

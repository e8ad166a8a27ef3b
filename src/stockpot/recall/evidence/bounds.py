"""Bounds on a share that was seen in samples: exact ones for reports, quick ones for decisions."""

from __future__ import annotations

import math
from statistics import NormalDist

_STEPS_MAX = 500
_SMALL = 1e-300
_COUNTED = 20.0
"""Counts expected to be larger are not made one by one."""


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for positive `a` and `b`, by its continued fraction
    (DLMF 8.17.22, evaluated with Lentz's method)."""
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1.0 - beta_cdf(1 - x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, _inverse(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _STEPS_MAX):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = _inverse(1 + step * d)
            c = 1 + step / (c if abs(c) > _SMALL else _SMALL)
            fraction *= c * d
        if abs(c * d - 1) < 1e-13:
            break
    return min(1.0, math.exp(front) * fraction / a)


def beta_quantile(probability: float, a: float, b: float) -> float:
    """Where `beta_cdf` is `probability`, to 1e-12."""
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if beta_cdf(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def clopper_pearson(wrong: int, of: int, confidence: float) -> tuple[float, float]:
    """The exact two-sided interval of a share of which `wrong` in `of` were seen (Clopper and Pearson 1934).
    Nothing seen: anything is possible."""
    if not 0 <= wrong <= of:
        raise ValueError(f"{wrong} wrong of {of}: give 0 <= wrong <= of")
    tail = (1 - confidence) / 2
    lower = 0.0 if wrong == 0 else beta_quantile(tail, wrong, of - wrong + 1)
    upper = 1.0 if wrong == of else beta_quantile(1 - tail, wrong + 1, of - wrong)
    return lower, upper


def normal_quantile(probability: float) -> float:
    """Of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


def gamma_upper(mean: float, variance: float, z: float) -> float:
    """The quantile of the gamma distribution with that mean and variance which the standard normal has at
    `z`: an upper bound of a small rate (Wilson and Hilferty 1931; within 2 % from shape 0.5 up)."""
    if mean <= 0:
        return 0.0
    spread = variance / (9 * mean * mean)
    return mean * max(0.0, 1 - spread + z * math.sqrt(spread)) ** 3


def count_upper(mean: float, variance: float, of: float, z: float) -> float:
    """How many of so many are wrong at most, with the probability the standard normal has at `z`: of a rate
    known by its mean and variance (gamma), the count is negative binomial. A whole number while it is small;
    of many the gamma distribution with the same mean and variance is near enough."""
    if mean <= 0 or of <= 0:
        return 0.0
    expected, spread = mean * of, variance * of * of
    if expected > _COUNTED:
        return gamma_upper(expected, expected + spread, z)
    shape = expected * expected / spread if spread > 0 else math.inf
    if not shape < 1e9:  # Poisson's, where the rate is known
        chance, odds, shape = math.exp(-expected), 0.0, math.inf
    else:
        odds = expected / (shape + expected)
        chance = (1 - odds) ** shape
    within, count, confidence = chance, 0, NormalDist().cdf(z)
    while within < confidence and count < _STEPS_MAX:
        chance *= expected / (count + 1) if shape == math.inf else (shape + count) / (count + 1) * odds
        within += chance
        count += 1
    return float(count)


def _inverse(value: float) -> float:
    return 1 / (value if abs(value) > _SMALL else _SMALL)

"""vCache's policy, from its paper: each entry has a threshold of its own, learnt from its own observations.

"vCache: Verified Semantic Prompt Caching" (Schroeder et al., arXiv 2502.03771), sections 4.2 and 4.3. Of an
entry, the probability that its answer is right at similarity s is a logistic curve of slope gamma about a
threshold t. From the estimate of t and its variance the algorithm takes, over all confidences 1 - eps, the
lower bound of that probability, and explores (generates) with the smallest probability tau that keeps
P(wrong) <= delta. Where the paper says nothing this follows its authors' program: observations of an entry
begin with (0, different) and (1, same), six are needed, and an explored answer becomes an entry only if the
nearest entry's would have been wrong.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_NEEDED = 6
_CONFIDENCES = 50
_EDGE = 1e-6
_SEPARATED_VARIANCE = 0.2
"""Over the count of observations: the variance of t where a threshold divides them without an error, and the
curve's own variance is not defined. The authors tabulate simulated ones, which this meets within a third."""
_STEPS_MAX = 60
_GRADIENT = 1e-8


@dataclass(frozen=True, slots=True)
class _Curve:
    """P(same) = 1 / (1 + exp(-gamma (s - t)))."""

    threshold: float
    gamma: float
    variance: float


@dataclass(slots=True)
class _Observed:
    similarities: list[float] = field(default_factory=lambda: [0.0, 1.0])
    labels: list[float] = field(default_factory=lambda: [0.0, 1.0])
    curve: _Curve | None = None
    """None: to be fitted again."""


class VCachePolicy:
    """Entries are known by number. `serves` draws from `seed`: the policy explores at random."""

    def __init__(self, delta: float, seed: int) -> None:
        self._delta = delta
        self._random = random.Random(seed)
        self._entries: dict[int, _Observed] = {}
        self._shares = np.linspace(_EDGE, 1 - _EDGE, _CONFIDENCES)
        normal = NormalDist()
        self._deviations = np.array([normal.inv_cdf(1 - share) for share in self._shares])

    def serves(self, entry: int, similarity: float) -> bool:
        """Whether the entry's answer is given; else it is generated, and `learn` is told."""
        observed = self._entries.get(entry)
        if observed is None or len(observed.labels) < _NEEDED:
            return False
        if observed.curve is None:
            observed.curve = _fit(observed)
        return self._random.random() > self._explores(observed.curve, round(similarity, 3))

    def learn(self, entry: int, similarity: float, *, same: bool) -> None:
        """Whether the entry's answer was that of a question so near."""
        observed = self._entries.setdefault(entry, _Observed())
        observed.similarities.append(round(similarity, 3))
        observed.labels.append(float(same))
        observed.curve = None

    def _explores(self, curve: _Curve, similarity: float) -> float:
        """The probability of exploring (tau; at most 0: none)."""
        thresholds = np.clip(curve.threshold + self._deviations * np.sqrt(curve.variance), 0.0, 1.0)
        right = (1 - self._shares) * _logistic(curve.gamma * (similarity - thresholds))
        return float(np.min(1 - self._delta / (1 - right)))


def _fit(observed: _Observed) -> _Curve:
    similarities, labels = np.array(observed.similarities), np.array(observed.labels)
    design = np.stack([np.ones_like(similarities), similarities], axis=1)
    weights = _regression(design, labels)
    gamma = max(float(weights[1]), 1e-6)
    threshold = float(np.clip(-weights[0] / gamma, 0.0, 1.0))
    if similarities[labels == 1].min() > similarities[labels == 0].max():
        return _Curve(threshold, gamma, _SEPARATED_VARIANCE / len(labels))
    # Delta method: the variance of -b0 / b1 from that of both.
    gradient = np.array([-1 / gamma, weights[0] / gamma**2])
    covariance = np.linalg.pinv(_information(design, _logistic(design @ weights)))
    return _Curve(threshold, gamma, max(0.0, float(gradient @ covariance @ gradient)))


def _regression(design: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic regression without a penalty, by Newton's method with halved steps; where the data can be
    divided without an error the weights have no limit, and it ends when hardly anything is gained."""
    weights = np.zeros(design.shape[1])
    loss = _loss(design, labels, weights)
    for _ in range(_STEPS_MAX):
        right = _logistic(design @ weights)
        gradient = design.T @ (right - labels)
        if float(np.abs(gradient).max()) < _GRADIENT:
            break
        step = np.linalg.pinv(_information(design, right)) @ gradient
        after = _loss(design, labels, weights - step)
        while after > loss and float(np.abs(step).max()) > _GRADIENT:
            step = step / 2
            after = _loss(design, labels, weights - step)
        weights, loss = weights - step, after
    return weights


def _information(design: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    return design.T @ ((right * (1 - right))[:, None] * design)


def _loss(design: NDArray[np.float64], labels: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    logits = design @ weights
    return float(np.sum(np.logaddexp(0.0, logits) - labels * logits))


def _logistic(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(logits / 2))

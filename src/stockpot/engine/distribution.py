"""Questions about one row of logits, answered without sorting the vocabulary.

A vocabulary has 49,152 to 256,000 entries and a step has a row for every running sequence, so what is done
to a whole row is a handful of vectorised passes; sorting is for the few candidates that remain. Rows are
taken one at a time: a row fits the second-level cache where a batch of them does not.

A row is viewed as `_GROUP` rows of columns; a *group* is one such column. Reductions along groups are
element-wise operations on contiguous memory, which numpy vectorises.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stockpot.requests import Sampling

_GROUP = 64

Row = NDArray[np.float32]


def largest(row: Row, count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest values, best first, equal values by index. Entries of -inf are left
    out, so there may be fewer."""
    floor = _floor_of_largest(row, count) if count < len(row) else -math.inf
    candidates = np.flatnonzero(row >= floor) if floor > -math.inf else np.flatnonzero(row > -math.inf)
    order = np.argsort(-row[candidates], kind="stable")[:count]
    return candidates[order]


def _floor_of_largest(row: Row, count: int) -> float:
    """A value that at least `count` entries reach, and not many more."""
    groups = len(row) // _GROUP
    if count < groups:
        # The count-th best of the groups' peaks: that many groups hold an entry at least as large.
        row = row[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    return float(np.partition(row, len(row) - count)[len(row) - count])


def log_normaliser(row: Row, peak: float) -> float:
    """log(sum(exp(row))), given the row's finite maximum: what to subtract from a logit for its log
    probability."""
    return peak + math.log(float(_weights(row, peak, 1.0).sum()))


def draw(row: Row, peak: float, sampling: Sampling, uniform: float) -> int:
    """A token index drawn from softmax(row / temperature) after top_k, top_p and min_p.

    `peak` is the row's finite maximum, `uniform` a number in [0, 1) that decides the draw. top_p is measured
    on what top_k left, as Hugging Face and vLLM do; min_p is relative to the likeliest token (Nguyen et al.
    2024), which always stays.
    """
    candidates = largest(row, sampling.top_k) if 0 < sampling.top_k < len(row) else None
    weights = _weights(row if candidates is None else row[candidates], peak, sampling.temperature)
    floor = sampling.min_p
    if sampling.top_p < 1:
        floor = max(floor, _nucleus_floor(weights, sampling.top_p))
    if floor > 0:
        inside = np.flatnonzero(weights >= np.float32(floor))
        weights = weights[inside]
        candidates = inside if candidates is None else candidates[inside]
    if candidates is None:
        return _pick_of_many(weights, uniform)
    return int(candidates[_pick(weights, uniform)[0]])


def _weights(row: Row, peak: float, temperature: float) -> Row:
    """Unnormalised probabilities; the likeliest token has 1."""
    weights = row - np.float32(peak)
    if temperature != 1:
        weights *= np.float32(1 / temperature)
    return np.exp(weights, out=weights)


def _nucleus_floor(weights: Row, top_p: float) -> float:
    """The least weight in the smallest set that holds `top_p` of all weight (Holtzman et al. 2020). Equal
    weights stay or go together.

    What may be left out is `spare`. Entries below an even share of it cannot exceed it together, so they are
    left out unordered; only the rest, a few hundred to a few thousand, is sorted.
    """
    total = float(weights.sum())
    spare = (1 - top_p) * total
    head = weights[np.flatnonzero(weights >= np.float32(min(spare / len(weights), 1.0)))]
    ordered = np.sort(head)
    left_out = np.cumsum(ordered, dtype=np.float64)
    spare -= total - float(left_out[-1])
    place = int(np.searchsorted(left_out, spare, side="right"))
    return float(ordered[min(place, len(ordered) - 1)])


def _pick_of_many(weights: Row, uniform: float) -> int:
    """As `_pick`, in two levels: which group, then which of its entries. A running sum over a whole row
    would cost several times what its exponentials do."""
    groups = len(weights) // _GROUP
    table = weights[: groups * _GROUP].reshape(_GROUP, groups)
    rest = weights[groups * _GROUP :]
    index, within = _pick(np.concatenate([table.sum(axis=0), rest]), uniform)
    if index >= groups:
        return groups * _GROUP + index - groups
    entry, _ = _pick(table[:, index], within)
    return entry * groups + index


def _pick(weights: Row, uniform: float) -> tuple[int, float]:
    """The entry that `uniform` of all weight falls on, never one of weight 0; and how far into that entry,
    in [0, 1), for a further draw."""
    mass = np.cumsum(weights, dtype=np.float64)
    total = float(mass[-1])
    target = uniform * total
    last = int(np.searchsorted(mass, total))  # of positive weight; rounding must not lead beyond it
    index = min(int(np.searchsorted(mass, target, side="right")), last)
    before = float(mass[index - 1]) if index else 0.0
    within = (target - before) / (float(mass[index]) - before)
    return index, min(max(within, 0.0), math.nextafter(1.0, 0.0))

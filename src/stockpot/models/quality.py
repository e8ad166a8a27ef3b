"""How much an encoding of the weights changes what a model says.

Compared are the distributions of the next token at every place of one English text: the Kullback-Leibler
divergence from the reference (in nats; 0 is the same distribution) and how often the likeliest token is
the same. The measure is that of llama.cpp's `perplexity --kl-divergence`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.driver import Batch, Driver

MAX_TEXT_TOKENS = 512
"""No more places than this, for vocabularies that cut the text into very small pieces."""
_STEP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Quality:
    """Against the reference, over the places of the text: mean and largest divergence in nats, and the
    share of places with the same likeliest token. None where what came out was no number."""

    kl_mean: float | None
    kl_max: float | None
    top1_agreement: float


def quality_text() -> str:
    """The text: description, dialogue, instructions, a table, code, arithmetic; some 400 tokens."""
    return files("stockpot.models").joinpath("quality_text.txt").read_text(encoding="utf-8")


def save_reference(driver: Driver, path: Path) -> None:
    """Write the log probabilities of every place of the text, float32 (places, vocabulary), to `path`."""
    rows = list(_log_probabilities(driver))
    np.save(path, np.concatenate(rows), allow_pickle=False)


def compare(driver: Driver, reference: Path) -> Quality:
    """The quality of `driver`'s weights against what `save_reference` wrote."""
    truth: NDArray[np.float32] = np.load(reference, mmap_mode="r", allow_pickle=False)
    divergences: list[NDArray[np.float64]] = []
    agreeing = 0
    at = 0
    for rows in _log_probabilities(driver):
        expected = np.array(truth[at : at + len(rows)])
        divergences.append((np.exp(expected) * (expected - rows)).sum(axis=1, dtype=np.float64))
        agreeing += int((expected.argmax(axis=1) == rows.argmax(axis=1)).sum())
        at += len(rows)
    all_places = np.concatenate(divergences)
    if not np.isfinite(all_places).all():
        return Quality(None, None, agreeing / at)
    return Quality(float(all_places.mean()), float(all_places.max()), agreeing / at)


def _log_probabilities(driver: Driver) -> Iterator[NDArray[np.float32]]:
    """Log probabilities after each token of the text, some rows at a time; uses sequence 0."""
    driver.clear()
    tokens = np.array(
        driver.vocabulary.encode(quality_text(), special=False, add_begin=True)[:MAX_TEXT_TOKENS], np.int32
    )
    step = min(_STEP_TOKENS, driver.max_batch_tokens)
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        count = len(part)
        logits = driver.decode(
            Batch(
                tokens=part,
                positions=np.arange(start, start + count, dtype=np.int32),
                sequences=np.zeros(count, np.int32),
                wants_logits=np.ones(count, np.bool_),
            )
        )
        rows = logits - logits.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
        yield rows
    driver.clear()

"""Penalties on tokens that were already seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stockpot.requests import Sampling


class Penalties:
    """Which tokens one sequence has seen, and how that changes its logits.

    Repetition (Keskar et al. 2019) counts prompt and output, presence and frequency the output alone (OpenAI
    API). Holds the distinct tokens only, so a step costs what was seen, not the vocabulary.
    """

    def __init__(self, sampling: Sampling, prompt: NDArray[np.int32]) -> None:
        self._repetition = np.float32(sampling.repetition_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        # A presence or frequency penalty says nothing of prompt tokens: without repetition they stay out.
        seen = np.unique(prompt) if sampling.repetition_penalty != 1 else prompt[:0]
        self._size = len(seen)
        self._tokens: NDArray[np.int32] = np.empty(max(2 * self._size, 64), np.int32)
        self._tokens[: self._size] = seen
        self._counts: NDArray[np.float32] = np.zeros(
            len(self._tokens), np.float32
        )  # in the output; 0 for prompt tokens
        self._place = {token: place for place, token in enumerate(seen.tolist())}

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return (
            sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
        )

    def take(self, token: int) -> None:
        """Count a token of the output."""
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if self._size == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.empty(self._size, np.int32)])
                self._counts = np.concatenate([self._counts, np.zeros(self._size, np.float32)])
            self._tokens[place] = token
            self._size += 1
        self._counts[place] += 1

    def apply(self, row: NDArray[np.float32]) -> None:
        """Change the logits in `row`: first repetition, then presence and frequency."""
        tokens = self._tokens[: self._size]
        counts = self._counts[: self._size]
        logits = row[tokens]
        if self._repetition != 1:
            logits = np.where(logits > 0, logits / self._repetition, logits * self._repetition)
        row[tokens] = logits - self._frequency * counts - self._presence * (counts > 0)

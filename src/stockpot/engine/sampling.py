"""Choosing the next token of every sequence that got logits.

For each row, in this order (that of Hugging Face's logits processors and of vLLM, where they agree):

    repetition penalty, presence and frequency penalties, logit_bias, banned tokens, constraint mask,
    temperature, top_k, top_p (of what top_k left), min_p, draw

Temperature 0 (or so small that dividing by it means nothing) takes the likeliest token, the lowest id of
several. Log probabilities are natural logarithms of the model's own distribution, before any of the above,
as OpenAI and vLLM report them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.constraint import Constraint, ConstraintFailed
from stockpot.engine.distribution import draw, largest, log_normaliser
from stockpot.engine.driver import Vocabulary
from stockpot.engine.penalties import Penalties
from stockpot.errors import RequestError
from stockpot.events import TokenDetail, TokenLogprob
from stockpot.requests import Sampling

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: single-precision logits divided by them overflow."""


class Pick(NamedTuple):
    """The chosen token; `detail` where log probabilities were asked for."""

    token_id: int
    detail: TokenDetail | None = None


@dataclass(frozen=True, slots=True)
class NoToken:
    """No token can be chosen for this row; the sequence must end as `error` with this reason."""

    reason: str


class Sampler:
    """How one choice of a request chooses, and what it remembers between steps.

    `prompt` counts for the repetition penalty. `seed` and `choice` alone decide the draws, one a token: the
    same logits give the same tokens, whoever else is in the batch. `banned` tokens are never chosen.
    `logprobs` is as in `Generation`. Raises RequestError for a `logit_bias` outside the vocabulary.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        vocabulary: Vocabulary,
        prompt: NDArray[np.int32],
        seed: int,
        choice: int = 0,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        banned: tuple[int, ...] = (),
    ) -> None:
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._constraint = constraint
        self._logprobs = logprobs
        self._banned = np.array(banned, np.intp)
        self._bias_tokens, self._bias = _bias_arrays(sampling, vocabulary.size)
        self._penalties = Penalties(sampling, prompt) if Penalties.wanted(sampling) else None
        self._edits = bool(
            self._penalties or len(self._banned) or len(self._bias_tokens) or constraint is not None
        )
        greedy = sampling.temperature < _GREEDY_BELOW or sampling.top_k == 1
        # SeedSequence wants entropy that is not negative; two's complement keeps -1 and 1 apart.
        entropy = (seed % 2**64, choice)
        self._random = None if greedy else np.random.Generator(np.random.PCG64(entropy))

    @property
    def complete(self) -> bool:
        """Whether a constrained output is complete: nothing may follow, and the choice must stop."""
        return self._constraint is not None and self._constraint.complete

    def choose(self, row: NDArray[np.float32]) -> Pick | NoToken:
        """Choose from one row of logits, shape (vocabulary size,), which is only read, and remember it."""
        edited = row
        try:
            if self._edits:
                edited = row.copy()
                self._edit(edited)
            best = int(edited.argmax())
            peak = float(edited[best])
            if not np.isfinite(peak):  # argmax and max find NaN and +inf first
                return NoToken(self._why_not(row, peak))
            token = best
            if self._random is not None:
                token = draw(edited, peak, self._sampling, self._random.random())
            if self._penalties is not None:
                self._penalties.take(token)
            if self._constraint is not None:
                self._constraint.accept(token)
        except ConstraintFailed as error:
            return NoToken(str(error))
        return Pick(token, None if self._logprobs is None else self._detail(row, token, self._logprobs))

    def _edit(self, row: NDArray[np.float32]) -> None:
        if self._penalties is not None:
            self._penalties.apply(row)
        if len(self._bias_tokens):
            row[self._bias_tokens] += self._bias
        if len(self._banned):
            row[self._banned] = -np.inf
        if self._constraint is not None:
            self._constraint.restrict(row)

    def _why_not(self, row: NDArray[np.float32], peak: float) -> str:
        if not np.isfinite(row.max()):
            return f"The model's logits are not finite (largest: {row.max()}); the weights may be damaged."
        if np.isnan(peak) or peak > 0:
            return f"Penalties and logit_bias made the logits {peak}; use smaller values."
        if self._constraint is None:
            return "logit_bias and the banned tokens leave no token to choose; ban fewer."
        return "No token of the model continues the constrained output; simplify the schema or logit_bias."

    def _detail(self, row: NDArray[np.float32], token: int, count: int) -> TokenDetail:
        normaliser = log_normaliser(row, float(row.max()))

        def logprob(token_id: int) -> TokenLogprob:
            data = self._vocabulary.piece(token_id, special=True)
            return TokenLogprob(token_id, data, float(row[token_id]) - normaliser)

        top = largest(row, count) if count else ()
        return TokenDetail(logprob(token), tuple(logprob(int(token_id)) for token_id in top))


def choose(logits: NDArray[np.float32], samplers: Sequence[Sampler]) -> list[Pick | NoToken]:
    """One token for each row of `logits`, shape (len(samplers), vocabulary size), which is only read and not
    kept. A row without a possible token does not disturb the others. Updates the samplers."""
    with np.errstate(over="ignore", under="ignore"):  # logits far below the peak become weight 0
        return [sampler.choose(row) for row, sampler in zip(logits, samplers, strict=True)]


def _bias_arrays(sampling: Sampling, size: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    for token in sampling.logit_bias:
        if not 0 <= token < size:
            raise RequestError(
                f"logit_bias names token {token}; this model's tokens are 0 to {size - 1}.",
                param="logit_bias",
            )
    tokens = np.array(list(sampling.logit_bias), np.intp)
    return tokens, np.array(list(sampling.logit_bias.values()), np.float32)

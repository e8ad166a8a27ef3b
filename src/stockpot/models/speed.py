"""How fast a driver computes what serving is made of: new prompts, turns behind a context, answers."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from stockpot.engine.driver import Batch, Driver, Span

PROMPT_TOKENS = 512
CONTEXT_TOKENS = 2048
TURN_TOKENS = 64
STREAMS = 8
CELLS_NEEDED = 4096


@dataclass(frozen=True, slots=True)
class Effort:
    """How often each thing is measured; `behind_context` is the dear one (it computes 2,048 tokens first)."""

    repetitions: int
    decode_steps: int
    behind_context: bool


SKETCH = Effort(repetitions=1, decode_steps=6, behind_context=False)
CAREFUL = Effort(repetitions=2, decode_steps=16, behind_context=True)


@dataclass(frozen=True, slots=True)
class Speed:
    """`prefill_tokens_per_s`: 512 new tokens in an empty context. `turn_s`: 64 new tokens behind 2,048, None
    where not measured. `decode_tokens_per_s` and `decode_8_tokens_per_s`: one stream, and eight in total,
    behind 512 tokens."""

    prefill_tokens_per_s: float
    turn_s: float | None
    decode_tokens_per_s: float
    decode_8_tokens_per_s: float


def measure(driver: Driver, effort: Effort) -> Speed:
    """Measure with the best of the repetitions (noise only ever slows down), for decode with the median
    step. The driver needs CELLS_NEEDED cells, STREAMS sequences and batches of PROMPT_TOKENS; it is left
    empty."""
    run = _Run(driver)
    run.fresh(32)  # the first steps pay for touching the weights
    prefill_s = min(run.fresh(PROMPT_TOKENS) for _ in range(effort.repetitions))
    alone, together = (run.decode_step_s(streams, effort.decode_steps) for streams in (1, STREAMS))
    turn_s = run.turn_s(effort.repetitions) if effort.behind_context else None
    driver.clear()
    return Speed(PROMPT_TOKENS / prefill_s, turn_s, 1 / alone, STREAMS / together)


class _Run:
    """Timed steps with tokens drawn from a fixed seed."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._random = np.random.default_rng(0)

    def step(self, sequences: list[int], positions: list[int]) -> float:
        """Seconds of one batch; logits for the last token of each sequence, as serving asks for them."""
        count = len(positions)
        places = np.array(sequences, np.int32)
        batch = Batch(
            tokens=self._random.integers(0, self._driver.vocabulary.size, count, dtype=np.int32),
            positions=np.array(positions, np.int32),
            sequences=places,
            wants_logits=np.append(places[1:] != places[:-1], True),
        )
        started = time.perf_counter()
        self._driver.decode(batch)
        return time.perf_counter() - started

    def extend(self, sequence: int, start: int, end: int) -> float:
        seconds = 0.0
        for at in range(start, end, self._driver.max_batch_tokens):
            positions = list(range(at, min(at + self._driver.max_batch_tokens, end)))
            seconds += self.step([sequence] * len(positions), positions)
        return seconds

    def fresh(self, tokens: int) -> float:
        self._driver.clear()
        return self.extend(0, 0, tokens)

    def decode_step_s(self, streams: int, steps: int) -> float:
        """The median step of `streams` sequences behind the prompt of sequence 0, which they share as chats
        share a system prompt. Sequence 0 holds PROMPT_TOKENS before and after."""
        for sequence in range(1, streams):
            self._driver.copy(0, sequence, Span(0, PROMPT_TOKENS))
        everyone = list(range(streams))
        median_s = statistics.median(
            self.step(everyone, [PROMPT_TOKENS + step] * streams) for step in range(steps)
        )
        self._driver.cut(0, PROMPT_TOKENS)
        for sequence in range(1, streams):
            self._driver.cut(sequence)
        return median_s

    def turn_s(self, repetitions: int) -> float:
        """TURN_TOKENS behind CONTEXT_TOKENS, of which sequence 0 holds the first PROMPT_TOKENS."""
        self.extend(0, PROMPT_TOKENS, CONTEXT_TOKENS)
        seconds: list[float] = []
        for _ in range(repetitions):
            seconds.append(self.extend(0, CONTEXT_TOKENS, CONTEXT_TOKENS + TURN_TOKENS))
            self._driver.cut(0, CONTEXT_TOKENS)
        return min(seconds)

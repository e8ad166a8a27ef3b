"""What choosing tokens costs a step: `choose` on synthetic logits, for several batch sizes and settings.

    .venv/bin/python benchmarks/sampling/run.py

Prints microseconds of processor time a step (the median of 50 steps, after 10 to warm up; `choose` uses one
thread) and writes them to `result.json` beside this file. The logits are normal with a standard deviation
of 3, the spread of a small model's without its few outstanding tokens: flatter than real ones, the
expensive side for top_p.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from stockpot.engine.constraint import Constraint, ConstraintFactory
from stockpot.engine.driver import Vocabulary
from stockpot.engine.sampling import NoToken, Sampler, choose
from stockpot.requests import OutputFormat, Sampling

VOCABULARY_SIZE = 49_152
BATCH_SIZES = (1, 8, 16)
STEPS = 50
WARM_UP_STEPS = 10
PROMPT_TOKENS = 1_500

CASES: dict[str, Sampling] = {
    "greedy": Sampling(temperature=0),
    "temperature 0.8": Sampling(temperature=0.8),
    "top_p 0.9": Sampling(temperature=0.8, top_p=0.9),
    "top_p 0.9, top_k 40": Sampling(temperature=0.8, top_p=0.9, top_k=40),
    "min_p 0.05": Sampling(temperature=0.8, min_p=0.05),
    "greedy, all penalties": Sampling(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1
    ),
    "temperature 0.8, 5 logprobs": Sampling(temperature=0.8),
    "temperature 0.8, JSON string": Sampling(temperature=0.8),
}


class SyntheticVocabulary(Vocabulary):
    """256 bytes, then two- and three-letter pieces up to `size`, the last of them an end token."""

    def __init__(self, size: int) -> None:
        letters = "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLU"
        longer = [a + b for a in letters for b in letters]
        longer += [a + b for a in letters for b in longer]
        self._pieces = [bytes([byte]) for byte in range(256)]
        self._pieces += [piece.encode() for piece in longer[: size - 257]] + [b"<end>"]
        self.size = len(self._pieces)
        self.begin_token = None
        self.end_token = self.size - 1

    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        del special, add_begin  # nothing here encodes control tokens
        return list(text.encode())

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"" if token == self.end_token and not special else self._pieces[token]

    def ends_generation(self, token: int) -> bool:
        return token == self.end_token


def in_a_string(factory: ConstraintFactory) -> Constraint | None:
    """A constraint in the middle of a JSON string, where most tokens may follow."""
    constraint = factory.compile(OutputFormat("json_schema", {"type": "string"}))
    if constraint is not None:
        constraint.accept(ord('"'))
    return constraint


def measure(name: str, batch: int, vocabulary: Vocabulary, factory: ConstraintFactory) -> float:
    """Median microseconds of processor time of one `choose`: other processes do not count."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (batch, vocabulary.size)).astype(np.float32)
    logits[:, ord('"')] = -1000  # or the JSON string would end
    prompt = random.integers(0, vocabulary.size, PROMPT_TOKENS).astype(np.int32)
    samplers = [
        Sampler(
            CASES[name],
            vocabulary=vocabulary,
            prompt=prompt,
            seed=row,
            constraint=in_a_string(factory) if "JSON" in name else None,
            logprobs=5 if "logprobs" in name else None,
        )
        for row in range(batch)
    ]
    durations_us: list[float] = []
    for _ in range(WARM_UP_STEPS + STEPS):
        started = time.thread_time()
        picks = choose(logits, samplers)
        durations_us.append((time.thread_time() - started) * 1e6)
        for pick in picks:
            if isinstance(pick, NoToken):
                raise SystemExit(f"{name}: {pick.reason}")
    return statistics.median(durations_us[WARM_UP_STEPS:])


def main() -> None:
    vocabulary = SyntheticVocabulary(VOCABULARY_SIZE)
    factory = ConstraintFactory(vocabulary)
    in_a_string(factory)  # reads the vocabulary once
    print(
        f"{f'microseconds a step, {VOCABULARY_SIZE:,} tokens':42}" + "".join(f"{n:>10}" for n in BATCH_SIZES)
    )
    step_us: dict[str, dict[str, float]] = {}
    for name in CASES:
        step_us[name] = {str(n): round(measure(name, n, vocabulary, factory), 1) for n in BATCH_SIZES}
        print(f"{name:42}" + "".join(f"{value:10.1f}" for value in step_us[name].values()))
    result = {
        "vocabulary_size": VOCABULARY_SIZE,
        "steps": STEPS,
        "prompt_tokens": PROMPT_TOKENS,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "median_processor_us_a_step_by_batch_size": step_us,
    }
    Path(__file__).with_name("result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

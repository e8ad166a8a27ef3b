"""Which encodings of the weights are worth trying, and how the best is chosen from what was measured.

Fewer bits are not faster as such: prefill computes, and how fast depends on which kernels the library has
for this processor; decode reads all weights once a step, so there bytes count. Hence the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stockpot.models.gguf import GgufFacts
from stockpot.models.tensor_types import TENSOR_TYPES

MAX_KL_MEAN = 0.01
MAX_KL_MAX = 0.5
"""Nats, against the source's weights computed in f16. What eight-bit activations alone cost is about 0.004;
an encoding or a kernel beyond these bounds changes what the model says and is not used."""

MARGIN = 0.05
"""Scores repeat to about this share on a quiet machine."""

TURN_PROMPT_TOKENS = 256
TURN_ANSWER_TOKENS = 48

_BITS = {kind.name: kind.bits_per_weight for kind in TENSOR_TYPES.values()}
_CANDIDATES = {
    "ik": ("q8_0_r8", "q8_0", "bf16_r16", "bf16", "q8_k_r8", "f16"),
    "llama-cpp": ("q8_0", "bf16", "f16"),
}
SOURCE = "source"
REFERENCE = "f16"
"""The encoding that stands for the source's weights without loss (dequantised; KL to f32: 2e-5)."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a trial of one encoding found; None where it was not measured. Times in seconds.

    `turn_64_s`: 64 new tokens behind 2,048. `score_s`: see `score_s`. `verdict`: why it was kept or not.
    """

    encoding: str
    file_bytes: int
    encode_s: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    prefill_tokens_per_s: float | None = None
    turn_64_s: float | None = None
    decode_tokens_per_s: float | None = None
    decode_8_tokens_per_s: float | None = None
    verdict: str = ""

    @property
    def faithful(self) -> bool:
        """Whether its divergence from the source is known and within the bounds."""
        return (
            self.kl_mean is not None
            and self.kl_max is not None
            and self.kl_mean <= MAX_KL_MEAN
            and self.kl_max <= MAX_KL_MAX
        )

    @property
    def score_s(self) -> float | None:
        """Seconds of a typical turn, lower is better: 256 tokens of new prompt (at the speed of 512), plus
        64 tokens behind a context of 2,048 where measured, plus 48 tokens of answer, half of them alone and
        half among eight streams (each of which waits for the whole step):

            256 / prefill + turn_64 + 24 / decode_1 + 24 x 8 / decode_8
        """
        if not (self.prefill_tokens_per_s and self.decode_tokens_per_s and self.decode_8_tokens_per_s):
            return None
        half = TURN_ANSWER_TOKENS / 2
        return (
            TURN_PROMPT_TOKENS / self.prefill_tokens_per_s
            + (self.turn_64_s or 0.0)
            + half / self.decode_tokens_per_s
            + half * 8 / self.decode_8_tokens_per_s
        )


def candidates(facts: GgufFacts, binding: str) -> tuple[str, ...]:
    """Encodings to try for a model with `binding`, likeliest first: at least as many bits a weight as the
    source's main type. The source as it is stands last, unless it is one of them already."""
    least = _BITS.get(facts.encoding, facts.bits_per_weight)
    finer = tuple(
        name for name in _CANDIDATES.get(binding, ()) if _BITS[name] >= least and name != facts.encoding
    )
    if known_wrong(facts, binding):
        return finer
    return (*finer, SOURCE)


def known_wrong(facts: GgufFacts, binding: str) -> str | None:
    """Why this library must not compute with the file as it is; None where nothing is known against it.

    ik_llama.cpp multiplies q4_1 and q5_1 for batches of 32 tokens and more in groups of four blocks and
    leaves out the blocks after the last whole group (`mul_mat_q8_1_r8_q8_2` in its version 0.1.5): rows must
    be multiples of 128 elements, or the answers are noise (KL 1.7 for the default model).
    """
    broken = sorted(facts.ragged_types & {"q4_1", "q5_1"}) if binding == "ik" else []
    if not broken:
        return None
    return f"ik_llama.cpp computes {' and '.join(broken)} wrongly for rows that are no multiple of 128"


def size_estimate_bytes(facts: GgufFacts, encoding: str) -> int:
    """About how large the file will be in `encoding`."""
    if encoding == SOURCE:
        return facts.file_bytes
    head_bytes = facts.file_bytes - facts.weights_bytes
    return head_bytes + int(facts.parameters * _BITS.get(encoding, 16.0) / 8 * 1.02)


def best(measurements: Sequence[Measurement]) -> Measurement | None:
    """The faithful one with the lowest score; of those measured as carefully as any. Scores within MARGIN of
    the lowest are as good: of these the likeliest, the one that stands first. None if there is none."""
    known = [(m, score) for m in measurements if m.faithful and (score := m.score_s) is not None]
    careful = [(m, score) for m, score in known if m.turn_64_s is not None] or known
    limit_s = (1 + MARGIN) * min((score for _, score in careful), default=0.0)
    return next((m for m, score in careful if score <= limit_s), None)

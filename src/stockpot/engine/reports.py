"""What the engine tells observers (metrics, logs): frozen facts. The engine imports no observer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from stockpot.events import CacheTier, FinishReason, Timings, Usage


@dataclass(frozen=True, slots=True)
class StepReport:
    """One decode of the driver. `inter_token_s` has one value for each stream that got a token and had one
    before; `sample_s` is the part of `duration_s` spent choosing tokens."""

    decode_tokens: int
    prefill_tokens: int
    sequences: int
    duration_s: float
    sample_s: float
    inter_token_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RequestReport:
    """One request is over, whatever the outcome (that of its first choice)."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    preemptions: int


@dataclass(frozen=True, slots=True)
class RefusalReport:
    """A request was not taken. `cause` is the code of the RequestError."""

    cause: str


@dataclass(frozen=True, slots=True)
class EvictionReport:
    """Blocks left a tier for good. Causes: `capacity`, `cleared`; `refused_pinned`: a new block found every
    older one pinned and was not kept."""

    tier: CacheTier
    blocks: int
    size_bytes: int
    cause: str


Report = StepReport | RequestReport | RefusalReport | EvictionReport


class Observer(Protocol):
    """Called on the engine's thread (refusals: the caller's). Must be quick, must not raise."""

    def observe(self, report: Report) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Token counts are totals since start; `prompt_tokens_cached` is by tier.

    `waiting` counts requests without a place in the batch, `joining` those of them that wait for another
    request to finish prefilling their common prefix.
    """

    running: int
    waiting: int
    joining: int
    preempted: int
    steps: int
    cells: int
    cells_used: int
    kv_bytes_per_token: int
    ram_capacity_bytes: int
    ram_used_bytes: int
    ram_blocks: int
    ram_pinned_blocks: int
    prompt_tokens_computed: int
    prompt_tokens_cached: Mapping[CacheTier, int]
    tokens_generated: int
    preemptions: int
    evicted_blocks: Mapping[str, int]
    """Evicted blocks by cause."""

    @property
    def hit_ratio(self) -> float:
        """Share of prompt tokens that were not computed; 0 before the first request."""
        cached = sum(self.prompt_tokens_cached.values())
        total = cached + self.prompt_tokens_computed
        return cached / total if total else 0.0

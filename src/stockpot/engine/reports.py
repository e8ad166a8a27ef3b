"""What the engine tells observers (metrics, logs): frozen facts. The engine imports no observer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from stockpot.events import CacheTier, FinishReason, Timings, Usage
from stockpot.kv.meters import TierSpeed
from stockpot.kv.prefetch import ReadReport
from stockpot.kv.residents import Eviction
from stockpot.kv.tier import TierStats
from stockpot.kv.write_behind import WriteReport


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
class ReuseReport:
    """Blocks of RAM were used; seconds since each was used before."""

    gaps_s: tuple[float, ...]


Report = StepReport | RequestReport | RefusalReport | Eviction | ReuseReport | ReadReport | WriteReport


class Observer(Protocol):
    """Called on the engine's thread (refusals: the caller's; reads and writes: those of the tiers, one at a
    time). Must be quick, must not raise."""

    def observe(self, report: Report) -> None: ...


@dataclass(frozen=True, slots=True)
class TierFigures:
    """A tier behind RAM: its own counts, and how fast it was measured to be."""

    counts: TierStats
    speed: TierSpeed


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
    """Blocks that left RAM, by cause."""
    fetching: int = 0
    """Of the waiting, those whose blocks are on their way from a tier behind RAM."""
    tenant_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes of RAM by tenant; "" is what belongs to nobody."""
    promised_bytes: int = 0
    promises_refused: int = 0
    prefill_s_per_token: float = 0.0
    write_behind_bytes: int = 0
    tiers: Mapping[str, TierFigures] = field(default_factory=dict[str, "TierFigures"])
    """The tiers behind RAM, by name."""

    @property
    def hit_ratio(self) -> float:
        """Share of prompt tokens that were not computed; 0 before the first request."""
        cached = sum(self.prompt_tokens_cached.values())
        total = cached + self.prompt_tokens_computed
        return cached / total if total else 0.0

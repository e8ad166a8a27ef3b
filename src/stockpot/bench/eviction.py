"""Which eviction policy finds most? Recorded workloads, replayed against a tier of several sizes."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stockpot.bench.charts import Chart, Lines
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.results import Cell, Result, Table
from stockpot.clock import Clock, SystemClock
from stockpot.kv.block import BlockId
from stockpot.kv.eviction import POLICY_NAMES, Candidate, EvictionPolicy, PolicyName, make_policy
from stockpot.planner.optimum import optimal_token_rate
from stockpot.planner.replay import Hits, PrefillCost, replay
from stockpot.planner.trace import TRACE_NAMES, SessionOverlap, Trace, TraceName, read_trace

_BASELINE: PolicyName = "lru"
_CHAIN_BLOCKS = 50
_SEED = 3


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """What is replayed. `traces_folder` holds the traces (`planner.trace`); `shares` are capacities as shares
    of all unique blocks; `requests` bounds each trace; `timed_blocks` are kept while operations are timed."""

    traces_folder: Path
    traces: tuple[TraceName, ...] = TRACE_NAMES
    policies: tuple[PolicyName, ...] = POLICY_NAMES
    shares: tuple[float, ...] = (0.02, 0.05, 0.1, 0.25)
    ttl_s: float = 3600.0
    overlap: SessionOverlap = field(default_factory=SessionOverlap)
    cost: PrefillCost = field(default_factory=PrefillCost)
    requests: int | None = None
    timed_blocks: int = 100_000

    @classmethod
    def quick(cls, traces_folder: Path) -> EvictionPlan:
        """Enough to see that everything works."""
        return cls(traces_folder, requests=500, timed_blocks=2_000)


@dataclass(frozen=True, slots=True)
class EvictionReading:
    """One trace at one capacity. `optimum` is the bound on the share of tokens found."""

    trace: str
    uniform: bool
    share: float
    capacity_tokens: int
    hits: dict[PolicyName, Hits]
    unlimited: Hits
    optimum: float


@dataclass(frozen=True, slots=True)
class PolicySpeed:
    """Processor time an operation takes, in microseconds: admitting a block, using one, and evicting one and
    admitting another."""

    policy: PolicyName
    admit_us: float
    hit_us: float
    evict_us: float


def measure_eviction(plan: EvictionPlan, *, progress: BenchProgress = silent) -> Result:
    """Replay every trace under every policy at every capacity. ConfigurationError where one is absent."""
    idleness = measure_idleness()
    speeds: list[PolicySpeed] = []
    for policy in plan.policies:
        progress("time the operations", len(speeds), len(plan.policies))
        speeds.append(_time_operations(policy, plan.timed_blocks))
    progress("time the operations", len(speeds), len(plan.policies))
    readings: list[EvictionReading] = []
    for name in plan.traces:
        trace = read_trace(name, plan.traces_folder, plan.overlap)
        readings += _replay_all(trace if plan.requests is None else trace.head(plan.requests), plan, progress)
    speed_columns = ("policy", "admit us", "use us", "evict and admit us")
    speed_rows = tuple((s.policy, s.admit_us, s.hit_us, s.evict_us) for s in speeds)
    return Result(
        name="eviction",
        parameters={**asdict(plan), "traces_folder": plan.traces_folder.name},
        tables=(
            _table("Share of prompt blocks found", readings, plan.policies, "block_rate"),
            _table("Share of prompt tokens found", readings, plan.policies, "token_rate"),
            _table("Share of prefill time saved", readings, plan.policies, "saved_rate"),
            Table(f"Processor time with {plan.timed_blocks:,} blocks", speed_columns, speed_rows),
        ),
        figures={"readings": [_figures(reading) for reading in readings]},
        idleness=idleness,
        notes=tuple(_note(readings, policy) for policy in plan.policies if policy != _BASELINE),
        chart=_chart(readings, plan.policies),
    )


def _replay_all(trace: Trace, plan: EvictionPlan, progress: BenchProgress) -> list[EvictionReading]:
    work = f"replay {trace.name}"
    total = len(plan.shares) * len(plan.policies)
    progress(work, 0, total)
    unlimited = _replay(trace, _BASELINE, trace.unique_tokens, plan)
    readings: list[EvictionReading] = []
    for share in plan.shares:
        capacity_tokens = int(share * trace.unique_tokens)
        hits: dict[PolicyName, Hits] = {}
        for policy in plan.policies:
            hits[policy] = _replay(trace, policy, capacity_tokens, plan)
            progress(work, len(readings) * len(plan.policies) + len(hits), total)
        optimum = optimal_token_rate(trace, capacity_tokens)
        readings.append(
            EvictionReading(trace.name, trace.uniform, share, capacity_tokens, hits, unlimited, optimum)
        )
    return readings


def _replay(trace: Trace, policy: PolicyName, capacity_tokens: int, plan: EvictionPlan) -> Hits:
    def make(clock: Clock) -> EvictionPolicy:
        return make_policy(policy, clock, ttl_s=plan.ttl_s)

    return replay(trace, make, capacity_tokens, cost=plan.cost)


def _time_operations(name: PolicyName, blocks: int) -> PolicySpeed:
    """Chains of blocks are admitted, then used at random, then give way to new ones."""
    policy = make_policy(name, SystemClock())
    chance = random.Random(_SEED)
    chains = [_chain(number, chance) for number in range(2 * max(1, blocks // _CHAIN_BLOCKS))]
    first, second = chains[: len(chains) // 2], chains[len(chains) // 2 :]
    paths = [[block.id for block in reversed(chance.choice(first))] for _ in first]
    begin_s = time.process_time()
    for chain in first:
        for block in chain:
            policy.admit(block)
    admitted_s = time.process_time()
    for path in paths:
        policy.hit(path)
    hit_s = time.process_time()
    for chain in second:
        for block in chain:
            policy.drop(next(policy.victims()))
            policy.admit(block)
    end_s = time.process_time()
    times_s = (admitted_s - begin_s, hit_s - admitted_s, end_s - hit_s)
    return PolicySpeed(name, *(round(each / (len(first) * _CHAIN_BLOCKS) * 1e6, 2) for each in times_s))


def _chain(number: int, chance: random.Random) -> list[Candidate]:
    ids = [BlockId((number * _CHAIN_BLOCKS + place).to_bytes(8, "big")) for place in range(_CHAIN_BLOCKS)]
    parents = [None, *ids[:-1]]
    return [
        Candidate(block, 100, chance.random(), parent) for block, parent in zip(ids, parents, strict=True)
    ]


def _table(
    title: str, readings: Sequence[EvictionReading], policies: Sequence[PolicyName], rate: str
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for reading in readings:
        # The bound is one on tokens; where blocks have one length it is the same on blocks.
        bounded = rate == "token_rate" or (rate == "block_rate" and reading.uniform)
        rows.append(
            (
                reading.trace,
                round(reading.share * 100, 2),
                *(round(float(getattr(reading.hits[policy], rate)), 4) for policy in policies),
                round(reading.optimum, 4) if bounded else None,
                round(float(getattr(reading.unlimited, rate)), 4),
            )
        )
    return Table(title, ("trace", "capacity %", *policies, "optimum", "no limit"), tuple(rows))


def _figures(reading: EvictionReading) -> dict[str, object]:
    return {
        "trace": reading.trace,
        "share": reading.share,
        "capacity_tokens": reading.capacity_tokens,
        "optimal_token_rate": reading.optimum,
        "policies": {
            policy: {
                "block_rate": hits.block_rate,
                "token_rate": hits.token_rate,
                "saved_rate": hits.saved_rate,
                "evicted_blocks": hits.evicted_blocks,
            }
            for policy, hits in reading.hits.items()
        },
    }


def _note(readings: Sequence[EvictionReading], policy: PolicyName) -> str:
    """What a policy wins or loses against the baseline, in points of the share of tokens found."""
    gains = [
        ((r.hits[policy].token_rate - r.hits[_BASELINE].token_rate) * 100, r)
        for r in readings
        if _BASELINE in r.hits
    ]
    if not gains:
        return f"{policy}: {_BASELINE} was not replayed, so there is nothing to compare with."
    worst, best = min(gains, key=lambda gain: gain[0]), max(gains, key=lambda gain: gain[0])
    saved = [(r.hits[policy].saved_rate - r.hits[_BASELINE].saved_rate) * 100 for r in readings]
    return (
        f"{policy} against {_BASELINE}, in points of tokens found: {_place(worst)} to {_place(best)}, "
        f"{sum(gain for gain, _ in gains) / len(gains):+.2f} on average; "
        f"of prefill time saved {sum(saved) / len(saved):+.2f} on average."
    )


def _place(gain: tuple[float, EvictionReading]) -> str:
    points, reading = gain
    return f"{points:+.2f} ({reading.trace}, {reading.share * 100:g} %)"


def _chart(readings: Sequence[EvictionReading], policies: Sequence[PolicyName]) -> Chart:
    panels: list[Lines] = []
    for trace in dict.fromkeys(reading.trace for reading in readings):
        rows = [reading for reading in readings if reading.trace == trace]
        series: dict[str, Sequence[tuple[float, float]]] = {
            policy: [(row.share * 100, row.hits[policy].token_rate * 100) for row in rows]
            for policy in policies
        }
        series["optimum"] = [(row.share * 100, row.optimum * 100) for row in rows]
        panels.append(Lines(trace, "capacity, % of unique tokens", "% of prompt tokens found", series))
    return Chart(tuple(panels))

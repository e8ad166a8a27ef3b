"""Replay of a trace against one tier of a given size under an eviction policy, without any KV.

A request finds the leading run of its blocks that are there, is one use of each of them, and then writes the
others, the parent first. Its blocks are pinned until it ends. Where nothing may go, the rest is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from stockpot.clock import VirtualClock
from stockpot.kv.block import BlockId
from stockpot.kv.eviction import Candidate, EvictionPolicy
from stockpot.planner.trace import Trace, TraceBlock


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """What computing a token costs, relative to the first of a prompt: attention looks at all before it.

    At position `doubling_tokens` attention costs as much as all the rest. For a transformer of P parameters
    with L layers of width d that is P / (2 L d) tokens: 30 thousand for 8e9, 32 and 4,096.
    """

    doubling_tokens: float = 30_000.0

    def of(self, block: TraceBlock) -> float:
        """The cost of a block."""
        middle = block.start + block.tokens / 2
        return block.tokens * (1 + middle / self.doubling_tokens)


@dataclass(frozen=True, slots=True)
class Hits:
    """Sums over the requests of a replay: of all prompts, and of their beginnings that were found.
    `cost` is in units of `PrefillCost`."""

    blocks: int
    hit_blocks: int
    tokens: int
    hit_tokens: int
    cost: float
    saved_cost: float
    evicted_blocks: int

    @property
    def block_rate(self) -> float:
        """Share of blocks that were found."""
        return self.hit_blocks / max(self.blocks, 1)

    @property
    def token_rate(self) -> float:
        """Share of tokens that were found."""
        return self.hit_tokens / max(self.tokens, 1)

    @property
    def saved_rate(self) -> float:
        """Share of the prefill time of all prompts that was saved."""
        return self.saved_cost / max(self.cost, 1e-9)


def replay(
    trace: Trace,
    make_policy: Callable[[VirtualClock], EvictionPolicy],
    capacity_tokens: int,
    *,
    cost: PrefillCost | None = None,
) -> Hits:
    """Run all requests of `trace` against an empty tier that holds `capacity_tokens`. The policy is told of
    sizes in tokens and costs in units of `cost`; its clock shows the times of the trace."""
    clock = VirtualClock(trace.requests[0].time_s if trace.requests else 0.0)
    tier = _Tier(make_policy(clock), trace, capacity_tokens, cost or PrefillCost())
    for request in trace.requests:
        clock.now_s = request.time_s
        tier.expire(clock.now_s)
        tier.serve(request.path)
    return tier.hits()


class _Tier:
    """The blocks that are there, and what was found of each request."""

    def __init__(self, policy: EvictionPolicy, trace: Trace, capacity_tokens: int, cost: PrefillCost) -> None:
        self._policy = policy
        self._blocks = trace.blocks
        self._costs = {block: cost.of(facts) for block, facts in trace.blocks.items()}
        self._sizes = {block: facts.tokens for block, facts in trace.blocks.items()}
        self._capacity_tokens = capacity_tokens
        self._used_tokens = 0
        self._kept: set[BlockId] = set()
        self._evicted = 0
        self._asked: dict[BlockId, int] = dict.fromkeys(trace.blocks, 0)
        self._found: dict[BlockId, int] = dict.fromkeys(trace.blocks, 0)

    def expire(self, now_s: float) -> None:
        for block in list(self._policy.expired(now_s)):
            self._drop(block)

    def serve(self, path: tuple[BlockId, ...]) -> None:
        kept = self._kept
        found = next((place for place, block in enumerate(path) if block not in kept), len(path))
        for block in path:
            self._asked[block] += 1
        for block in path[:found]:
            self._found[block] += 1
        self._policy.hit(path[:found][::-1])
        pinned = frozenset(path)
        for block in path[found:]:
            if not self._make_room(self._sizes[block], pinned):
                break
            kept.add(block)
            self._used_tokens += self._sizes[block]
            parent = self._blocks[block].parent
            self._policy.admit(Candidate(block, self._sizes[block], self._costs[block], parent))

    def hits(self) -> Hits:
        def total(counts: dict[BlockId, int], each: dict[BlockId, int] | dict[BlockId, float]) -> float:
            return sum(count * each[block] for block, count in counts.items())

        return Hits(
            blocks=sum(self._asked.values()),
            hit_blocks=sum(self._found.values()),
            tokens=int(total(self._asked, self._sizes)),
            hit_tokens=int(total(self._found, self._sizes)),
            cost=total(self._asked, self._costs),
            saved_cost=total(self._found, self._costs),
            evicted_blocks=self._evicted,
        )

    def _make_room(self, tokens: int, pinned: Collection[BlockId]) -> bool:
        while self._used_tokens + tokens > self._capacity_tokens:
            victim = next(self._policy.victims(lambda block: block not in pinned), None)
            if victim is None:
                return False
            self._drop(victim)
            self._evicted += 1
        return True

    def _drop(self, block: BlockId) -> None:
        self._policy.drop(block)
        self._kept.discard(block)
        self._used_tokens -= self._sizes[block]

"""Replay and optimum against brute force on small random traces."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.kv.block import BlockId
from stockpot.kv.eviction import POLICY_NAMES, make_policy
from stockpot.planner.optimum import optimal_token_rate
from stockpot.planner.replay import Hits, PrefillCost, replay
from stockpot.planner.trace import Trace, TraceBlock, TraceRequest


def trace_of(prompts: list[list[int]], lengths: tuple[int, ...] = (1,)) -> Trace:
    """A block for each number and what stands before it; the number decides its length."""
    blocks: dict[BlockId, TraceBlock] = {}
    requests: list[TraceRequest] = []
    for time_s, prompt in enumerate(prompts):
        path: list[BlockId] = []
        start = 0
        for place, number in enumerate(prompt):
            block = BlockId(bytes(prompt[: place + 1]))
            length = lengths[number % len(lengths)]
            blocks[block] = TraceBlock(length, start, path[-1] if path else None)
            path.append(block)
            start += length
        requests.append(TraceRequest(float(time_s), tuple(path)))
    return Trace("test", tuple(requests), blocks)


def hits(trace: Trace, policy: str, capacity_tokens: int, *, ttl_s: float = 1e9) -> Hits:
    return replay(trace, lambda clock: make_policy(policy, clock, ttl_s=ttl_s), capacity_tokens)


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=12)


@given(prompts=PROMPTS, policy=st.sampled_from(POLICY_NAMES))
def test_with_room_for_all_everything_seen_is_found(prompts: list[list[int]], policy: str) -> None:
    trace = trace_of(prompts, lengths=(3, 1, 2))
    found = hits(trace, policy, trace.unique_tokens)
    assert found.blocks - found.hit_blocks == len(trace.blocks)
    assert found.tokens - found.hit_tokens == trace.unique_tokens
    assert found.evicted_blocks == 0
    assert optimal_token_rate(trace, trace.unique_tokens) == pytest.approx(found.token_rate)


@settings(deadline=None)
@given(prompts=PROMPTS, policy=st.sampled_from(POLICY_NAMES), capacity=st.integers(0, 12))
def test_no_policy_exceeds_the_optimum(prompts: list[list[int]], policy: str, capacity: int) -> None:
    trace = trace_of(prompts, lengths=(3, 1, 2))
    assert hits(trace, policy, capacity).token_rate <= optimal_token_rate(trace, capacity) + 1e-9


@settings(deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=6),
    capacity=st.integers(0, 5),
)
def test_the_optimum_is_what_a_search_of_all_choices_finds(prompts: list[list[int]], capacity: int) -> None:
    trace = trace_of(prompts)
    uses = [block for request in trace.requests for block in request.path]

    @functools.cache
    def best(at: int, kept: frozenset[BlockId]) -> int:
        if at == len(uses):
            return 0
        with_it = kept | {uses[at]}
        choices = {with_it - {gone} for gone in with_it} if len(with_it) > capacity else {with_it}
        return (uses[at] in kept) + max(best(at + 1, choice) for choice in choices)

    assert optimal_token_rate(trace, capacity) * len(uses) == pytest.approx(best(0, frozenset[BlockId]()))


@given(prompts=PROMPTS, capacity=st.integers(1, 8))
def test_lru_is_the_lru_of_leaves(prompts: list[list[int]], capacity: int) -> None:
    trace = trace_of(prompts)
    used: dict[BlockId, int] = {}
    found = time = 0
    for request in trace.requests:
        run = [block for block in request.path if block in used]
        found += len(run)
        for block in reversed(run):
            used[block] = time = time + 1
        for block in request.path[len(run) :]:
            parents = {trace.blocks[kept].parent for kept in used}
            leaves = [kept for kept in used if kept not in parents and kept not in request.path]
            if len(used) == capacity:
                if not leaves:
                    break
                del used[min(leaves, key=used.__getitem__)]
            used[block] = time = time + 1
    assert hits(trace, "lru", capacity).hit_blocks == found


def test_what_a_request_stands_on_is_not_evicted_for_it() -> None:
    found = hits(trace_of([[0, 1, 2], [0, 1, 2]]), "lifo", 2)
    assert (found.blocks, found.hit_blocks, found.evicted_blocks) == (6, 2, 0)


def test_blocks_expire_by_the_clock_of_the_trace() -> None:
    trace = trace_of([[0], [1], [1], [0]])
    assert hits(trace, "ttl", 10, ttl_s=2.5).hit_blocks == 1
    assert hits(trace, "ttl", 10, ttl_s=3.5).hit_blocks == 2


def test_later_tokens_cost_more() -> None:
    cost = PrefillCost(doubling_tokens=1000)
    assert cost.of(TraceBlock(100, 0, None)) == pytest.approx(105)
    assert cost.of(TraceBlock(100, 950, None)) == pytest.approx(200)
    found = hits(trace_of([[0, 1], [0, 2]], lengths=(100,)), "lru", 1000)
    assert 0 < found.saved_rate < found.token_rate == 0.25


def test_an_empty_trace_is_no_error() -> None:
    found = hits(Trace("empty", (), {}), "lru", 10)
    assert (found.block_rate, found.token_rate, found.saved_rate) == (0, 0, 0)
    assert optimal_token_rate(Trace("empty", (), {}), 10) == 0

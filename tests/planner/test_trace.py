"""Traces become paths of blocks, in order of time; files that are absent or damaged are named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from stockpot.errors import ConfigurationError
from stockpot.planner.trace import TRACE_NAMES, SessionOverlap, Trace, TraceName, read_trace


def tokens(trace: Trace) -> list[list[int]]:
    return [[trace.blocks[block].tokens for block in request.path] for request in trace.requests]


def assert_well_formed(trace: Trace) -> None:
    times = [request.time_s for request in trace.requests]
    assert times == sorted(times)
    for request in trace.requests:
        parent, start = None, 0
        for block in request.path:
            facts = trace.blocks[block]
            assert (facts.parent, facts.start) == (parent, start)
            parent, start = block, start + facts.tokens


def test_conversations_share_blocks_by_id(traces: Path) -> None:
    trace = read_trace("conversation", traces)
    assert_well_formed(trace)
    assert tokens(trace) == [[512] * 3, [512] * 2, [512] * 3]
    assert [request.time_s for request in trace.requests] == [0.0, 0.5, 3.0]
    first, _, last = (request.path for request in trace.requests)
    assert first[:2] == last[:2]
    assert (trace.references, len(trace.blocks), trace.unique_tokens) == (8, 6, 6 * 512)
    assert trace.uniform


def test_coding_sessions_continue_per_agent_and_share_nothing(traces: Path) -> None:
    trace = read_trace("coding", traces, SessionOverlap(block_tokens=64))
    assert_well_formed(trace)
    assert sorted(len(request.path) for request in trace.requests) == [4, 4, 5, 5, 8, 8]
    # Blocks 1 to 5, four of the agent, and five new ones behind the third; none is in both sessions.
    assert len(trace.blocks) == 2 * (5 + 4 + 5)
    longest = max(trace.requests, key=lambda request: len(request.path))
    assert any(request.path[:3] == longest.path[:3] for request in trace.requests if len(request.path) == 5)


def test_coding_blocks_are_joined_and_the_rest_is_left_out(traces: Path) -> None:
    trace = read_trace("coding", traces, SessionOverlap(block_tokens=128))
    assert_well_formed(trace)
    # Of five blocks two pairs remain; the third request departs within the second pair.
    assert sorted(len(request.path) for request in trace.requests) == [2, 2, 2, 2, 4, 4]
    assert len(trace.blocks) == 2 * (2 + 2 + 3)
    with pytest.raises(ConfigurationError, match="100 is no multiple"):
        read_trace("coding", traces, SessionOverlap(block_tokens=100))


def test_coding_sessions_meet_as_the_seed_says(traces: Path) -> None:
    one, same, other = (read_trace("coding", traces, SessionOverlap(seed=seed)) for seed in (1, 1, 2))
    assert one == same
    alone = read_trace("coding", traces, SessionOverlap(at_once=0.001, block_tokens=64))
    crowded = read_trace("coding", traces, SessionOverlap(at_once=1000, block_tokens=64))
    assert [r.time_s for r in crowded.requests][-1] < 10 < [r.time_s for r in alone.requests][-1]
    assert {request.time_s for request in other.requests}.isdisjoint(r.time_s for r in one.requests)


def test_rag_components_are_blocks_named_by_what_precedes_them(traces: Path) -> None:
    trace = read_trace("rag", traces)
    assert_well_formed(trace)
    assert tokens(trace) == [[100, 50, 7, 30, 9], [100, 50, 60, 7, 8], [100, 60, 50, 7, 8]]
    earliest, middle, last = (request.path for request in trace.requests)
    assert earliest[:2] == middle[:2]
    assert set(middle) & set(last) == {middle[0]}  # the same passages in another order are other blocks
    assert not trace.uniform


def test_a_head_knows_its_own_blocks_alone(traces: Path) -> None:
    trace = read_trace("conversation", traces).head(2)
    assert len(trace.requests) == 2
    assert set(trace.blocks) == {block for request in trace.requests for block in request.path}


@pytest.mark.parametrize("name", TRACE_NAMES)
def test_absent_traces_are_named(name: TraceName, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no trace at .*give the folder that holds them"):
        read_trace(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "line", "complaint"),
    [
        ("conversation", "mooncake_conversation_trace.jsonl", b'{"timestamp": 1}', "line 4 .*hash_ids"),
        ("conversation", "mooncake_conversation_trace.jsonl", b'{"timestamp": 9, "hash', "line 4 "),
        (
            "conversation",
            "mooncake_conversation_trace.jsonl",
            b'{"timestamp": 9, "hash_ids": [0, 2]}',
            "line 4 .*a block stands behind two different ones",
        ),
        (
            "conversation",
            "mooncake_conversation_trace.jsonl",
            b'{"timestamp": 9, "hash_ids": [-1]}',
            "line 4 ",
        ),
        ("coding", "cc_sessions_compact_0.jsonl.gz", b"no gzip", "cannot be read"),
        ("rag", "ragpulse/2_passages.jsonl", b'{"passage": 3}', "passage_id or token_length is missing"),
        (
            "rag",
            "ragpulse/0_trace.jsonl",
            b'{"timestamp": "1", "hash_ids": {"sys_prompt": [99], "passages_ids": [], "history": [], '
            b'"web_search": [], "user_input": []}}',
            "component 99 is in none of the tables",
        ),
    ],
)
def test_damaged_traces_are_refused(
    name: TraceName, file: str, line: bytes, complaint: str, traces: Path
) -> None:
    with (traces / file).open("ab") as opened:
        opened.write(line)
    with pytest.raises(ConfigurationError, match=complaint):
        read_trace(name, traces)


def test_sessions_of_another_block_size_are_refused(traces: Path) -> None:
    line = b'{"id": "x", "block_size": 32, "requests": []}'
    (traces / "cc_sessions_compact_0.jsonl.gz").write_bytes(gzip.compress(line))
    with pytest.raises(ConfigurationError, match="session x has 0 requests in blocks of 32 tokens"):
        read_trace("coding", traces)

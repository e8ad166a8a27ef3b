"""The eviction benchmark from trace to result files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stockpot.bench.eviction import EvictionPlan, measure_eviction
from stockpot.bench.results import write_result
from stockpot.errors import ConfigurationError
from stockpot.kv.eviction import POLICY_NAMES


@pytest.fixture
def plan(tmp_path: Path) -> EvictionPlan:
    """Conversations that come back in turn, each a little longer, behind one system prompt."""
    lines: list[str] = []
    for number in range(60):
        user, turn = number % 6, number // 6
        ids = [0, *(1 + user * 100 + place for place in range(turn + 1))]
        lines.append(json.dumps({"timestamp": number * 1000, "hash_ids": ids}))
    (tmp_path / "mooncake_conversation_trace.jsonl").write_text("\n".join(lines))
    return EvictionPlan(tmp_path, traces=("conversation",), shares=(0.25, 0.5), timed_blocks=200)


def test_every_policy_is_replayed_at_every_size(plan: EvictionPlan, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []

    def progress(description: str, done: int, total: int | None, /) -> None:
        seen.append((description, done, total))

    result = measure_eviction(plan, progress=progress)
    assert result.passed
    blocks, tokens, saved, speed = result.tables
    assert [row[:2] for row in blocks.rows] == [("conversation", 25.0), ("conversation", 50.0)]
    assert blocks.rows == tokens.rows  # all blocks have one length
    for row in tokens.rows:
        *rates, optimum, unlimited = (float(cell) for cell in row[2:] if cell is not None)
        assert len(rates) == len(POLICY_NAMES)
        assert 0 < max(rates) <= optimum <= unlimited < 1
    assert all(row[-2] is None for row in saved.rows)  # the optimum is no bound for time
    assert [row[0] for row in speed.rows] == list(POLICY_NAMES)
    assert len(result.notes) == len(POLICY_NAMES) - 1
    assert ("replay conversation", 12, 12) in seen
    written = write_result(result, tmp_path / "out")
    assert {path.name for path in written} >= {"result.json", "result-4.csv", "figures.md"}
    assert str(tmp_path) not in (tmp_path / "out" / "result.json").read_text()


def test_a_baseline_that_was_not_replayed_is_said(plan: EvictionPlan) -> None:
    result = measure_eviction(replace(plan, policies=("lfu",), requests=10))
    assert result.notes == ("lfu: lru was not replayed, so there is nothing to compare with.",)


def test_absent_traces_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no trace at"):
        measure_eviction(EvictionPlan.quick(tmp_path))

"""Chats behind two vLLM workers: routing by prefix finds much more cached than taking turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from stockpot.bench.fleet import FleetPlan, measure_fleet
from stockpot.bench.fleet_servers import Worker
from stockpot.bench.results import write_result
from stockpot.bench.workload import ChatShape

pytestmark = pytest.mark.anyio


async def test_routing_by_prefix_computes_less(workers: tuple[Worker, ...], tmp_path: Path) -> None:
    shape = ChatShape(
        sessions=5, turns=4, concurrency=2, system_words=200, user_words=150, answer_tokens=12, seed=3
    )
    plan = FleetPlan(rounds=1, shape=shape, policies=("round-robin", "prefix"))
    result = await measure_fleet(plan, workers)
    in_turn, prefix = result.figures["readings"]
    assert prefix["cached_tokens"] > 1.15 * in_turn["cached_tokens"], result.tables
    assert set(in_turn["requests_by_backend"]) == {worker.name for worker in workers}
    assert set(prefix["requests_by_backend"]) == {worker.name for worker in workers}, "one had nothing to do"
    assert (in_turn["ledger_off_tokens"], prefix["ledger_off_tokens"]) == (0, 0)
    assert all(verdict.met for verdict in result.verdicts), result.verdicts
    write_result(result, tmp_path)
    assert "TTFT" in (tmp_path / "figures.md").read_text()

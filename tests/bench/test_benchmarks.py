"""Each benchmark from start to result files, over a server without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from stockpot.bench.kv_cost import KvCostPlan, measure_kv_cost
from stockpot.bench.memory import MemoryPlan, MemorySample, growth_of_last_half, measure_memory
from stockpot.bench.peer import Peer, ServedPeer
from stockpot.bench.peers import PeersPlan, measure_peers
from stockpot.bench.prefix import PrefixPlan, measure_prefix
from stockpot.bench.progress import BenchProgress
from stockpot.bench.results import Verdict, write_result
from stockpot.bench.server import ServerCommand, running_server, stockpot_command
from stockpot.bench.stockpot_server import Launch
from stockpot.bench.workload import ChatShape
from stockpot.errors import ServerUnreachable

pytestmark = pytest.mark.anyio


async def test_kv_cost_has_every_turn_of_both_modes(launch: Launch, tmp_path: Path) -> None:
    result = await measure_kv_cost(KvCostPlan(turns=3, system_words=30, user_words=10), launch=launch)
    rows = result.tables[0].rows
    assert [(row[0], row[1]) for row in rows] == [(m, t) for m in ("reuse", "recompute") for t in (1, 2, 3)]
    tokens = [turn["conversation tokens"] for turn in result.figures["turns"][:3]]
    assert tokens[0] < tokens[1] < tokens[2]
    names = {path.name for path in write_result(result, tmp_path)}
    assert names == {"result.json", "figures.md", "result.csv", "chart.png"}
    assert (tmp_path / "chart.png").stat().st_size < 200_000
    assert (tmp_path / "result.csv").read_text().count("\n") == 7
    assert json.loads((tmp_path / "result.json").read_text())["parameters"]["turns"] == 3


async def test_prefix_has_every_number_of_users(launch: Launch) -> None:
    plan = PrefixPlan(users=(1, 3), system_tokens=300, questions=2, answer_tokens=3)
    result = await measure_prefix(plan, launch=launch)
    cells = result.figures["cells"]
    assert [(cell["cache"], cell["users"]) for cell in cells] == [
        ("on", 1),
        ("on", 3),
        ("off", 1),
        ("off", 3),
    ]
    assert all(0 < cell["hit_ratio"] < 1 for cell in cells)
    assert all(cell["tokens_per_s"] > 0 for cell in cells)


async def test_memory_samples_the_whole_run(launch: Launch) -> None:
    result = await measure_memory(MemoryPlan(requests=100, users=4), launch=launch)
    rows = result.tables[0].rows
    assert rows[0][0] == 0
    assert rows[-1][0] == 100
    assert result.figures["bound_bytes"] > 2**30
    assert [verdict.limit for verdict in result.verdicts] == [1.0, 0.01]


def test_growth_is_that_of_the_last_half() -> None:
    rising = [MemorySample(n, 1000 + 3 * n) for n in range(0, 101, 10)]
    assert growth_of_last_half(rising) == pytest.approx(150)
    settled = [MemorySample(n, 1000 + min(n, 50)) for n in range(0, 101, 10)]
    assert growth_of_last_half(settled) == pytest.approx(0)
    assert growth_of_last_half(rising[:1]) == 0


class _FakePeer(Peer):
    """A server in a process of its own under any name."""

    def __init__(self, name: str, command: ServerCommand) -> None:
        self.name = name
        self._command = command

    def prepare(self, progress: BenchProgress) -> None:
        del progress

    def serve(self, *, concurrency: int) -> ServedPeer:
        del concurrency
        return ServedPeer(self._command, "fake")

    def facts(self) -> Mapping[str, object]:
        return {"version": "fake"}


async def test_peers_are_compared(launch: Launch, process_command: ServerCommand, tmp_path: Path) -> None:
    shape = ChatShape(sessions=2, turns=2, concurrency=2, system_words=20, user_words=4, answer_tokens=3)
    plan = PeersPlan(rounds=1, shapes=(shape,), warm_prompt_tokens=100)
    peers = [_FakePeer(name, process_command) for name in ("stockpot", "llama-server")]
    result = await measure_peers(plan, peers, launch=launch)
    assert [row[1] for row in result.tables[0].rows] == ["stockpot", "llama-server"]
    verdicts = {verdict.what: verdict for verdict in result.verdicts}
    assert set(verdicts) == {
        "S2 T2 C2: mean TTFT over llama-server's",
        "S2 T2 C2: prompt tokens computed over distinct tokens sent",
        "S2 T2 C2: warm TTFT less one step, ms",
    }
    # Prompts differ in their last message at least: something had to be computed for each.
    ours = result.figures["readings"][0]
    assert ours["prompt_tokens"] > ours["distinct_tokens"] > 0
    assert ours["completion_tokens"] == 12
    write_result(result, tmp_path)
    assert (tmp_path / "result-2.csv").read_text().count("\n") == 3


async def test_a_server_is_gone_after_use(process_command: ServerCommand) -> None:
    async with running_server(process_command) as running:
        assert running.rss_bytes() > 0
        assert running.peak_rss_bytes() > 0
    assert running.rss_bytes() == 0


async def test_a_server_that_dies_says_its_last_words() -> None:
    code = "import sys; print('no model today'); sys.exit(66)"
    command = stockpot_command({})
    dying = ServerCommand("doomed", (command.arguments[0], "-c", code), command.port)
    with pytest.raises(ServerUnreachable, match=r"(?s)doomed ended with exit code 66.*no model today"):
        async with running_server(dying):
            pass


def test_settings_travel_in_the_environment() -> None:
    command = stockpot_command({"cache": {"enabled": False, "ram_bytes": 5}, "model": {"source": "x.gguf"}})
    assert command.environment == {
        "STOCKPOT_CACHE__ENABLED": "false",
        "STOCKPOT_CACHE__RAM_BYTES": "5",
        "STOCKPOT_CACHE__DISK__CAPACITY_BYTES": "0",  # a warm disk would falsify a benchmark
        "STOCKPOT_MODEL__SOURCE": "x.gguf",
    }
    assert str(command.port) in command.arguments


def test_a_floor_that_was_not_measured_is_missed() -> None:
    assert Verdict("x", 0.5, 0.5).met
    assert not Verdict("x", 0.51, 0.5).met
    assert not Verdict("x", None, 0.5).met
    assert "not measured" in Verdict("x", None, 0.5).sentence()

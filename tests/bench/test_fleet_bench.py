"""The benchmark of the fleet over servers without a model, before which a real gateway stands."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stockpot.bench.fleet import FleetPlan, measure_fleet
from stockpot.bench.fleet_servers import CHAT, VllmWorkers, Worker, running_gateway
from stockpot.bench.results import write_result
from stockpot.bench.server import RunningServer, ServerCommand, free_port, running_server
from stockpot.bench.workload import ChatShape
from stockpot.cli import bench
from stockpot.errors import ServerUnreachable
from stockpot.settings import load_settings

pytestmark = pytest.mark.anyio


@pytest.fixture
async def fakes(process_command: ServerCommand) -> AsyncIterator[tuple[Worker, ...]]:
    """Two servers in processes of their own."""
    first, second = process_command, _elsewhere(process_command)
    async with running_server(first) as one, running_server(second) as two:
        yield tuple(Worker(f"w{n}", at, "stockpot", {CHAT: "fake"}) for n, at in enumerate((one, two), 1))


def _elsewhere(command: ServerCommand) -> ServerCommand:
    port = free_port()
    return dataclasses.replace(command, arguments=(*command.arguments[:-1], str(port)), port=port)


async def test_every_policy_is_read_and_the_ledger_adds_up(fakes: tuple[Worker, ...], tmp_path: Path) -> None:
    shape = ChatShape(sessions=3, turns=2, concurrency=2, system_words=40, user_words=20, answer_tokens=3)
    plan = FleetPlan(rounds=1, shape=shape, policies=("round-robin", "prefix"))
    result = await measure_fleet(plan, fakes, facts={"engine": "none"})
    assert [row[0] for row in result.tables[0].rows] == ["round-robin", "prefix"]
    for reading in result.figures["readings"]:
        assert sum(reading["requests_by_backend"].values()) == 6
        assert reading["completion_tokens"] == 18
        assert reading["ledger_off_tokens"] == 0
    in_turn = result.figures["readings"][0]
    assert in_turn["requests_by_backend"] == {"w1": 3, "w2": 3}
    values = {verdict.what: verdict.value for verdict in result.verdicts}
    assert values["tokens by which ledger and clients differ, all runs"] == 0
    assert values["prompt tokens computed, prefix over round-robin"] is not None
    write_result(result, tmp_path)
    assert (tmp_path / "chart.png").exists()
    assert (tmp_path / "result-2.csv").read_text().count("\n") == 3


async def test_a_cache_that_cannot_be_emptied_is_no_fair_start(fakes: tuple[Worker, ...]) -> None:
    worker = dataclasses.replace(fakes[0], reset_path="/reset_prefix_cache")
    with pytest.raises(ServerUnreachable, match="reset_prefix_cache answered 404"):
        await worker.reset_cache()


async def test_the_configuration_says_all_that_is_known_of_a_worker(
    fakes: tuple[Worker, ...], tmp_path: Path
) -> None:
    told = dataclasses.replace(fakes[0], server="vllm", kv_events="tcp://h:1", kv_replay="tcp://h:2")
    async with running_gateway((told,), tmp_path, policy="session", settings="[resilience]\nretries = 7"):
        pass
    settings = load_settings(tmp_path / "stockpot.toml")
    backend = settings.backends["w1"]
    assert (backend.server, backend.kv_events, backend.kv_replay) == ("vllm", "tcp://h:1", "tcp://h:2")
    assert (backend.models, settings.routing.policy) == ({CHAT: "fake"}, "session")
    assert (settings.resilience.retries, settings.engine.enabled) == (7, False)
    assert tomllib.loads((tmp_path / "stockpot.toml").read_text())["data_dir"] == str(tmp_path)


def test_workers_share_the_processors(tmp_path: Path) -> None:
    workers = VllmWorkers(tmp_path)
    commands = [workers.worker_command(number, 1, 2) for number in (1, 2)]
    processors = sorted(os.sched_getaffinity(0))
    bound = [command.environment["VLLM_CPU_OMP_THREADS_BIND"] for command in commands]
    assert bound == [str(processors[0]), str(processors[1 % len(processors)])]
    assert commands[0].port != commands[1].port
    assert '"endpoint": "tcp://*:1"' in commands[0].arguments[-1]
    assert str(tmp_path) not in repr(workers.facts())


async def test_a_worker_without_a_reset_is_left_as_it_is() -> None:
    worker = Worker("w", RunningServer("http://127.0.0.1:1", 1), "generic", {"a": "b"})
    await worker.reset_cache()
    assert worker.section().splitlines()[-1] == 'models = { "a" = "b" }'


@pytest.fixture
def app() -> Iterator[typer.Typer]:
    app = typer.Typer()
    app.callback()(lambda: None)
    bench.register(app)
    yield app


def test_help_says_what_is_measured(app: typer.Typer) -> None:
    assert "fleet" in CliRunner().invoke(app, ["bench", "--help"]).output
    result = CliRunner().invoke(app, ["bench", "fleet", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "--quick" in result.output
    assert "vLLM" in result.output

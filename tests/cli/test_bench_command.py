"""`stockpot bench` as a person sees it: help, wrong names, results on the screen and in files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stockpot.bench import kv_cost
from stockpot.bench.charts import Chart, Lines
from stockpot.bench.machine import Idleness
from stockpot.bench.progress import BenchProgress
from stockpot.bench.results import Result, Table, Verdict
from stockpot.cli import bench


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    bench.register(app)
    return app


@pytest.mark.parametrize("name", ["kv-cost", "prefix", "peers", "memory"])
def test_help_says_what_is_measured(app: typer.Typer, name: str) -> None:
    listed = CliRunner().invoke(app, ["bench", "--help"])
    assert name in listed.output
    result = CliRunner().invoke(app, ["bench", name, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "--quick" in result.output
    assert "--out" in result.output


def test_an_unknown_peer_is_wrong_usage(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["bench", "peers", "--peer", "sglang"], env={"COLUMNS": "100"})
    assert result.exit_code == 2
    assert "llama-server, vllm" in result.output


def _measured(*, met: bool) -> Result:
    lines = Lines("Time", "turn", "ms", {"reuse": [(1.0, 2.0), (2.0, 3.0)]})
    return Result(
        name="kv-cost",
        parameters={"turns": 2},
        tables=(Table("A table", ("turn", "TTFT ms"), ((1, 2.0), (2, None))),),
        figures={"turns": []},
        idleness=Idleness(3.0, 0.5),
        verdicts=(Verdict("a ratio", 0.5 if met else 2.0, 1.0),),
        notes=("A note.",),
        chart=Chart((lines,)),
    )


def _replace_measurement(monkeypatch: pytest.MonkeyPatch, *, met: bool) -> list[kv_cost.KvCostPlan]:
    plans: list[kv_cost.KvCostPlan] = []

    async def measure(plan: kv_cost.KvCostPlan, *, progress: BenchProgress) -> Result:
        plans.append(plan)
        progress("conversation", 1, 1)
        return _measured(met=met)

    monkeypatch.setattr(kv_cost, "measure_kv_cost", measure)
    return plans


def test_results_are_shown_and_written(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans = _replace_measurement(monkeypatch, met=True)
    out = tmp_path / "results"
    result = CliRunner().invoke(app, ["bench", "kv-cost", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert plans == [kv_cost.KvCostPlan.quick()]
    assert "A table" in result.output
    assert "met: a ratio 0.5" in result.output
    assert "The machine is quiet" in result.output
    assert {path.name for path in out.iterdir()} >= {"result.json", "result.csv", "figures.md"}
    assert "| 2 | - |" in (out / "figures.md").read_text()


def test_a_missed_floor_is_exit_code_1(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans = _replace_measurement(monkeypatch, met=False)
    result = CliRunner().invoke(app, ["bench", "kv-cost", "--turns", "4", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert plans[0].turns == 4
    assert "MISSED: a ratio 2" in result.output
    assert (tmp_path / "result.json").is_file()


def test_without_matplotlib_there_is_advice_instead_of_a_chart(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _replace_measurement(monkeypatch, met=True)

    def not_found(name: str) -> None:
        assert name == "matplotlib"

    monkeypatch.setattr(importlib.util, "find_spec", not_found)
    result = CliRunner().invoke(app, ["bench", "kv-cost", "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "pip install 'stockpot[bench]'" in result.output
    assert not (tmp_path / "chart.png").exists()

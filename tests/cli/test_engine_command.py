"""`stockpot engine`, as a person types it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stockpot.cli import engine
from stockpot.errors import BuildFailed


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    engine.register(app)
    return app


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STOCKPOT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")


def test_info_shows_what_is_there_and_what_a_build_would_gain(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["engine", "info"])
    assert result.exit_code == 0, result.output
    for words in ("ik_llama.cpp, wheel", "not built for this processor", "used", "to compile with"):
        assert words in result.output
    assert "stockpot engine build" in result.output


def test_info_names_missing_tools(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    result = CliRunner().invoke(app, ["engine", "info"])
    assert result.exit_code == 0, result.output
    assert "Compiling needs cmake" in result.output


def test_build_without_tools_is_a_build_failure(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    result = CliRunner().invoke(app, ["engine", "build"])
    assert isinstance(result.exception, BuildFailed)
    assert result.exception.exit_code == 70
    assert "cmake" in str(result.exception)


def test_help_teaches(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["engine", "build", "--help"])
    assert result.exit_code == 0
    assert "compiler" in result.output
    assert "--force" in result.output

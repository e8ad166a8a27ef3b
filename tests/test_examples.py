"""The examples fit, without a warning, when the variables they name are set; and they name no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stockpot.cli import config

EXAMPLES = Path(__file__).parent.parent / "examples"
VARIABLES = {
    "laptop": {},
    "team": {"STOCKPOT_ADMIN_KEY": "an-admin-key", "ANTHROPIC_API_KEY": "a-key"},
    "cluster": {
        "STOCKPOT_ADMIN_KEY": "an-admin-key",
        "STOCKPOT_REDIS_PASSWORD": "a-password",
        "STOCKPOT_DATABASE_URL": "postgresql+psycopg://stockpot:pass@db.internal/stockpot",
        "VLLM_API_KEY": "a-key",
    },
}


@pytest.mark.parametrize("name", VARIABLES)
def test_an_example_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in VARIABLES[name].items():
        monkeypatch.setenv(variable, value)
    app = typer.Typer()
    config.register(app)
    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["config", "check", "--config", str(EXAMPLES / f"{name}.toml")])
    assert result.exit_code == 0, result.output
    assert "fits:" in result.output
    assert "warning" not in result.output


@pytest.mark.parametrize("name", VARIABLES)
def test_the_guide_names_what_an_example_needs(name: str) -> None:
    settings = (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")
    assert set(re.findall(r'"env:([A-Z_]+)"', settings)) == set(VARIABLES[name])
    line = next(
        line
        for line in (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| `{name}.toml`")
    )
    assert set(re.findall(r"`([A-Z_]{5,})`", line)) == set(VARIABLES[name])


def test_every_example_is_checked() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == set(VARIABLES)

"""`stockpot models` as a person types it: help, and model files that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _stockpot(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with no settings and an empty cache."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STOCKPOT_")}
    return subprocess.run(
        [sys.executable, "-m", "stockpot", *arguments],
        cwd=folder,
        env=environment | {"STOCKPOT_CACHE_DIR": str(folder / "cache"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_help_lists_what_can_be_done(tmp_path: Path) -> None:
    result = _stockpot(tmp_path, "models", "--help")
    assert result.returncode == 0, result.stderr
    for word in ("list", "pull", "info", "tune"):
        assert word in result.stdout


def test_an_empty_cache_says_how_to_fill_it(tmp_path: Path) -> None:
    result = _stockpot(tmp_path, "models", "list")
    assert result.returncode == 0, result.stderr
    assert "stockpot models pull" in result.stdout


@pytest.mark.parametrize(
    ("name", "content", "exit_code", "reason"),
    [
        ("nope.gguf", None, 66, "There is no model"),
        ("recipe.gguf", b"Take two onions and a pot.\n", 65, "is not a GGUF file"),
    ],
)
def test_an_unusable_file_is_one_sentence_and_its_exit_code(
    tmp_path: Path, name: str, content: bytes | None, exit_code: int, reason: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = _stockpot(tmp_path, "models", "info", str(path))
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert str(path) in line
    assert reason in line
    assert "Traceback" not in result.stderr

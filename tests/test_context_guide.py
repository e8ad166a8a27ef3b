"""The examples of docs/context.md, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

from tests.test_readme import blocks

from stockpot.doctor.finding import Cause
from stockpot.settings import load_settings
from stockpot.settings_telemetry import RecordingSettings

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "context.md").read_text(encoding="utf-8")


def printed(example: str) -> str:
    """What an example prints."""
    command = [sys.executable, "-W", "error", "-c", example]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_the_examples_print_what_is_shown() -> None:
    built, refused, fitted = blocks("python", GUIDE)
    shown = re.findall(r"It prints[^\n]*:\n\n```\n(.*?)```", GUIDE, re.DOTALL)
    assert printed(built) == shown[0]
    assert "context.fact('time', '2026-11-25T09:50:00Z')" in printed(refused)
    assert printed(fitted) == shown[1]


def test_the_settings_fit_and_all_are_shown(tmp_path: Path) -> None:
    (block,) = blocks("toml", GUIDE)
    file = tmp_path / "stockpot.toml"
    file.write_text(block)
    assert load_settings(file).telemetry.recording.mode == "on"
    assert all(name in block for name in RecordingSettings.model_fields)


def test_all_causes_are_named() -> None:
    missing = [cause for cause in get_args(Cause) if cause not in GUIDE]
    assert not missing

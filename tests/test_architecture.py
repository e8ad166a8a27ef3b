"""ARCHITECTURE.md stays true: what it names exists, what exists is named, and imports point one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "stockpot"
DOCUMENT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")

# A room may import the rooms below it in this list, and those on its own line.
STOREYS = (
    {"cli", "bench", "lessons"},
    {"serving", "serving_recall", "config_watch", "config_check", "config_show"},
    {"runtime"},
    {"wire"},
    {"telemetry"},
    {"gateway"},
    {"recall"},
    {"routing"},
    {"guards", "allowances", "identity"},
    {"doctor"},
    {"accounts"},
    {"context"},
    {"backends"},
    {"planner"},
    {"models", "engine", "kv"},
    {"records"},
    {"requests", "events"},
    {"settings"},
    {"settings_gateway", "settings_guards", "settings_recall", "settings_telemetry", "settings_problems"},
    {"settings_types", "caller", "errors", "clock"},
)


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_every_path_the_document_names_exists() -> None:
    named = re.findall(r"`((?:src|tests|benchmarks|docs|\.ci)/[^`\s]+|[A-Za-z_]+/[a-z_]+\.py)`", DOCUMENT)
    assert named
    missing = [path for path in named if not (ROOT / path).exists() and not (SOURCE / path).exists()]
    assert not missing, f"ARCHITECTURE.md names what is not there: {missing}"


def test_every_module_is_named_in_the_document() -> None:
    unnamed = [
        str(path.relative_to(SOURCE))
        for path in modules()
        if path.name not in ("__init__.py",) and str(path.relative_to(SOURCE)) not in DOCUMENT
    ]
    assert not unnamed, f"ARCHITECTURE.md does not say what these are for: {unnamed}"


def test_imports_point_down_the_path() -> None:
    storey = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}
    wrong: list[str] = []
    for path in modules():
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in storey:
            continue
        for target in imported_rooms(path):
            if storey.get(target, len(STOREYS)) < storey[room]:
                wrong.append(f"{path.relative_to(SOURCE)} imports {target}")
    assert not wrong, f"imports that point up: {wrong}"


def imported_rooms(path: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stockpot."):
            rooms.add(node.module.split(".")[1])
    return rooms


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): n
        for path in modules()
        if (n := len(path.read_text().splitlines())) > 420
    }
    assert not long, f"files that have grown too long to read in one sitting: {long}"

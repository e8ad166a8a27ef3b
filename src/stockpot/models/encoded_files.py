"""Where re-encoded weights are kept, and what was decided about them.

    models/encoded/<name>-<content>/
        ik-q8_0_r8.gguf              the weights, re-encoded for a binding
        decision-<identity>.json     what was measured and chosen, for one library on one processor

A decision that cannot be read, or whose file is gone or of another size, is a miss and is made anew.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blake3 import blake3

from stockpot.models.candidates import Measurement
from stockpot.models.gguf import GgufFacts
from stockpot.models.publish import staged
from stockpot.models.source import LocatedModel, models_dir

_FORMAT = 1
TRIALS_PREFIX = ".trials-"
MAX_DECISIONS = 8
"""Of one model: a library built anew, or another processor, makes a further one."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is written beside the encoded files. `file` is a name in the same folder, None for the source."""

    source: str
    content: str
    identity: str
    decided_at: float
    encoding: str
    file: str | None
    file_bytes: int
    reason: str
    measurements: tuple[Measurement, ...]
    format: int = _FORMAT


class EncodedFiles:
    """The folder of one source's encoded files."""

    def __init__(self, located: LocatedModel, facts: GgufFacts, cache_dir: Path) -> None:
        hasher = blake3(max_threads=blake3.AUTO)
        for part in facts.parts:
            hasher.update_mmap(part)
        self.content = hasher.hexdigest()[:16]
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", located.path.stem)[:80]
        self.folder = models_dir(cache_dir) / "encoded" / f"{stem}-{self.content}"

    def file(self, binding: str, encoding: str) -> Path:
        """Where the encoded file lives. Bindings do not share files: the fork has types of its own."""
        return self.folder / f"{binding}-{encoding}.gguf"

    def read_decision(self, identity: str) -> Decision | None:
        """The decision for `identity`, if it is whole and its file is there."""
        decision = _read(self._decision_path(identity))
        if decision is None or decision.identity != identity or decision.content != self.content:
            return None
        if decision.file is not None:
            path = self.folder / decision.file
            if Path(decision.file).name != decision.file or not path.is_file():
                return None
            if path.stat().st_size != decision.file_bytes:
                return None
        return decision

    def write_decision(self, decision: Decision) -> None:
        with staged(self._decision_path(decision.identity)) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(decision), indent=2))

    def sweep(self) -> None:
        """Remove decisions that cannot be read or are older than the newest MAX_DECISIONS (libraries long
        replaced), encoded files no decision names, and what trials of dead processes left."""
        known = [(path, _read(path)) for path in self.folder.glob("decision-*.json")]
        known.sort(key=lambda pair: pair[1].decided_at if pair[1] else 0.0, reverse=True)
        kept: set[str | None] = set()
        for rank, (path, decision) in enumerate(known):
            if decision is None or rank >= MAX_DECISIONS:
                path.unlink()
            else:
                kept.add(decision.file)
        for path in self.folder.glob("*.gguf"):
            if path.name not in kept:
                path.unlink()
        for path in self.folder.glob(f"{TRIALS_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _decision_path(self, identity: str) -> Path:
        return self.folder / f"decision-{blake3(identity.encode()).hexdigest()[:16]}.json"


def decisions(cache_dir: Path) -> tuple[tuple[Path, Decision], ...]:
    """All decisions in the cache with their folders, for `stockpot models list`."""
    found = sorted((models_dir(cache_dir) / "encoded").glob("*/decision-*.json"))
    read = [(path.parent, _read(path)) for path in found]
    return tuple((folder, decision) for folder, decision in read if decision)


def _read(path: Path) -> Decision | None:
    """A decision, or None where there is none that can be read (any doubt is a miss)."""
    try:
        decision = msgspec.json.decode(path.read_bytes(), type=Decision)
    except (OSError, msgspec.DecodeError):
        return None
    return decision if decision.format == _FORMAT else None

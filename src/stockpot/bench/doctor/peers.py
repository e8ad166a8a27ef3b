"""Other tools that look for broken prompt caches, on the same conversations.

Each is given every conversation by itself, so none has to group them. What a tool says is mapped generously:
a cause is named right if one of its words fits it, whatever else it says.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stockpot.bench.progress import BenchProgress
from stockpot.bench.setup_steps import PythonEnvironment, Workshop

Json = dict[str, Any]
Named = Mapping[str, Sequence[str]]

_MOVING = ("timestamp", "date", "uuid", "counter")
_FORMS = ("key_order", "white_space", "unicode_form")


@dataclass(frozen=True, slots=True)
class Peer:
    """One tool. `fits` maps what it says (a pattern) to the causes it may stand for; what matches no pattern
    is a break without a cause. `silent` patterns are none."""

    name: str
    version: str
    packages: tuple[str, ...]
    fits: Mapping[str, tuple[str, ...]]
    silent: str = r"FAILED "

    def detected(self, said: Sequence[str]) -> bool:
        """Whether it says that something is broken."""
        return any(not re.match(self.silent, each) for each in said)

    def right(self, said: Sequence[str], cause: str) -> bool:
        """Whether it says that something is broken, and something it says fits the cause."""
        return self.detected(said) and any(
            re.search(pattern, each) and cause in causes
            for each in said
            for pattern, causes in self.fits.items()
        )

    def named(
        self, conversations: Mapping[str, list[Json]], cache_dir: Path, progress: BenchProgress
    ) -> Named:
        """What it says of each. Raises BuildFailed where it cannot be installed or run."""
        folder = cache_dir / "bench" / f"{self.name}-{self.version}"
        complete = folder / "complete"
        workshop = Workshop(folder, progress)
        if not complete.is_file():
            PythonEnvironment(workshop, "venv").create((f"{self.name}=={self.version}", *self.packages))
            complete.touch()
        with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as name:
            work = Path(name)
            (work / "conversations.json").write_text(json.dumps(conversations), encoding="utf-8")
            script = Path(__file__).with_name("peer_answers.py")
            python = folder / "venv" / "bin" / "python"
            workshop.run(f"ask {self.name}", [python, script, self.name, work], cwd=work)
            return json.loads((work / "answers.json").read_text(encoding="utf-8"))


def peers() -> tuple[Peer, ...]:
    """Those that read recorded requests. `pcdlint` 0.3.0 reads Python source and no requests."""
    return (
        Peer(
            "kvlint",
            "0.1.1",
            (),
            MappingProxyType(
                {
                    "dynamic_time": ("timestamp", "date"),
                    "dynamic_id": ("uuid",),
                    "user_in_system": ("system_changed", "counter"),
                    "key_order": ("key_order", "tool_reordered"),
                    "whitespace_drift": ("white_space",),
                    "volatile_fewshot": ("history_edited",),
                    "short_prefix": ("below_minimum",),
                }
            ),
            # Of the size of blocks, and not of a break.
            silent=r"FAILED |block_straddle",
        ),
        Peer(
            "prefixguard",
            "0.2.1",
            (),
            MappingProxyType(
                {
                    "VOLATILE": _MOVING,
                    "SYSTEM_MUTATED": ("system_changed",),
                    "TOOL_REORDER": ("tool_reordered",),
                    "TOOL_SET_CHANGED": ("tool_added", "tool_removed"),
                    "TOOL_SCHEMA_DRIFT": ("tool_changed", "key_order"),
                    "HISTORY_REWRITE": ("history_edited", "image_reencoded"),
                    "HISTORY_DROP|COMPACTION": ("history_truncated",),
                    "NON_DETERMINISTIC": _FORMS,
                }
            ),
            silent=r"FAILED |LINT ",
        ),
        Peer(
            "promptcachelint",
            "0.1.0",
            (),
            MappingProxyType(
                {
                    "CL001": ("system_changed", "history_edited", "history_truncated", "image_reencoded"),
                    "CL002": ("tool_added", "tool_removed", "tool_reordered", "tool_changed"),
                    "CL003": ("model_changed", "parameters_changed"),
                    "CL005": ("evicted", "routed_elsewhere"),
                    "CL006": ("ttl_expired",),
                    "CL007": ("beyond_lookback",),
                    "CL010": ("no_boundary",),
                    "CL011": ("below_minimum",),
                    "CL012": _MOVING,
                }
            ),
            # A suspicion, it says, which the finding of a break confirms.
            silent=r"FAILED |CL012",
        ),
        Peer(
            "ctxdiff",
            "0.5.1",
            (),
            MappingProxyType(
                {
                    # It names the kind of block that changed, and how.
                    "modified system block": ("system_changed",),
                    "reordered: .*tool_schema": ("tool_reordered",),
                    "added: .*tool_schema": ("tool_added",),
                    "evicted: .*tool_schema": ("tool_removed",),
                    "modified tool_schema": ("tool_changed",),
                    "different image": ("image_reencoded",),
                    "modified (history|user|assistant|tool_output) block": ("history_edited",),
                    "evicted: .*(history|user|assistant)": ("history_truncated",),
                }
            ),
        ),
    )

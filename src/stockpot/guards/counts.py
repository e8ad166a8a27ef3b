"""What guards did: counts for metrics, and sentences for the sender of one request."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from stockpot.events import Notice
from stockpot.settings_guards import Action, Stage


class GuardCounts:
    """Findings by (rule, stage, action) since start; bounded by the number of rules."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, rule: str, stage: Stage, action: Action, count: int = 1) -> None:
        with self._lock:  # large texts are read in threads
            self._counts[rule, stage, action] += count

    def totals(self) -> list[tuple[tuple[str, str, str], int]]:
        with self._lock:
            return list(self._counts.items())


class Told:
    """Turns what was done to one request into notices, each said once."""

    def __init__(self, notices: list[Notice]) -> None:
        self._notices = notices

    def add(self, rule: str, action: Action, stage: Stage, kinds: Sequence[str]) -> None:
        what = "request" if stage == "input" else "answer"
        done = {"redact": "were replaced in", "note": "were found in"}.get(action, "led to another try of")
        listed = ", ".join(kind.replace("_", " ") for kind in kinds)
        notice = Notice(f"guard_{action}", f"The guard {rule!r}: {listed} {done} the {what}.")
        if notice not in self._notices:
            self._notices.append(notice)

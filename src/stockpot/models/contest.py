"""The contest of encodings: each tried in short, the best tried with care (successive halving).

Other programs only ever slow a trial down, and not all trials alike. So trials are repeated where they
disagree, the best of each figure counts, and the outcome says that the machine was busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stockpot.errors import DownloadFailed
from stockpot.models.candidates import REFERENCE, SOURCE, Measurement, best, candidates, size_estimate_bytes
from stockpot.models.gguf import GgufFacts
from stockpot.models.machine import available_memory_bytes
from stockpot.models.progress import Progress
from stockpot.models.publish import require_space
from stockpot.models.quality import MAX_TEXT_TOKENS
from stockpot.models.speed import CAREFUL, SKETCH, Effort
from stockpot.models.trial import Result
from stockpot.models.workbench import Workbench

FINALISTS = 3
FINAL_TURNS = 2
BUDGET_S = 60.0
"""No further trial begins after this long; on a quiet machine the default model needs a third of it."""
BUSY_RATIO = 1.3
"""Trials of one encoding whose prefill speeds differ by more than this were disturbed."""
_STEP = "Choosing the fastest encoding for this processor"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`winner` is None where nothing both works and keeps the answers. `obstacle`: why nothing could be
    tried at all, if so. `busy`: other programs disturbed the measurement."""

    winner: Measurement | None
    measurements: tuple[Measurement, ...]
    obstacle: str | None = None
    busy: bool = False


class Contest:
    """Trials of the model in the file `source`; encoded files are made in the folder `workshop`."""

    def __init__(
        self,
        source: Path,
        facts: GgufFacts,
        bench: Workbench,
        *,
        workshop: Path,
        progress: Progress,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._facts = facts
        self._bench = bench
        self._workshop = workshop
        self._progress = progress
        self._now = now
        self._end = now() + BUDGET_S
        self._careful: dict[str, float] = {}  # prefill tokens/s of each finalist's last careful trial
        self._disagreed = False
        self._busy = False
        self._done = 0
        self._steps = 1

    def decide(self) -> Outcome:
        """Try all candidates, then the best FINALISTS again."""
        names = candidates(self._facts, self._bench.binding)
        self._steps = 1 + len(names) + FINALISTS * FINAL_TURNS
        reference = self._workshop / "reference.npy"
        if obstacle := self._make_reference(reference):
            return Outcome(None, (), obstacle)
        found: dict[str, Measurement] = {}
        for name in names:
            found[name] = self._first_round(name, reference)
            self._drop_losers(found)
        finalists = [measurement.encoding for measurement in _finalists(found)]
        for turn in range(FINAL_TURNS):
            if turn == 0 or self._disagreed:
                for name in finalists:
                    found[name] = self._final_turn(found[name])
        winner = best(list(found.values()))
        if winner is not None:
            winner = found[winner.encoding] = replace(winner, verdict="best")
        self._advance(self._steps)
        return Outcome(winner, tuple(found.values()), busy=self._busy)

    def path(self, name: str) -> Path:
        """The file of an encoding: there for the winner, and for the reference while there is no winner."""
        return self._source if name == SOURCE else self._workshop / f"{name}.gguf"

    def _make_reference(self, reference: Path) -> str | None:
        """Write the distributions of the source's own weights. Returns why not, if that does not work."""
        encoding = SOURCE if self._facts.encoding in {"f32", "f16", "bf16"} else REFERENCE
        table_bytes = 4 * MAX_TEXT_TOKENS * self._facts.vocabulary_size
        if lack := self._lacks_room(encoding, table_bytes):
            return lack
        made = None if encoding == SOURCE else encoding
        path = self.path(encoding)
        return self._attempt(path, made, effort=None, reference=reference, write_reference=True).failure

    def _first_round(self, name: str, reference: Path) -> Measurement:
        path = self.path(name)
        if self._now() > self._end:
            self._advance(1)
            return Measurement(name, 0, verdict="not tried: the time for trials was over")
        if lack := self._lacks_room(name):
            self._advance(1)
            return Measurement(name, 0, verdict=f"not tried: {lack}")
        made = None if name == SOURCE or path.is_file() else name
        result = self._attempt(path, made, effort=SKETCH, reference=reference)
        size = path.stat().st_size if path.is_file() else 0
        measurement = _measured(Measurement(name, size), result)
        if result.failure:
            return replace(measurement, verdict=f"does not work: {result.failure}")
        if not measurement.faithful:
            return replace(measurement, verdict="refused: it changes what the model says")
        return replace(measurement, verdict="slower")

    def _drop_losers(self, found: Mapping[str, Measurement]) -> None:
        """Free the disk of all that cannot win any more. The reference stays until it was tried itself and
        something else may win: it is what is left when nothing does."""
        finalists = {measurement.encoding for measurement in _finalists(found)}
        kept = finalists | {SOURCE}
        if not finalists or REFERENCE not in found:
            kept.add(REFERENCE)
        for name in found.keys() - kept:
            self.path(name).unlink(missing_ok=True)

    def _final_turn(self, measurement: Measurement) -> Measurement:
        if self._now() > self._end:
            self._advance(1)
            return measurement
        result = self._attempt(self.path(measurement.encoding), None, effort=CAREFUL)
        if result.failure or result.speed is None:
            return measurement
        speed, careful = result.speed.prefill_tokens_per_s, self._careful.get(measurement.encoding)
        self._disagreed |= _differ(measurement.prefill_tokens_per_s or 0.0, speed)
        # A sketch may just be too short to agree; two careful trials that differ were disturbed.
        self._busy |= careful is not None and _differ(careful, speed)
        self._careful[measurement.encoding] = speed
        return _measured(measurement, result)

    def _attempt(
        self,
        path: Path,
        encoding: str | None,
        *,
        effort: Effort | None,
        reference: Path | None = None,
        write_reference: bool = False,
    ) -> Result:
        result = self._bench.attempt(
            self._source,
            path,
            encoding,
            effort=effort,
            reference=reference,
            write_reference=write_reference,
        )
        self._advance(1)
        return result

    def _advance(self, steps: int) -> None:
        """One trial is shown as the bytes of one source: their number is what a trial's time grows with."""
        self._done = min(self._done + steps, self._steps)
        self._progress(_STEP, self._done * self._facts.file_bytes, self._steps * self._facts.file_bytes)

    def _lacks_room(self, name: str, more_disk_bytes: int = 0) -> str | None:
        """Why there is no room for a trial of `name`, if there is none."""
        size = size_estimate_bytes(self._facts, name)
        if 1.2 * size + 1e9 > available_memory_bytes():
            return f"{size / 1e6:,.0f} MB of weights do not fit in the memory that is free"
        made = name == SOURCE or self.path(name).is_file()
        try:
            require_space(self._workshop, more_disk_bytes + (0 if made else size), f"The encoding {name}")
        except DownloadFailed as error:
            return str(error)
        return None


def _finalists(found: Mapping[str, Measurement]) -> list[Measurement]:
    """The best of the first round, the best first."""
    scored = ((m.score_s, m) for m in found.values() if m.faithful)
    ranked = sorted(((score, m) for score, m in scored if score is not None), key=lambda pair: pair[0])
    return [m for _, m in ranked[:FINALISTS]]


def _measured(measurement: Measurement, result: Result) -> Measurement:
    """`measurement` with what `result` found; of figures it had already, the better one."""
    if quality := result.quality:
        measurement = replace(
            measurement,
            encode_s=result.encode_s,
            kl_mean=quality.kl_mean,
            kl_max=quality.kl_max,
            top1_agreement=quality.top1_agreement,
        )
    if speed := result.speed:
        measurement = replace(
            measurement,
            prefill_tokens_per_s=_best_of(max, measurement.prefill_tokens_per_s, speed.prefill_tokens_per_s),
            turn_64_s=_best_of(min, measurement.turn_64_s, speed.turn_s),
            decode_tokens_per_s=_best_of(max, measurement.decode_tokens_per_s, speed.decode_tokens_per_s),
            decode_8_tokens_per_s=_best_of(
                max, measurement.decode_8_tokens_per_s, speed.decode_8_tokens_per_s
            ),
        )
    return measurement


def _differ(one: float, other: float) -> bool:
    return max(one, other) > BUSY_RATIO * min(one, other)


def _best_of(better: Callable[[float, float], float], one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return better(one, other)

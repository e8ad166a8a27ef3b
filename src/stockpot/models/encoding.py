"""The model's weights in the encoding that is best on this machine, made once and kept.

    models/encoded/<name>-<content>/
        ik-q8_0_r8.gguf              the weights, re-encoded for a binding
        decision-<identity>.json     what was measured and chosen, for one library on one processor

The source is never changed. A decision that cannot be read, or whose file is gone, is made anew.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from blake3 import blake3

from stockpot.errors import ConfigurationError, DownloadFailed, ModelError
from stockpot.models.candidates import (
    MAX_KL_MEAN,
    REFERENCE,
    SOURCE,
    Measurement,
    best,
    candidates,
    known_wrong,
    size_estimate_bytes,
)
from stockpot.models.gguf import GgufFacts, read_facts
from stockpot.models.machine import available_memory_bytes
from stockpot.models.progress import Progress, silent
from stockpot.models.publish import commit, exclusive, require_space, staged
from stockpot.models.source import LocatedModel, models_dir
from stockpot.models.speed import CAREFUL, SKETCH, Effort
from stockpot.models.trial import Result
from stockpot.models.workbench import Workbench

LARGE_MODEL_BYTES = 4 * 10**9
"""Larger sources are used as they are: every trial would write and read many gigabytes."""
FINALISTS = 3
BUDGET_S = 90.0
"""No further trial begins after this long; on a quiet machine the default model needs a fifth of it."""
_FORMAT = 1
_STEP = "Choosing the fastest encoding for this processor"


@dataclass(frozen=True, slots=True)
class EncodedModel:
    """The file to run and why it is this one. `measurements` are empty where nothing was measured."""

    path: Path
    encoding: str
    reason: str
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What is written beside the encoded files. `file` is a name in the same folder, None for the source."""

    format: int
    source: str
    content: str
    identity: str
    decided_at: float
    encoding: str
    file: str | None
    file_bytes: int
    reason: str
    measurements: tuple[Measurement, ...]


def ensure_encoded(
    located: LocatedModel,
    bench: Workbench,
    *,
    cache_dir: Path,
    encoding: str = "auto",
    progress: Progress | None = None,
    anew: bool = False,
) -> EncodedModel:
    """The model in `encoding`, made and kept on first use.

    "auto": the best by measurement among those at least as precise as the source (see `candidates`);
    "source": the file as it is; any other name: that encoding, whatever it costs in precision. `anew`
    measures again where a decision exists. Raises ModelError (a file that is no model, or none of the
    encodings works), ConfigurationError (an encoding the library does not have or computes wrongly),
    DownloadFailed (no room on the disk, for the encoding asked for by name).
    """
    progress = progress or silent
    facts = read_facts(located.path)
    if encoding == SOURCE:
        if wrong := known_wrong(facts, bench.binding):
            raise ConfigurationError(
                f"The encoding 'source' of {located.name} cannot be used: {wrong}. "
                "Set model.encoding to auto, or model.binding to llama-cpp."
            )
        return EncodedModel(located.path, facts.encoding, "as it is, because the settings say so")
    if facts.file_bytes > LARGE_MODEL_BYTES and encoding == "auto":
        return _as_it_is(located, facts, bench)
    home = _Home(located, cache_dir)
    if encoding != "auto":
        return _named(home, facts, bench, encoding, progress)
    if not anew and (known := home.read_decision(bench.identity)):
        return home.model(known)
    home.folder.mkdir(parents=True, exist_ok=True)
    with exclusive(home.folder / "decision", waiting=progress):
        if not anew and (known := home.read_decision(bench.identity)):
            return home.model(known)
        with tempfile.TemporaryDirectory(prefix=".trials-", dir=home.folder) as workshop:
            decision = _Contest(home, facts, bench, Path(workshop), progress).decide()
        home.write_decision(decision)
        home.sweep()
        return home.model(decision)


def decisions(cache_dir: Path) -> tuple[tuple[Path, Decision], ...]:
    """All decisions in the cache with their folders, for `stockpot models list`."""
    found = sorted((models_dir(cache_dir) / "encoded").glob("*/decision-*.json"))
    read = [(path.parent, _read(path)) for path in found]
    return tuple((folder, decision) for folder, decision in read if decision)


class _Home:
    """The folder of one source's encoded files."""

    def __init__(self, located: LocatedModel, cache_dir: Path) -> None:
        self.located = located
        hasher = blake3(max_threads=blake3.AUTO)
        for part in read_facts(located.path).parts:
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

    def model(self, decision: Decision) -> EncodedModel:
        path = self.folder / decision.file if decision.file else self.located.path
        return EncodedModel(path, decision.encoding, decision.reason, decision.measurements)

    def sweep(self) -> None:
        """Remove encoded files no decision names, and what trials of dead processes left."""
        kept = {decision.file for path in self.folder.glob("decision-*.json") if (decision := _read(path))}
        for path in self.folder.glob("*.gguf"):
            if path.name not in kept:
                path.unlink()
        for path in self.folder.glob(".trials-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _decision_path(self, identity: str) -> Path:
        return self.folder / f"decision-{blake3(identity.encode()).hexdigest()[:16]}.json"


class _Contest:
    """Trials of all candidates, then careful trials of the best: successive halving in two rounds."""

    def __init__(
        self,
        home: _Home,
        facts: GgufFacts,
        bench: Workbench,
        workshop: Path,
        progress: Progress,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home = home
        self._facts = facts
        self._bench = bench
        self._workshop = workshop
        self._progress = progress
        self._now = now
        self._end = now() + BUDGET_S
        self._done = 0
        self._steps = 1

    def decide(self) -> Decision:
        names = candidates(self._facts, self._bench.binding)
        self._steps = 1 + len(names) + FINALISTS
        reference = self._workshop / "reference.npy"
        truth = self._make_reference(reference)
        found = {name: self._first_round(name, reference) for name in names} if truth else {}
        finalists = sorted(
            (m for m in found.values() if m.faithful and m.score_s is not None),
            key=lambda m: m.score_s or 0.0,
        )[:FINALISTS]
        for measurement in finalists:
            found[measurement.encoding] = self._second_round(measurement)
        winner = best(list(found.values()))
        self._advance(self._steps)
        return self._conclude(winner, found)

    def _make_reference(self, reference: Path) -> bool:
        """Write the distributions of the source's own weights; False where that does not work."""
        quantised = self._facts.encoding not in {"f32", "f16", "bf16"}
        encoding = REFERENCE if quantised else SOURCE
        if self._lacks_room(encoding):
            return False
        path = self._path(encoding)
        made = None if encoding == SOURCE else encoding
        result = self._attempt(path, made, effort=None, reference=reference, write_reference=True)
        return result.failure is None

    def _first_round(self, name: str, reference: Path) -> Measurement:
        path = self._path(name)
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

    def _second_round(self, measurement: Measurement) -> Measurement:
        if self._now() > self._end:
            self._advance(1)
            return measurement
        result = self._attempt(self._path(measurement.encoding), None, effort=CAREFUL)
        return measurement if result.failure else _measured(measurement, result)

    def _conclude(self, winner: Measurement | None, found: dict[str, Measurement]) -> Decision:
        """Publish the winner's file; without one, the lossless reference, or the source where it may run."""
        if winner is not None:
            name = winner.encoding
            found[name] = replace(winner, verdict="best")
            reason = (
                f"fastest of {sum(m.faithful for m in found.values())} encodings that keep the model's answers "
                f"(KL {winner.kl_mean:.4f}, at most {MAX_KL_MEAN}) on this processor"
            )
        elif not (wrong := known_wrong(self._facts, self._bench.binding)):
            name, reason = SOURCE, "as it is: no other encoding could be tried (see the measurements)"
        elif self._path(REFERENCE).is_file():
            name, reason = REFERENCE, f"without loss: {wrong}, and nothing better could be tried"
        else:
            tried = "; ".join(f"{m.encoding}: {m.verdict}" for m in found.values()) or "no room for any other"
            raise ModelError(
                f"{self._home.located.name} cannot be used: {wrong}, and re-encoding failed ({tried}). "
                "Make room in memory and on the disk, or set model.binding to llama-cpp."
            )
        target = None
        if name != SOURCE:
            target = self._home.file(self._bench.binding, name)
            commit(self._path(name), target)
        return Decision(
            format=_FORMAT,
            source=self._home.located.name,
            content=self._home.content,
            identity=self._bench.identity,
            decided_at=time.time(),
            encoding=self._facts.encoding if name == SOURCE else name,
            file=target.name if target else None,
            file_bytes=target.stat().st_size if target else self._facts.file_bytes,
            reason=reason,
            measurements=tuple(found.values()),
        )

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
            self._home.located.path,
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

    def _path(self, name: str) -> Path:
        return self._home.located.path if name == SOURCE else self._workshop / f"{name}.gguf"

    def _lacks_room(self, name: str) -> str | None:
        """Why there is no room for a trial of `name`, if there is none."""
        size = size_estimate_bytes(self._facts, name)
        if 1.2 * size + 1e9 > available_memory_bytes():
            return f"{size / 1e6:,.0f} MB of weights do not fit in the memory that is free"
        if name == SOURCE or self._path(name).is_file():
            return None
        try:
            require_space(self._workshop, size, f"The encoding {name}")
        except DownloadFailed as error:
            return str(error)
        return None


def _as_it_is(located: LocatedModel, facts: GgufFacts, bench: Workbench) -> EncodedModel:
    size = f"{facts.file_bytes / 1e9:.1f} GB"
    if wrong := known_wrong(facts, bench.binding):
        raise ModelError(
            f"{located.name} cannot be used with this library: {wrong}, and at {size} it is too large to be "
            "re-encoded unasked. Set model.encoding to q8_0, or model.binding to llama-cpp."
        )
    reason = (
        f"as it is: at {size} it is larger than {LARGE_MODEL_BYTES / 1e9:.0f} GB, above which nothing is "
        "re-encoded unasked (set model.encoding to an encoding to do it)"
    )
    return EncodedModel(located.path, facts.encoding, reason)


def _named(
    home: _Home, facts: GgufFacts, bench: Workbench, encoding: str, progress: Progress
) -> EncodedModel:
    """The encoding the settings name, made if it is not there."""
    target = home.file(bench.binding, encoding)
    if not re.fullmatch(r"[a-z0-9_]+", encoding):
        raise ConfigurationError(f"model.encoding is {encoding!r}; give auto, source or a name such as q8_0.")
    with exclusive(target, waiting=progress):
        if not target.is_file():
            require_space(target.parent, size_estimate_bytes(facts, encoding), f"The encoding {encoding}")
            description = f"Encoding {home.located.name} as {encoding}"
            progress(description, 0, facts.file_bytes)
            with staged(target) as temporary:
                result = bench.attempt(home.located.path, temporary, encoding, effort=None)
                if result.failure:
                    raise ConfigurationError(
                        f"{home.located.name} cannot be encoded as {encoding}: {result.failure}. "
                        "Set model.encoding to auto or to another encoding."
                    )
            progress(description, facts.file_bytes, facts.file_bytes)
    return EncodedModel(target, encoding, "because the settings say so")


def _measured(measurement: Measurement, result: Result) -> Measurement:
    """`measurement` with what `result` found in place of what it had."""
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
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
            turn_64_s=speed.turn_s,
            decode_tokens_per_s=speed.decode_tokens_per_s,
            decode_8_tokens_per_s=speed.decode_8_tokens_per_s,
        )
    return measurement


def _read(path: Path) -> Decision | None:
    """A decision, or None where there is none that can be read (any doubt is a miss)."""
    try:
        decision = msgspec.json.decode(path.read_bytes(), type=Decision)
    except (OSError, msgspec.DecodeError):
        return None
    return decision if decision.format == _FORMAT else None

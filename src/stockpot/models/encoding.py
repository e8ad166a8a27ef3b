"""The model's weights in the encoding that is best on this machine, made once and kept.

The source is never changed. Everything appears whole or not at all, one process at a time.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from stockpot.errors import ConfigurationError, ModelError
from stockpot.models.candidates import (
    MAX_KL_MEAN,
    REFERENCE,
    SOURCE,
    Measurement,
    known_wrong,
    size_estimate_bytes,
)
from stockpot.models.contest import Contest, Outcome
from stockpot.models.encoded_files import TRIALS_PREFIX, Decision, EncodedFiles
from stockpot.models.gguf import GgufFacts, read_facts
from stockpot.models.progress import Progress, silent
from stockpot.models.publish import commit, exclusive, require_space, staged
from stockpot.models.source import LocatedModel
from stockpot.models.workbench import Workbench

LARGE_MODEL_BYTES = 4 * 10**9
"""Larger sources are used as they are: every trial would write and read many gigabytes."""


@dataclass(frozen=True, slots=True)
class EncodedModel:
    """The file to run and why it is this one. `measurements` are empty where nothing was measured."""

    path: Path
    encoding: str
    reason: str
    measurements: tuple[Measurement, ...] = ()


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
        return _as_the_settings_say(located, facts, bench)
    if encoding == "auto" and facts.file_bytes > LARGE_MODEL_BYTES:
        return _too_large(located, facts, bench)
    if not re.fullmatch(r"[a-z0-9_]+", encoding):
        raise ConfigurationError(f"model.encoding is {encoding!r}; give auto, source or a name such as q8_0.")
    files = EncodedFiles(located, facts, cache_dir)
    if encoding != "auto":
        return _named(located, facts, bench, files, encoding=encoding, progress=progress)
    if not anew and (known := files.read_decision(bench.identity)):
        return _model(located, files, known)
    files.folder.mkdir(parents=True, exist_ok=True)
    with exclusive(files.folder / "decision", waiting=progress):
        if not anew and (known := files.read_decision(bench.identity)):
            return _model(located, files, known)
        with tempfile.TemporaryDirectory(prefix=TRIALS_PREFIX, dir=files.folder) as folder:
            contest = Contest(located.path, facts, bench, workshop=Path(folder), progress=progress)
            outcome = contest.decide()
            name, reason = _choose(located, facts, bench, contest, outcome)
            target = None
            if name != SOURCE:
                target = files.file(bench.binding, name)
                commit(contest.path(name), target)
        decision = Decision(
            source=located.name,
            content=files.content,
            identity=bench.identity,
            decided_at=time.time(),
            encoding=facts.encoding if target is None else name,
            file=target.name if target else None,
            file_bytes=target.stat().st_size if target else facts.file_bytes,
            reason=reason,
            measurements=outcome.measurements,
        )
        files.write_decision(decision)
        files.sweep()
    return _model(located, files, decision)


def _choose(
    located: LocatedModel, facts: GgufFacts, bench: Workbench, contest: Contest, outcome: Outcome
) -> tuple[str, str]:
    """The encoding to publish and why: the winner; without one the source where it may run, else the
    lossless reference."""
    if winner := outcome.winner:
        count = sum(m.faithful for m in outcome.measurements)
        hint = "; other programs were busy meanwhile, `stockpot models tune` measures again"
        return winner.encoding, (
            f"fastest on this processor of {count} encodings that keep the model's answers "
            f"(KL {winner.kl_mean:.4f} nats, bound {MAX_KL_MEAN}){hint if outcome.busy else ''}"
        )
    tried = "; ".join(f"{m.encoding}: {m.verdict}" for m in outcome.measurements)
    why = outcome.obstacle or tried or "there is no other encoding as precise"
    wrong = known_wrong(facts, bench.binding)
    if not wrong:
        return SOURCE, f"as it is ({why})"
    if outcome.obstacle is None and contest.path(REFERENCE).is_file():
        return REFERENCE, f"dequantised without loss, because {wrong}, and nothing else works ({why})"
    raise ModelError(
        f"{located.name} cannot be used: {wrong}, and re-encoding failed ({why}). "
        "Make room in memory and on the disk, or set model.binding to llama-cpp."
    )


def _model(located: LocatedModel, files: EncodedFiles, decision: Decision) -> EncodedModel:
    path = files.folder / decision.file if decision.file else located.path
    return EncodedModel(path, decision.encoding, decision.reason, decision.measurements)


def _as_the_settings_say(located: LocatedModel, facts: GgufFacts, bench: Workbench) -> EncodedModel:
    if wrong := known_wrong(facts, bench.binding):
        raise ConfigurationError(
            f"The encoding 'source' of {located.name} cannot be used: {wrong}. "
            "Set model.encoding to auto, or model.binding to llama-cpp."
        )
    return EncodedModel(located.path, facts.encoding, "as it is, because the settings say so")


def _too_large(located: LocatedModel, facts: GgufFacts, bench: Workbench) -> EncodedModel:
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
    located: LocatedModel,
    facts: GgufFacts,
    bench: Workbench,
    files: EncodedFiles,
    *,
    encoding: str,
    progress: Progress,
) -> EncodedModel:
    """The encoding the settings name, made if it is not there."""
    target = files.file(bench.binding, encoding)
    with exclusive(target, waiting=progress):
        if not target.is_file():
            require_space(target.parent, size_estimate_bytes(facts, encoding), f"The encoding {encoding}")
            description = f"Encoding {located.name} as {encoding}"
            progress(description, 0, facts.file_bytes)
            with staged(target) as temporary:
                result = bench.attempt(located.path, temporary, encoding, effort=None)
                if result.failure:
                    raise ConfigurationError(
                        f"{located.name} cannot be encoded as {encoding}: {result.failure}. "
                        "Set model.encoding to auto or to another encoding."
                    )
            progress(description, facts.file_bytes, facts.file_bytes)
    return EncodedModel(target, encoding, "because the settings say so")

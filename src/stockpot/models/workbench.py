"""Where encodings are made and tried: the seam between choosing an encoding and the libraries."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

from blake3 import blake3

from stockpot.models.machine import processor_name, usable_processors
from stockpot.models.speed import Effort
from stockpot.models.trial import Job, Result, decode_result, encode_job

TRIAL_TIMEOUT_S = 600.0


class Workbench(ABC):
    """Makes encoded files and measures them with one library on this machine.

    `binding` names the binding, `identity` all that a measurement depends on beside the model: library and
    its content, processor, threads.
    """

    binding: str
    identity: str

    @abstractmethod
    def attempt(
        self,
        source: Path,
        target: Path,
        encoding: str | None,
        *,
        effort: Effort | None,
        reference: Path | None = None,
        write_reference: bool = False,
    ) -> Result:
        """As `trial.Job` says. Never raises for an encoding that does not work: the result says why."""


class LibraryWorkbench(Workbench):
    """The real one: every attempt is a child process, so a library that aborts takes nothing along."""

    def __init__(
        self, binding: str, library: str, library_path: Path, cache_dir: Path, threads: int | None = None
    ) -> None:
        self.binding = binding
        self._library = library
        self._cache_dir = cache_dir
        self._threads = threads
        workers = threads or usable_processors()
        self.identity = f"{binding} {_digest(library_path)}, {processor_name()}, {workers} threads"

    def attempt(
        self,
        source: Path,
        target: Path,
        encoding: str | None,
        *,
        effort: Effort | None,
        reference: Path | None = None,
        write_reference: bool = False,
    ) -> Result:
        job = Job(
            source=source,
            target=target,
            encoding=encoding,
            binding=self.binding,
            library=self._library,
            cache_dir=self._cache_dir,
            threads=self._threads,
            effort=effort,
            reference=reference,
            write_reference=write_reference,
        )
        with tempfile.TemporaryDirectory(prefix="stockpot-trial-") as folder:
            return run_apart(job, Path(folder))


def run_apart(job: Job, folder: Path, *, timeout_s: float = TRIAL_TIMEOUT_S) -> Result:
    """Perform `job` in a child process that keeps its files in `folder`."""
    job_path, result_path, log_path = folder / "job.json", folder / "result.json", folder / "log"
    job_path.write_bytes(encode_job(job))
    command = [sys.executable, "-m", "stockpot.models.trial", str(job_path), str(result_path)]
    with log_path.open("wb") as log:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # ggml starts a debugger on itself when it aborts, if it finds one: seconds for nothing.
                env=_environment(),
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Result(failure=f"it took longer than {timeout_s:.0f} s")
    if done.returncode == 0 and result_path.is_file():
        return decode_result(result_path.read_bytes())
    return Result(failure=f"the library ended its process ({_reason(log_path, done.returncode)})")


def _digest(library_path: Path) -> str:
    """A hash of the library and of those beside it: the kernels are in a file of their own (libggml)."""
    hasher = blake3(max_threads=blake3.AUTO)
    beside = {*library_path.parent.glob("lib*.so*"), *library_path.parent.glob("lib/lib*.so*")}
    for path in sorted({library_path, *beside}):
        if path.is_file():
            hasher.update(path.name.encode()).update_mmap(path)
    return hasher.hexdigest()[:16]


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.devnull}


def _reason(log_path: Path, code: int) -> str:
    """Why a child died: the assertion or exception its log shows, else its signal or code."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "ASSERT" in line or "Error" in line]
    if telling:
        return telling[-1][:200]
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

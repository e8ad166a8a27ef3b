"""Making the environments of peers: steps in processes of their own, with a log, done once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stockpot.bench.progress import BenchProgress
from stockpot.errors import BuildFailed

_UV = "uv==0.13.9"
_LOG_LINES_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Workshop:
    """A folder in which one peer is made; `log` collects what the steps say."""

    folder: Path
    progress: BenchProgress

    @property
    def log(self) -> Path:
        return self.folder / "setup.log"

    def run(
        self,
        description: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """One step. Raises BuildFailed with the end of its output where it fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress(description, 0, None)
        with self.log.open("ab") as log:
            start = log.tell()
            try:
                code = subprocess.run(
                    [str(part) for part in command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})},
                    cwd=cwd or self.folder,
                    check=False,
                ).returncode
            except FileNotFoundError as error:
                raise BuildFailed(
                    f"{description}: {command[0]} is not installed; install it first."
                ) from error
        if code != 0:
            raise BuildFailed(
                f"{description}: {command[0]} ended with code {code}. The log is {self.log}; its end:\n"
                + self._tail(start)
            )
        self.progress(description, 1, 1)

    def _tail(self, start: int) -> str:
        with self.log.open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


class PythonEnvironment:
    """A virtual environment of this Python, with packages put there by uv."""

    def __init__(self, workshop: Workshop, name: str) -> None:
        self._workshop = workshop
        self.folder = workshop.folder / name
        self.python = self.folder / "bin" / "python"

    def create(self, packages: Sequence[str]) -> None:
        """Make it anew, with `packages` and uv."""
        shutil.rmtree(self.folder, ignore_errors=True)
        what = f"environment {self.folder.name}"
        self._workshop.run(f"{what}: create", [sys.executable, "-m", "venv", self.folder])
        self._workshop.run(f"{what}: uv", [self.python, "-m", "pip", "install", "--quiet", _UV])
        self.uv("install", *packages, description=f"{what}: {packages[0]}")

    def uv(self, *arguments: str, description: str) -> None:
        """`uv pip ARGUMENTS` for this environment, with the package sources pip is configured for."""
        command = [self.python, "-m", "uv", "pip", arguments[0], "--python", self.python, *arguments[1:]]
        self._workshop.run(description, command, environment=uv_sources(os.environ))

    def site_packages(self) -> Path:
        """Where its packages lie."""
        return next(self.folder.glob("lib/python3.*/site-packages"))


def uv_sources(environment: Mapping[str, str]) -> dict[str, str]:
    """uv's names for pip's settings, where uv has none of its own."""
    names = {
        "PIP_FIND_LINKS": "UV_FIND_LINKS",
        "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
        "PIP_EXTRA_INDEX_URL": "UV_INDEX",
        "PIP_CERT": "SSL_CERT_FILE",
    }
    return {uv: environment[pip] for pip, uv in names.items() if pip in environment and uv not in environment}


def fetch_source(workshop: Workshop, requirement: str) -> Path:
    """The unpacked source package of `requirement` ("name==version"), fetched with pip.

    pip prepares metadata of what it downloads, which may take half a minute for a compiled package.
    """
    target = workshop.folder / "source"
    shutil.rmtree(target, ignore_errors=True)
    downloads = target / "download"
    downloads.mkdir(parents=True)
    options = ("--no-deps", "--no-binary", ":all:", "--dest", str(downloads))
    workshop.run(
        f"fetch the source of {requirement}", [sys.executable, "-m", "pip", "download", *options, requirement]
    )
    with tarfile.open(next(downloads.glob("*.tar.gz"))) as archive:
        archive.extractall(target, filter="data")
    shutil.rmtree(downloads)
    return next(path for path in target.iterdir() if path.is_dir())

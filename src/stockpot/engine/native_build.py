"""Compiling ik_llama.cpp for this processor: fetch its source package, correct it, build, publish.

Takes four to six minutes on two processors, once. The result lies in the user's cache (`bindings.native`),
whole or not at all; the log of the last build lies beside it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from stockpot.engine.bindings.ik import PACKAGE, VERSION
from stockpot.engine.bindings.native import LIBRARIES, apply_edits, library_folder, native_library
from stockpot.errors import BuildFailed
from stockpot.models.machine import usable_processors
from stockpot.models.progress import Progress, silent
from stockpot.models.publish import exclusive

COMPILERS = ("c++", "g++", "clang++")
_SOURCE_IN_PACKAGE = Path("vendor/ik_llama.cpp")
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=ON",
    # The fork's templates give a hundred megabytes of warnings.
    "-DCMAKE_C_FLAGS=-w",
    "-DCMAKE_CXX_FLAGS=-w",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    # The library finds the other one beside it, wherever the folder is moved to.
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
)
_PERCENT = re.compile(r"^\[\s*(\d{1,3})%\]")
_LOADS = "import sys, ctypes; ctypes.CDLL(sys.argv[1]).llama_backend_init"
_TAIL_LINES = 3
_MAX_LOG_BYTES = 16 * 2**20
_FETCH = "Fetching the source of ik_llama.cpp"
_COMPILE = "Compiling ik_llama.cpp (percent)"


@dataclass(frozen=True, slots=True)
class Tools:
    """What a build needs; None for what is missing."""

    cmake: str | None
    compiler: str | None

    @classmethod
    def find(cls) -> Tools:
        named = os.environ.get("CXX")
        compilers = [named] if named else COMPILERS
        return cls(shutil.which("cmake"), next((c for c in map(shutil.which, compilers) if c), None))

    def missing(self) -> str | None:
        """A sentence that says what to install; None where nothing is missing."""
        lacking = [
            what
            for found, what in (
                (self.cmake, "cmake ('pip install cmake', or the system's package)"),
                (self.compiler, "a C++ compiler (on Debian and Ubuntu: the package build-essential)"),
            )
            if found is None
        ]
        return f"Compiling needs {' and '.join(lacking)}." if lacking else None


def build_native(cache_dir: Path, *, force: bool = False, progress: Progress = silent) -> Path:
    """Build the library unless it is there (or `force`); its path.

    One process of this machine builds, others wait for it. Raises BuildFailed, naming what is missing or
    the log.
    """
    if sys.platform != "linux":
        raise BuildFailed(
            f"The native library is built on Linux only, and this is {sys.platform}. "
            "Install the other binding: pip install 'stockpot[llama-cpp]'."
        )
    folder = library_folder(cache_dir)
    with exclusive(folder, waiting=progress):
        found = native_library(cache_dir)
        if found is not None and not force:
            return found
        tools = Tools.find()
        if why_not := tools.missing():
            raise BuildFailed(why_not)
        assert tools.cmake is not None
        log = folder.parent / "build.log"
        with (
            tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as work,
            log.open("w") as output,
        ):
            steps = _Build(Path(work), tools.cmake, output, log, progress)
            _publish(steps.run(), folder)
    return folder / LIBRARIES[0]


@dataclass(frozen=True, slots=True)
class _Build:
    """One build in the temporary folder `work`; everything the tools say goes to the log."""

    work: Path
    cmake: str
    output: TextIO
    log: Path
    progress: Progress

    def run(self) -> Path:
        """A folder that holds the libraries and nothing else."""
        source = self._unpack(self._fetch())
        apply_edits(source)
        build = self.work / "build"
        configure = [self.cmake, "-S", str(source), "-B", str(build), *_CMAKE_OPTIONS]
        self.progress(_COMPILE, 0, 100)
        self._call(configure, "cmake could not configure the build")
        workers = str(usable_processors())
        make = [self.cmake, "--build", str(build), "--target", "llama", "--parallel", workers]
        self._call(make, "compiling failed", each_line=self._show_percent)
        self.progress(_COMPILE, 100, 100)
        finished = self.work / "finished"
        finished.mkdir()
        for name in LIBRARIES:
            made = next((path for path in build.rglob(name) if path.is_file()), None)
            if made is None:
                raise self._failed(f"the build did not make {name}")
            shutil.copy2(made, finished / name)
        self._call(
            [sys.executable, "-c", _LOADS, str(finished / LIBRARIES[0])], "the library cannot be loaded"
        )
        return finished

    def _fetch(self) -> Path:
        """The source package, by pip, from the index the user has set up. pip reads the package's metadata
        on the way, which takes some seconds."""
        self.progress(_FETCH, 0, None)
        download = self.work / "download"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-input",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        self._call(
            [*pip, "--no-binary", PACKAGE, "--dest", str(download), f"{PACKAGE}=={VERSION}"],
            f"pip (of {sys.executable}) could not fetch the source package {PACKAGE}=={VERSION}",
        )
        archive = next(download.glob("*.tar.gz"), None)
        if archive is None:
            raise self._failed(f"pip fetched no source package of {PACKAGE}=={VERSION}")
        self.progress(_FETCH, 1, 1)
        return archive

    def _unpack(self, archive: Path) -> Path:
        target = self.work / "source"
        try:
            with tarfile.open(archive) as package:
                package.extractall(target, filter="data")
        except (tarfile.TarError, OSError) as error:
            raise BuildFailed(f"The source package {archive.name} cannot be unpacked: {error}.") from error
        source = next(target.glob(f"*/{_SOURCE_IN_PACKAGE}"), None)
        if source is None:
            raise BuildFailed(f"The source package {archive.name} does not hold {_SOURCE_IN_PACKAGE}.")
        return source

    def _show_percent(self, line: str) -> None:
        if match := _PERCENT.match(line):
            self.progress(_COMPILE, min(int(match[1]), 99), 100)

    def _call(
        self, command: Sequence[str], failure: str, *, each_line: Callable[[str], None] = lambda _: None
    ) -> None:
        """Run a tool; its whole process group ends with us, however we end."""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    self._write(line)
                    each_line(line)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode != 0:
            raise self._failed(f"{failure} (exit code {process.returncode})")

    def _write(self, line: str) -> None:
        """To the log, whose older half makes room when it is full: the last lines tell why."""
        if self.output.tell() > _MAX_LOG_BYTES:
            self.output.flush()
            half = self.log.read_text(errors="replace")[-_MAX_LOG_BYTES // 2 :]
            self.output.seek(0)
            self.output.truncate()
            self.output.write(half)
        self.output.write(line)

    def _failed(self, what: str) -> BuildFailed:
        self.output.flush()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        tail = " / ".join(lines[-_TAIL_LINES:]) or "nothing was written"
        return BuildFailed(f"{what[0].upper()}{what[1:]}: {tail}. The whole log: {self.log}")


def _publish(finished: Path, folder: Path) -> None:
    """Put the folder in its place; a process that uses the old library keeps it until it ends."""
    if folder.exists():
        folder.rename(finished.parent / "old")
    finished.rename(folder)

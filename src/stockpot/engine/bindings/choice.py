"""Which library runs a model here, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stockpot.engine.bindings import ik, upstream
from stockpot.engine.bindings.binding import Binding
from stockpot.engine.bindings.native import native_library
from stockpot.errors import BindingUnavailable

_INSTALL_UPSTREAM = "pip install 'stockpot[llama-cpp]' (compiles for about four minutes)"


@dataclass(frozen=True, slots=True)
class BindingChoice:
    """`name` is ik or llama-cpp. `library` is the file, for ik; llama-cpp finds its own. `native`:
    compiled for this processor by `stockpot engine build`. `reason` is a sentence for people."""

    name: str
    version: str
    library: Path | None
    native: bool
    reason: str


def choose_binding(architecture: str, wanted: str, library: str, *, cache_dir: Path) -> BindingChoice:
    """The binding for models of `architecture`; ik where it is there and knows it, else llama-cpp.

    `wanted` is auto, ik or llama-cpp; `library` (of ik) is auto, native or wheel. Raises BindingUnavailable
    with what to install.
    """
    found, why_not = _ik(library, cache_dir) if wanted != upstream.NAME else (None, "llama-cpp was asked for")
    if found is not None:
        if _load_ik(found).knows_architecture(architecture):
            return found
        why_not = f"ik_llama.cpp {found.version} does not know the architecture {architecture}"
    if wanted == ik.NAME:
        raise BindingUnavailable(f"The binding ik cannot be used: {why_not}.")
    version = upstream.installed_version()
    if version is None:
        raise BindingUnavailable(
            f"No library can run this model: {why_not}, and {upstream.PACKAGE} is not installed. "
            f"Install it: {_INSTALL_UPSTREAM}."
        )
    if not upstream.UpstreamBinding().knows_architecture(architecture):
        raise BindingUnavailable(
            f"No library can run this model: {why_not}, and {upstream.PACKAGE} {version} does not know the "
            f"architecture {architecture} either. A newer {upstream.PACKAGE} may."
        )
    return BindingChoice(
        upstream.NAME, version, None, native=False, reason=f"{why_not[0].upper()}{why_not[1:]}."
    )


def open_binding(name: str, *, library: str = "auto", cache_dir: Path) -> Binding:
    """The binding of that name, loaded. Raises BindingUnavailable."""
    if name == upstream.NAME:
        return upstream.UpstreamBinding()
    found, why_not = _ik(library, cache_dir)
    if found is None:
        raise BindingUnavailable(f"The binding ik cannot be used: {why_not}.")
    return _load_ik(found)


def load(choice: BindingChoice) -> Binding:
    """The library a choice names."""
    return _load_ik(choice) if choice.name == ik.NAME else upstream.UpstreamBinding()


def _load_ik(choice: BindingChoice) -> ik.IkBinding:
    assert choice.library is not None
    return ik.IkBinding(choice.library, corrected=choice.native)


def _ik(library: str, cache_dir: Path) -> tuple[BindingChoice | None, str]:
    """The fork's library, or why there is none."""
    native = native_library(cache_dir) if library != "wheel" else None
    if native is not None:
        reason = "The fork ik_llama.cpp, compiled for this processor by `stockpot engine build`."
        return BindingChoice(ik.NAME, ik.VERSION, native, native=True, reason=reason), ""
    if library == "native":
        return None, "its native library has not been built for this processor; run: stockpot engine build"
    wheel = ik.wheel_library()
    if wheel is not None:
        reason = (
            "The fork ik_llama.cpp, from its wheel (plain AVX2); "
            "`stockpot engine build` compiles it for this processor, about twice as fast."
        )
        return BindingChoice(ik.NAME, ik.VERSION, wheel, native=False, reason=reason), ""
    return None, (
        f"{ik.PACKAGE} {ik.VERSION} is not installed "
        "(its wheels are for Linux on x86-64, CPython 3.11 to 3.13)"
    )

"""`stockpot engine`: which library computes, and compiling the fastest one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_GAIN = (
    "Compiled for this processor the same library computes prompts about twice as fast as its wheel, and "
    "keeps KV in eight bits, half the memory (unless engine.kv_cell_type is f16). It takes four to eight "
    "minutes, once."
)


def register(app: typer.Typer) -> None:
    """Add the group."""
    engine = typer.Typer(
        no_args_is_help=True, help="The library that computes: what is there, and compiling the fastest."
    )

    @engine.command()
    def info() -> None:
        """Show which libraries are here, which would be used and why, and what a build would gain.

        Stockpot runs models through llama.cpp: its fork ik_llama.cpp (the fastest on a CPU; comes with
        Stockpot on Linux x86-64) or llama.cpp itself (GPUs, macOS, newest models; the extra llama-cpp).
        """
        from rich.console import Console

        from stockpot.settings import load_settings

        settings = load_settings()
        console = Console()
        console.print(_table(settings.cache_dir, settings.model.binding, settings.model.library))
        advice = _advice(settings.cache_dir)
        if advice:
            console.print(advice, markup=False, highlight=False)

    @engine.command()
    def build(
        *,
        force: bool = typer.Option(False, "--force", help="Compile again even if it is there."),
    ) -> None:
        """Compile the library for this processor, once; serve and chat use it from then on.

        Fetches the source of ik_llama.cpp with pip, corrects what does not hold for many sequences in one
        cache, and compiles it into your cache folder. Needs cmake and a C++ compiler; four to six minutes on
        two processors. Exit code 70 if it fails, with the place of the log.
        """
        from rich.console import Console

        from stockpot.cli.progress import terminal_progress
        from stockpot.engine.native_build import build_native
        from stockpot.settings import load_settings

        settings = load_settings()
        with terminal_progress(Console(stderr=True)) as progress:
            library = build_native(settings.cache_dir, force=force, progress=progress)
        Console().print(f"Built: {library}", markup=False, highlight=False, soft_wrap=True)
        typer.echo("It is used from the next start on; the weights are measured and encoded for it then.")

    app.add_typer(engine, name="engine")


def _table(cache_dir: Path, binding: str, library: str) -> Table:
    from rich.table import Table

    from stockpot.engine.bindings import choose_binding, ik, upstream
    from stockpot.engine.bindings.native import native_library, processor_flags
    from stockpot.engine.native_build import Tools
    from stockpot.errors import BindingUnavailable
    from stockpot.models.machine import processor_name, usable_processors

    wheel, native = ik.wheel_library(), native_library(cache_dir)
    other = upstream.installed_version()
    tools = Tools.find()
    try:
        chosen = choose_binding("llama", binding, library, cache_dir=cache_dir)
        used = f"{chosen.name} {chosen.version}: {chosen.reason}"
    except BindingUnavailable as error:
        used = f"none: {error}"
    flags = processor_flags()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("ik_llama.cpp, wheel", f"{ik.VERSION}" if wheel else "not installed"),
        ("ik_llama.cpp, native", str(native) if native else "not built for this processor"),
        ("llama.cpp", other or "not installed"),
        ("used", used),
        ("processor", f"{processor_name()}, {usable_processors()} usable"),
        ("of its extensions", " ".join(f for f in _FEATURES if f in flags) or "none that matter are known"),
        ("to compile with", tools.missing() or f"{tools.cmake}, {tools.compiler}"),
    ):
        table.add_row(name, value.replace("[", r"\["))
    return table


def _advice(cache_dir: Path) -> str:
    """What a build would gain; "" where there is one."""
    from stockpot.engine.bindings.native import native_library

    if native_library(cache_dir) is not None:
        return ""
    return f"\n{_GAIN}\nRun: stockpot engine build"

"""`stockpot models`: what is in a model file, what of it is in the cache, and how it runs here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from stockpot.models.candidates import Measurement
    from stockpot.models.encoded_files import Decision
    from stockpot.models.encoding import EncodedModel
    from stockpot.runtime import PreparedModel
    from stockpot.settings import Settings

_Source = Annotated[
    str | None,
    typer.Argument(
        help="A name, a path to a .gguf, or hf:org/repo:file.gguf. [default: the model of the settings]"
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
_Config = Annotated[
    Path | None, typer.Option(help="Settings as TOML. [default: ./stockpot.toml where it exists]")
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        no_args_is_help=True,
        help=(
            "Model files: fetch them, look into them, make them fast on this machine.\n\n"
            "On a processor the encoding of the weights decides more than anything else. So the first use of "
            "a model measures a few encodings that are at least as precise, keeps the fastest in the cache, "
            "and says why (see `stockpot models info`)."
        ),
    )
    _add_list(group)
    _add_pull(group)
    _add_info(group)
    _add_tune(group)
    app.add_typer(group, name="models")


def _add_list(group: typer.Typer) -> None:
    @group.command("list")
    def list_models(config: _Config = None, as_json: _Json = False) -> None:
        """Show what is in the cache: model files, and what they were encoded into for this machine."""
        from stockpot.models.encoded_files import decisions
        from stockpot.models.source import models_dir

        settings = _settings(None, config)
        folder = models_dir(settings.cache_dir)
        rows = [
            {"file": str(path.relative_to(folder)), "bytes": path.stat().st_size, "about": "as published"}
            for path in sorted(folder.rglob("*.gguf"))
            if "encoded" not in path.relative_to(folder).parts
        ]
        chosen_for: dict[Path, list[Decision]] = {}
        for place, decision in decisions(settings.cache_dir):
            if decision.file is not None and (place / decision.file).is_file():
                chosen_for.setdefault(place / decision.file, []).append(decision)
        for path, choices in chosen_for.items():
            setups = "; ".join(choice.identity for choice in choices)
            about = f"{choices[0].source} as {choices[0].encoding}, fastest for {setups}"
            rows.append({"file": str(path.relative_to(folder)), "bytes": path.stat().st_size, "about": about})
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
            return
        console = _console()
        if not rows:
            console.print(f"No model is in {folder} yet. Fetch one: stockpot models pull")
            return
        table = _table("file", "size", "what")
        for row in rows:
            table.add_row(str(row["file"]), _size(int(row["bytes"])), str(row["about"]))
        console.print(table)


def _add_pull(group: typer.Typer) -> None:
    @group.command()
    def pull(source: _Source = None, config: _Config = None) -> None:
        """Fetch a model file into the cache. Broken downloads resume; checksums are verified."""
        from rich.console import Console

        from stockpot.cli.progress import terminal_progress
        from stockpot.models.source import locate

        settings = _settings(source, config)
        with terminal_progress(Console(stderr=True)) as progress:
            located = locate(settings.model.source, cache_dir=settings.cache_dir, progress=progress)
        typer.echo(f"{located.name}: {located.path} ({_size(located.path.stat().st_size)})")


def _add_info(group: typer.Typer) -> None:
    @group.command()
    def info(source: _Source = None, config: _Config = None, as_json: _Json = False) -> None:
        """Show a model's facts, how it runs here and why, and what fits in memory.

        KV (keys and values) is what the model keeps of every token it has read. Bytes of KV per token =
        layers x KV heads x (key + value elements) x bytes of a cell element.
        """
        settings = _settings(source, config)
        prepared = _prepare(settings)
        facts = _facts(prepared)
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
            return
        _print_info(_console(), facts)


def _add_tune(group: typer.Typer) -> None:
    @group.command()
    def tune(source: _Source = None, config: _Config = None, as_json: _Json = False) -> None:
        """Measure the encodings anew and keep the best.

        Run it on an otherwise idle machine, after `stockpot engine build`, or when the processor changed.
        Candidates are at least as precise as the source; those whose answers diverge too far from it
        (KL divergence of the next token's distribution) are left out.
        """
        settings = _settings(source, config)
        encoded = _prepare(settings, anew=True).encoded
        if as_json:
            typer.echo(json.dumps([asdict(each) for each in encoded.measurements], indent=2))
            return
        console = _console()
        if encoded.measurements:
            console.print(_measurement_table(encoded))
        console.print(f"Kept: {encoded.encoding}, {encoded.reason}.")


def _settings(source: str | None, config: Path | None) -> Settings:
    from stockpot.settings import load_settings

    settings = load_settings(config)
    if source is None:
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"source": source})})


def _prepare(settings: Settings, *, anew: bool = False) -> PreparedModel:
    from rich.console import Console

    from stockpot.cli.progress import terminal_progress
    from stockpot.runtime import prepare_model

    with terminal_progress(Console(stderr=True)) as progress:
        return prepare_model(settings, progress=progress, anew=anew)


def _facts(prepared: PreparedModel) -> dict[str, Any]:
    from stockpot.models.gguf import read_facts
    from stockpot.models.machine import available_memory_bytes
    from stockpot.models.sizing import CELL_TYPES, kv_bytes_per_token, what_fits

    source, encoded = read_facts(prepared.located.path), read_facts(prepared.encoded.path)
    available = available_memory_bytes()
    fits = {
        cell_type: [
            asdict(fit)
            for fit in what_fits(source, cell_type, available, weights_bytes=encoded.weights_bytes)
        ]
        for cell_type in ("f16", "q8_0")
    }
    return {
        "name": prepared.located.name,
        "origin": prepared.located.origin,
        "architecture": source.architecture,
        "parameters": source.parameters,
        "layers": source.layers,
        "heads": source.heads,
        "kv_heads": source.kv_heads,
        "head_size": source.key_size,
        "embedding_size": source.embedding_size,
        "vocabulary_size": source.vocabulary_size,
        "training_context_tokens": source.training_context_tokens,
        "source_encoding": source.encoding,
        "source_bytes": source.file_bytes,
        "encoding": prepared.encoded.encoding,
        "encoding_reason": prepared.encoded.reason,
        "encoded_bytes": encoded.file_bytes,
        "binding": prepared.binding.name,
        "binding_reason": prepared.binding.reason,
        "threads": prepared.threads,
        "kv_bytes_per_token": {kind: kv_bytes_per_token(source, kind) for kind in CELL_TYPES},
        "available_memory_bytes": available,
        "fits": fits,
    }


def _print_info(console: Console, facts: dict[str, Any]) -> None:
    table = _table("fact", "value")
    heads = f"{facts['heads']} heads, {facts['kv_heads']} KV heads of {facts['head_size']}"
    rows = {
        "model": f"{facts['name']} ({facts['origin']})",
        "architecture": f"{facts['architecture']}, {facts['parameters'] / 1e6:,.0f} M parameters",
        "shape": f"{facts['layers']} layers, {heads}, embedding {facts['embedding_size']}",
        "vocabulary": f"{facts['vocabulary_size']:,} tokens",
        "trained context": f"{facts['training_context_tokens']:,} tokens",
        "source": f"{facts['source_encoding']}, {_size(facts['source_bytes'])}",
        "encoding": f"{facts['encoding']}, {_size(facts['encoded_bytes'])}: {facts['encoding_reason']}",
        "library": facts["binding_reason"],
        "threads": str(facts["threads"]),
        "KV per token": ", ".join(
            f"{n:,} bytes as {kind}" for kind, n in facts["kv_bytes_per_token"].items()
        ),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    fits = _table("context", "KV of one request, f16", "at once, f16", "at once, q8_0")
    for wide, narrow in zip(facts["fits"]["f16"], facts["fits"]["q8_0"], strict=True):
        fits.add_row(
            f"{wide['context_tokens']:,} tokens",
            _size(wide["sequence_bytes"]),
            f"{wide['sequences']:,}",
            f"{narrow['sequences']:,}",
        )
    console.print(
        f"Requests that fit into the {_size(facts['available_memory_bytes'])} of memory that are free:"
    )
    console.print(fits)


def _measurement_table(encoded: EncodedModel) -> Any:
    table = _table(
        "encoding",
        "size",
        "prefill tok/s",
        "64 behind 2,048",
        "decode tok/s",
        "of 8",
        "KL mean",
        "top-1",
        "verdict",
    )
    for each in encoded.measurements:
        table.add_row(each.encoding, _size(each.file_bytes), *_figures(each), each.verdict)
    return table


def _figures(each: Measurement) -> list[str]:
    def shown(value: float | None, form: str, factor: float = 1.0) -> str:
        return "-" if value is None else format(value * factor, form)

    return [
        shown(each.prefill_tokens_per_s, ",.0f"),
        shown(each.turn_64_s, ",.0f", 1e3) + (" ms" if each.turn_64_s is not None else ""),
        shown(each.decode_tokens_per_s, ",.0f"),
        shown(each.decode_8_tokens_per_s, ",.0f"),
        shown(each.kl_mean, ".5f"),
        shown(each.top1_agreement, ".1%"),
    ]


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:,.1f} {unit}"
    return f"{size_bytes} bytes"

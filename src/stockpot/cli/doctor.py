"""`stockpot doctor`: why prompts were not read from a cache, from recorded requests or a running server."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stockpot.cli.admin_client import DEFAULT_URL, AdminClient, AdminKey, Url
from stockpot.errors import ConfigurationError

if TYPE_CHECKING:
    from stockpot.doctor.finding import Checked
    from stockpot.doctor.report import Report
    from stockpot.doctor.thresholds import Threshold

_FAILED = 1
_MIB = 2**20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(  # noqa: PLR0917  options of a command are all given by name
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Requests, one a line of JSON: bodies in OpenAI's or Anthropic's shape, alone or wrapped,"
            " recordings of this server, transcripts of Claude Code or Codex, logs of vLLM or llama-server;"
            " .gz too, - is standard input.",
            show_default=False,
        ),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="The last requests of a running server.")] = False,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    last: Annotated[int, typer.Option(min=1, max=100_000, help="With --live: how many.")] = 1_000,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Counts exactly: a tokenizer.json, a .gguf, a model's name, or a server's address; left out:"
            " four characters a token, where nothing was recorded.",
            show_default=False,
        ),
    ] = None,
    provider: Annotated[
        str,
        typer.Option(
            help="Whose rules apply where none was recorded: anthropic, openai, vllm, ...", show_default=False
        ),
    ] = "",
    min_tokens_lost: Annotated[int, typer.Option(min=1, help="A smaller loss is no break.")] = 16,
    prefill_rate: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Tokens a second your engine computes of prompts; left out: inferred from recorded times.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts.", dir_okay=False, show_default=False)
    ] = None,
    sarif: Annotated[
        Path | None, typer.Option(help="Write SARIF 2.1.0.", dir_okay=False, show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    breaks: Annotated[
        Path | None,
        typer.Option(help="Write each break as a line of JSON.", dir_okay=False, show_default=False),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help='End with 1 where it holds: "hit<0.8", "usd_per_day>5", "timestamp>0"; may be given several'
            " times.",
            show_default=False,
        ),
    ] = None,
    memory_mib: Annotated[int, typer.Option(min=8, help="For conversations that may go on.")] = 256,
) -> None:
    """Find where prompts stopped being the same, name the cause, price it, and propose the fix.

    Nothing leaves this machine. Ends with 1 where a --fail-on holds or no request is found.
    """
    from stockpot.context.tokenizers import open_counter
    from stockpot.doctor.doctor import Options, examine
    from stockpot.doctor.outputs.as_json import report_json
    from stockpot.doctor.outputs.page import report_page
    from stockpot.doctor.outputs.sarif import report_sarif
    from stockpot.doctor.outputs.table import print_report
    from stockpot.doctor.readers.ahead import read_ahead
    from stockpot.doctor.readers.files import ReadCounts, read_lines
    from stockpot.doctor.thresholds import Threshold

    if live == bool(files):
        raise typer.BadParameter("give files, or --live", param_hint="FILES")
    thresholds = [Threshold.parse(each) for each in fail_on or ()]
    options = Options(
        counter=None if tokenizer is None else open_counter(tokenizer),
        provider=provider,
        tokens_min=min_tokens_lost,
        prefill_tokens_per_s=prefill_rate,
        memory_bytes=memory_mib * _MIB,
    )
    counts = ReadCounts()
    if live:
        lines = AdminClient(url, admin_key, root="/admin/").lines("requests", "requests", limit=last)
        exchanges = read_lines(lines, url, counts)
    else:
        exchanges = read_ahead(files or (), counts)
    try:
        with _few_collections(), breaks.open("w", encoding="utf-8") if breaks else nullcontext() as out:
            report = examine(exchanges, options, counts=counts, told=_told_to(out))
        if html is not None:
            html.write_text(report_page(report), encoding="utf-8")
        if sarif is not None:
            sarif.write_text(json.dumps(report_sarif(report), indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{error.filename} cannot be written: {error.strerror}.") from error
    if as_json:
        typer.echo(json.dumps(report_json(report), indent=2))
    else:
        print_report(report, Console(file=sys.stdout))
    if not report.requests:
        Console(stderr=True).print("No request was found in what was read.", style="red")
        raise typer.Exit(_FAILED)
    _fail(report, thresholds)


@contextmanager
def _few_collections() -> Generator[None]:
    """What is made by the million is freed by its counts: looking for cycles again and again finds none."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _told_to(out: IO[str] | None) -> Callable[[Checked], None] | None:
    """Writes each break as a line."""
    if out is None:
        return None

    def told(checked: Checked) -> None:
        from stockpot.doctor.outputs.as_json import finding_json

        if checked.finding is not None:
            print(json.dumps(finding_json(checked.finding)), file=out)

    return told


def _fail(report: Report, thresholds: Sequence[Threshold]) -> None:
    fired = [each for each in thresholds if each.fires(report)]
    for each in fired:
        words = f"failed: {each} ({each.value_in(report):.4g})"
        Console(stderr=True).print(words, style="red", markup=False, highlight=False)
    if fired:
        raise typer.Exit(_FAILED)

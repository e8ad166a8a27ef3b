"""`stockpot lessons`: what breaks a prompt cache and what keeps it, measured on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stockpot.cli.bench_report import run_measurement
from stockpot.errors import StockpotError

if TYPE_CHECKING:
    from stockpot.bench.client import ChatMessage
    from stockpot.lessons.lesson import Lesson, Outcome, Way

_WORSE = 1

BaseUrl = Annotated[
    str,
    typer.Option(help="A server to measure on, vLLM's too; left out: one is started.", show_default=False),
]
Model = Annotated[str, typer.Option(help="Its model; left out: the first it names.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands = typer.Typer(help="Four small programs about prompt caching.", invoke_without_command=True)
    commands.callback()(listing)
    commands.command("run")(run)
    commands.command("check")(check)
    app.add_typer(commands, name="lessons")


def listing(context: typer.Context) -> None:
    """List the lessons; `run` measures them, `check` looks whether they can be."""
    if context.invoked_subcommand is not None:
        return
    from stockpot.lessons.all_lessons import all_lessons

    table = Table()
    for name in ("", "lesson", "wrong", "right"):
        table.add_column(name)
    for lesson in all_lessons():
        table.add_row(str(lesson.number), lesson.title, lesson.wrong, lesson.right)
    console = Console()
    console.print(table)
    console.print("stockpot lessons run all | run 1 3 | check", highlight=False)


def run(  # noqa: PLR0917  options of a command are all given by name
    lessons: Annotated[
        list[str] | None,
        typer.Argument(help="Numbers or names; all, or none given: all.", show_default=False),
    ] = None,
    base_url: BaseUrl = "",
    model: Model = "",
    fleet: Annotated[
        bool, typer.Option("--fleet", help="Real vLLM servers as workers of lesson 4 (set up once: 4 GB).")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short, to see that all works.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure the wrong way and the right way. Ends with 1 where the right way was not better."""
    from stockpot.lessons.all_lessons import chosen
    from stockpot.lessons.lesson import Size, Stage, measured, show

    stage, size, console = Stage(base_url, model, fleet), Size.quick() if quick else Size(), Console()
    wanted = chosen(lessons or ())
    if base_url:  # what needs a server of its own is left out of "all", and refused where it was named
        named = {each.number for each in wanted} if lessons and "all" not in lessons else set[int]()
        wanted = tuple(each for each in wanted if not each.own_server or each.number in named)
    found: list[tuple[Lesson, Outcome]] = []
    for lesson in wanted:
        outcome = run_measurement(measured(lesson, stage, size))
        found.append((lesson, outcome))
        if not as_json:
            show(lesson, outcome, console)
    if as_json:
        typer.echo(json.dumps([_figures(lesson, outcome) for lesson, outcome in found], indent=2))
    if any(outcome.right.hit_ratio <= outcome.wrong.hit_ratio for _, outcome in found):
        Console(stderr=True).print(
            "In a lesson the right way was not better: does the server tell cached tokens, and cache prefixes"
            " (vLLM: --enable-prompt-tokens-details)?",
            style="yellow",
        )
        raise typer.Exit(_WORSE)


def check(base_url: BaseUrl = "", model: Model = "") -> None:
    """Look whether the lessons can be measured here: the model, the library, memory, or the server given.

    Ends with 1 where not.
    """
    console = Console()
    good = True
    for what, look in _checks(base_url, model):
        try:
            console.print(f"[green]ok[/green]   {what}: {look()}", highlight=False)
        except StockpotError as error:
            good = False
            console.print(f"[red]no[/red]   {what}: ", end="", highlight=False)
            console.print(str(error), markup=False, highlight=False)
    if not good:
        raise typer.Exit(_WORSE)


def _checks(base_url: str, model: str) -> list[tuple[str, Any]]:
    if base_url:
        return [("server", lambda: _server(base_url, model))]
    return [("model and library", _model), ("memory", _memory), ("port", _port)]


def _server(base_url: str, model: str) -> str:
    from stockpot.lessons.lesson import client_at

    async def look() -> str:
        client = await client_at(base_url, model)
        prompt: ChatMessage = {"role": "user", "content": "Say yes. " * 200}
        await client.chat([prompt], max_tokens=1)
        answer = await client.chat([prompt], max_tokens=1)
        if answer.cached_tokens is None:
            return (
                f"{client.model} answers, but does not tell cached tokens"
                " (vLLM: --enable-prompt-tokens-details)"
            )
        told = f"{answer.cached_tokens} of {answer.prompt_tokens}"
        return f"{client.model}: {told} tokens of a repeated prompt cached"

    return run_measurement(look())


def _model() -> str:
    from stockpot.runtime import prepare_model
    from stockpot.settings import load_settings

    prepared = prepare_model(load_settings())
    return f"{prepared.located.name}, {prepared.binding.name} {prepared.binding.version}"


def _memory() -> str:
    from stockpot.models.machine import available_memory_bytes

    free = available_memory_bytes()
    if free < 2 * 2**30:
        raise StockpotError(f"{free / 2**30:.1f} GiB are free; three servers of lesson 4 want 2 GiB.")
    return f"{free / 2**30:.1f} GiB free"


def _port() -> str:
    from stockpot.bench.server import free_port

    return f"{free_port()} is free"


def _figures(lesson: Lesson, outcome: Outcome) -> dict[str, Any]:
    return {
        "lesson": lesson.number,
        "name": lesson.name,
        "wrong": _way(outcome.wrong),
        "right": _way(outcome.right),
    }


def _way(way: Way) -> dict[str, Any]:
    return {
        "name": way.name,
        "ttft_ms": [round(1e3 * answer.ttft_s, 2) for answer in way.answers],
        "ttft_median_ms": round(1e3 * way.ttft_s, 2),
        "prompt_tokens": way.prompt_tokens,
        "cached_tokens": way.cached_tokens,
        "hit_ratio": round(way.hit_ratio, 4),
    }

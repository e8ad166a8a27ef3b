"""`stockpot chat`: talk to a model in the terminal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockpot.errors import ServerUnreachable, StockpotError

if TYPE_CHECKING:
    from rich.console import Console

    from stockpot.cli.conversation import ChatSource, Conversation, TurnFigures

_DEFAULT_URL = "http://127.0.0.1:8000"
_LOOK_S = 1.0
_SWITCH_INTERVAL_S = 0.0005

_HELP = """/help   this list
/new    forget the conversation and begin anew
/stats  what each turn took
/quit   leave (also: end of input, Ctrl-D)
Ctrl-C stops an answer; what was shown of it stays in the conversation."""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def chat(
        url: Annotated[
            str | None,
            typer.Option(help="Address of a server. [default: one at 127.0.0.1:8000, else this process]"),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(help="Name at the server; in this process also a path or hf:org/repo:file.gguf."),
        ] = None,
        system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
        max_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 512,
        temperature: Annotated[
            float, typer.Option(min=0, max=2, help="0: always the likeliest word; higher: more varied.")
        ] = 0.7,
    ) -> None:
        """Talk to a model; answers stream in.

        After each answer: how many tokens of the prompt came from the cache and how many were computed, the
        time to the first token (TTFT), and tokens per second. From the second turn on only what is new is
        computed: that is the point of this program.

        Reads questions line by line, so a pipe works too. In the chat, /help lists commands.
        """
        from rich.console import Console

        from stockpot.cli.conversation import ChatOptions, Conversation

        console = Console(highlight=False, markup=False)
        # One loop for the whole chat: the model in this process lives on it. It runs only while there is
        # something to wait for, so that at the prompt Ctrl-C is the terminal's.
        with asyncio.Runner() as runner, ExitStack() as stack:
            source = _source(url, model, runner, stack, console)
            options = ChatOptions(max_tokens=max_tokens, temperature=temperature)
            _talk(Conversation(source, options, system=system), runner, console)


def _source(
    url: str | None, model: str | None, runner: asyncio.Runner, stack: ExitStack, console: Console
) -> ChatSource:
    """The server at `url`; else a Stockpot at the default address that has the model; else here."""
    from stockpot.cli.conversation import HttpSource

    if url is not None:
        names = [card["id"] for card in served_models(url)]
        if not names:
            raise ServerUnreachable(f"The server at {url} serves no model.")
        return HttpSource(url, model or names[0])
    try:
        cards = served_models(_DEFAULT_URL)
    except ServerUnreachable:
        cards = []
    names = [card["id"] for card in cards if card.get("owned_by") == "stockpot"]
    if names and (model is None or model in names):
        console.print(f"Using the server at {_DEFAULT_URL}.", style="dim")
        return HttpSource(_DEFAULT_URL, model or names[0])
    return _open_in_process(model, runner, stack)


def served_models(url: str) -> list[dict[str, Any]]:
    """The entries of /v1/models. Raises ServerUnreachable where there is no such server."""
    import httpx2

    from stockpot.cli.conversation import api_root

    address = f"{api_root(url)}/v1/models"
    try:
        response = httpx2.get(address, timeout=_LOOK_S)
        response.raise_for_status()
        return list(response.json()["data"])
    except httpx2.HTTPStatusError as error:
        raise ServerUnreachable(
            f"{address} answers {error.response.status_code}: is it a server with OpenAI's API?"
        ) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ServerUnreachable(
            f"No server answers at {url} ({error}). Start one with 'stockpot serve', or leave out --url."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ServerUnreachable(
            f"{address} does not list models; is it a server with OpenAI's API?"
        ) from error


def _open_in_process(model: str | None, runner: asyncio.Runner, stack: ExitStack) -> ChatSource:
    """Load the model here; it is freed when `stack` closes."""
    from rich.console import Console

    from stockpot.cli.conversation import BackendSource
    from stockpot.cli.progress import terminal_progress
    from stockpot.runtime import open_runtime
    from stockpot.settings import load_settings

    overrides: dict[str, Any] = {} if model is None else {"model": {"source": model}}
    # As in `stockpot serve`: the engine's thread must have the interpreter back quickly after each decode.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with terminal_progress(Console(stderr=True)) as progress:
        runtime = open_runtime(load_settings(**overrides), progress=progress)
    stack.callback(runtime.backend.close)
    runner.run(runtime.backend.start())
    stack.callback(lambda: runner.run(runtime.backend.stop(drain=False)))
    return BackendSource(runtime.backend)


def _talk(conversation: Conversation, runner: asyncio.Runner, console: Console) -> None:
    """Questions in, answers out, until the input ends."""
    if sys.stdin.isatty():
        console.print(f"Talking to {conversation.source.model}; /help lists commands.", style="dim")
    for line in _lines():
        match line.strip():
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/help":
                console.print(_HELP)
            case "/new":
                conversation.clear()
                console.print("Forgotten.", style="dim")
            case "/stats":
                _show_stats(conversation, console)
            case question if question.startswith("/"):
                console.print(f"There is no command {question}; /help lists them.")
            case question:
                _answer(conversation, question, runner, console)


def _lines() -> Iterator[str]:
    """Lines of the input; at a terminal with a prompt, where Ctrl-C drops the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print(" (/quit or Ctrl-D leaves)")
        except EOFError:
            print()
            return


def _answer(conversation: Conversation, question: str, runner: asyncio.Runner, console: Console) -> None:
    """One turn. Ctrl-C and a failed request end the turn, not the program."""
    before = len(conversation.turns)
    try:
        runner.run(_stream(conversation, question, console))
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
        return
    except StockpotError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        if not sys.stdin.isatty():
            raise
        return
    console.print()
    for figures in conversation.turns[before:]:
        console.print(figures_line(figures), style="dim")


async def _stream(conversation: Conversation, question: str, console: Console) -> None:
    async with aclosing(conversation.ask(question)) as pieces:
        async for piece in pieces:
            console.out(piece, end="", highlight=False)
            console.file.flush()


def figures_line(figures: TurnFigures) -> str:
    """What a turn took, for people."""
    ttft = "-" if figures.ttft_s is None else f"{figures.ttft_s * 1e3:.0f} ms"
    rate = "-" if figures.tokens_per_s is None else f"{figures.tokens_per_s:.0f}"
    return (
        f"[{figures.cached_tokens:,} tokens cached, {figures.computed_tokens:,} computed; TTFT {ttft}; "
        f"{figures.completion_tokens:,} tokens, {rate} per second]"
    )


def _show_stats(conversation: Conversation, console: Console) -> None:
    from rich.table import Table

    if not conversation.turns:
        console.print("Nothing asked yet.", style="dim")
        return
    table = Table(
        "turn", "cached", "computed", "TTFT ms", "answer", "tokens/s", box=None, header_style="bold"
    )
    for number, turn in enumerate(conversation.turns, start=1):
        ttft = "-" if turn.ttft_s is None else f"{turn.ttft_s * 1e3:.0f}"
        rate = "-" if turn.tokens_per_s is None else f"{turn.tokens_per_s:.0f}"
        counts = (turn.cached_tokens, turn.computed_tokens)
        table.add_row(str(number), *map(str, counts), ttft, str(turn.completion_tokens), rate)
    console.print(table)

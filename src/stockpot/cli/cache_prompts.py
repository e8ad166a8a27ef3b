"""Prompts given to `stockpot cache` commands: a text, a file, messages, or a file of many prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

Text = Annotated[
    str | None, typer.Option(help="The prefix as a text, as /v1/completions takes it.", show_default=False)
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="A file with that text, taken as it is.",
        show_default=False,
        exists=True,
        dir_okay=False,
    ),
]
MessagesFile = Annotated[
    Path | None,
    typer.Option(
        "--messages",
        help='The prefix as the first messages of a chat: a JSON file, [{"role": ..., "content": ...}, ...].',
        show_default=False,
        exists=True,
        dir_okay=False,
    ),
]


def prefix_of(text: str | None, file: Path | None, messages: Path | None) -> dict[str, Any]:
    """The one prefix that is given, as the server takes it; nothing where none is. Raises BadParameter."""
    if sum(given is not None for given in (text, file, messages)) > 1:
        raise typer.BadParameter("give one of --text, --file and --messages", param_hint="--text")
    if messages is not None:
        return {"messages": _messages(messages)}
    if file is not None:
        text = text_of(file)
    return {} if text is None else {"text": text}


def text_of(file: Path) -> str:
    """A file's text as it is. Raises BadParameter."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read as UTF-8 text: {error}") from error


def _messages(file: Path) -> list[Any]:
    try:
        found: Any = json.loads(text_of(file))
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{file} is not JSON: {error}", param_hint="--messages") from error
    if isinstance(found, dict):
        found = cast(dict[str, Any], found).get("messages")
    if not isinstance(found, list) or not found:
        raise typer.BadParameter(f"{file} holds no list of messages", param_hint="--messages")
    return cast(list[Any], found)


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One line of a file of prompts. `wrong` says why it is none, `end_bytes` where it ends."""

    number: int
    end_bytes: int
    prompt: Mapping[str, Any]
    wrong: str = ""


def lines_of(file: Path) -> Iterator[PromptLine]:
    """The lines of a JSONL file that are not empty, one after the other."""
    end = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            end += len(line)
            if line.strip():
                yield _line(number, end, line)


def _line(number: int, end: int, line: bytes) -> PromptLine:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return PromptLine(number, end, {}, f"it is not JSON: {error}")
    if not isinstance(found, dict) or ("messages" in found) == ("prompt" in found):
        return PromptLine(number, end, {}, 'it is neither {"messages": [...]} nor {"prompt": "..."}')
    return PromptLine(number, end, cast(dict[str, Any], found))

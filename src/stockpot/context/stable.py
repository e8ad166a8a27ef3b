"""What may stand in the stable sections of a prompt: brought into one form, and searched for what moves on.

A time, a random id or a counter early in a prompt makes all that follows uncacheable. It is refused here,
with the way out: `Context.fact`, which tells it at the end.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

from stockpot.context.canonical import canonical_json, canonical_text, in_order
from stockpot.context.prompt import Document
from stockpot.context.volatile import Volatile, find_volatile
from stockpot.errors import StockpotError
from stockpot.requests import Message, Tool

Checks = Literal["error", "warn", "off"]

_AROUND = 40
_NOW = re.compile(
    r"\b(?:now|today|current(?:ly)?|time(?:stamp)?|date|generated|updated|as of|started|session)\b"
    r"[^\n]{0,24}$",
    re.IGNORECASE,
)
_SURE_UUID = 20
"""Characters: a shorter hexadecimal number may be a commit or a colour that never changes."""


class VolatileText(StockpotError):
    """Something that is another one soon stands early in a prompt."""


class VolatileTextWarning(UserWarning):
    """The same, where `checks` is "warn"."""


def check_stable(text: str, where: str, checks: Checks) -> None:
    """Raises VolatileText for what moves on, or warns of it."""
    if checks == "off":
        return
    for each in find_volatile(text):
        if not _moves_on(text, each):
            continue
        words = _words(text, each, where)
        if checks == "error":
            raise VolatileText(words)
        warnings.warn(words, VolatileTextWarning, stacklevel=4)


def _moves_on(text: str, found: Volatile) -> bool:
    """Whether it is sure enough: opening hours, a deadline, a numbered list are no mistakes."""
    said = text[found.start : found.end]
    before = text[max(0, found.start - _AROUND) : found.start]
    match found.kind:
        case "uuid":
            return len(said) >= _SURE_UUID or not re.fullmatch(r"[0-9a-f]+", said, re.IGNORECASE)
        case "timestamp" if said.isdigit() or re.search(r"\d:\d\d:\d\d", said):
            return True
        case "timestamp" | "date":
            return _NOW.search(before) is not None
        case "counter":
            return re.match(r"(?:request|message|msg|turn|session|seq)", said, re.IGNORECASE) is not None


def _words(text: str, found: Volatile, where: str) -> str:
    start, end = max(0, found.start - _AROUND), found.end + _AROUND
    excerpt = (
        text[start : found.start] + ">>>" + text[found.start : found.end] + "<<<" + text[found.end : end]
    )
    name = {"timestamp": "time", "date": "date", "uuid": "id", "counter": "number"}[found.kind]
    return (
        f"{where} has a {found.kind} at character {found.start}: {excerpt!r}. All that follows it is computed"
        f" anew whenever it changes. Take it out, and tell it at the end: context.fact({name!r},"
        f' {text[found.start : found.end]!r}). If it never changes, allow it with checks="off".'
    )


def stable_tool(tool: Tool | Mapping[str, Any], *, nfc: bool, checks: Checks) -> Tool:
    """A tool in one form: as `Tool`, or as OpenAI or Anthropic have it in JSON. Raises StockpotError."""
    if not isinstance(tool, Tool):
        tool = _tool_of(tool)
    text = "" if tool.description is None else canonical_text(tool.description, nfc=nfc)
    parameters = (
        None if tool.parameters is None else cast("dict[str, Any]", in_order(tool.parameters, nfc=nfc))
    )
    check_stable(f"{text}\n{canonical_json(parameters)}", f"the tool {tool.name!r}", checks)
    return Tool(tool.name, text if tool.description is not None else None, parameters, tool.strict)


def _tool_of(given: Mapping[str, Any]) -> Tool:
    function: Any = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(
        cast("Mapping[str, Any]", function).get("name"), str
    ):
        raise StockpotError(f"A tool needs a 'name'; got {dict(given)!r:.200}.")
    known = cast("Mapping[str, Any]", function)
    parameters = known.get("parameters", known.get("input_schema"))
    return Tool(known["name"], known.get("description"), parameters, known.get("strict"))


def stable_tools(tools: Iterable[Tool | Mapping[str, Any]], *, nfc: bool, checks: Checks) -> tuple[Tool, ...]:
    """In order of their names: however a registry lists them, the prompt is the same. Raises StockpotError
    for two of one name."""
    made = sorted((stable_tool(tool, nfc=nfc, checks=checks) for tool in tools), key=lambda one: one.name)
    for one, other in pairwise(made):
        if one.name == other.name:
            raise StockpotError(f"Two tools have the name {one.name!r}; rename one.")
    return tuple(made)


def stable_texts(texts: str | Sequence[str], where: str, *, nfc: bool, checks: Checks) -> tuple[str, ...]:
    """Without empty ones."""
    given = (texts,) if isinstance(texts, str) else texts
    made = tuple(text for each in given if (text := canonical_text(each, nfc=nfc)))
    for text in made:
        check_stable(text, where, checks)
    return made


def stable_examples(
    examples: Iterable[Message | tuple[str, str]], *, nfc: bool, checks: Checks
) -> tuple[Message, ...]:
    """Turns, or pairs of what the user says and the answer."""
    made: list[Message] = []
    for each in examples:
        if isinstance(each, Message):
            made.append(each)
        else:
            user, assistant = (canonical_text(text, nfc=nfc) for text in each)
            made += (Message("user", user), Message("assistant", assistant))
    for place, message in enumerate(made):
        check_stable(message.content, f"example turn {place + 1}", checks)
    return tuple(made)


def stable_documents(documents: Iterable[Document] | Mapping[str, str], *, nfc: bool) -> tuple[Document, ...]:
    """As given: their order may matter. What stands in them is data, and not searched. Raises StockpotError
    for two of one name, and for a name that would end the tag it stands in."""
    if isinstance(documents, Mapping):
        texts = cast("Mapping[str, str]", documents)
        documents = [Document(name, text) for name, text in texts.items()]
    made = tuple(Document(each.name, canonical_text(each.text, nfc=nfc)) for each in documents)
    names = [each.name for each in made]
    for name in names:
        if names.count(name) > 1:
            raise StockpotError(f"Two documents have the name {name!r}; rename one.")
        if not name or any(sign in name for sign in '"<>\n'):
            raise StockpotError(
                f'The document name {name!r} is empty or has ", <, > or a line end; rename it.'
            )
    return made

"""A prompt as a tree: sections in order of stability, then the log; and the one way it becomes a request.

    system      what never changes
    tools       definitions, their order fixed
    examples    few-shot turns
    documents   what is read before the conversation
    log         turns; only ever appended to

All is frozen: `request_of` is a pure function, so what is the same renders the same, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from stockpot.requests import TOOLS, CacheBoundary, ChatRequest, Generation, Message, Part, TextPart, Tool

Section = Literal["system", "tools", "examples", "documents", "log"]

STABLE: tuple[Section, ...] = ("tools", "system", "examples", "documents")
"""Those that do not grow, in the order in which providers read them."""


@dataclass(frozen=True, slots=True)
class Document:
    """What is read before the conversation; `name` stands above the text, and is a tag for invalidation."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place behind the first `count` items of a section; what precedes it is worth keeping for `ttl_s`
    seconds from its last use on. `shared` and `tags` are those of `CacheBoundary`."""

    section: Section
    count: int
    ttl_s: int = 300
    shared: bool = False
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tree. `system` are texts, joined by an empty line. `log` holds turns as the model is shown them."""

    system: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    examples: tuple[Message, ...] = ()
    documents: tuple[Document, ...] = ()
    log: tuple[Message, ...] = ()
    boundaries: tuple[Boundary, ...] = field(default=())


def request_of(prompt: Prompt, generation: Generation) -> ChatRequest:
    """The request that asks for the next turn: what every backend is given, and all renderings come from.

    The system texts are the first message. Documents stand at the beginning of the first turn of the log
    (some templates refuse two turns of one side in a row), as a turn of their own where that is not the
    user's.
    """
    messages: list[Message] = []
    if prompt.system:
        messages.append(Message("system", _SEPARATOR.join(prompt.system)))
    messages += prompt.examples
    first_turn = len(messages)
    read = "".join(map(document_text, prompt.documents))
    log = list(prompt.log)
    if read and log and log[0].role == "user":
        log[0] = _behind(read, log[0])
    elif read:
        log.insert(0, Message("user", read))
    messages += log
    inserted = len(log) - len(prompt.log)
    return ChatRequest(
        generation,
        tuple(messages),
        boundaries=tuple(
            _place(boundary, prompt, first_turn, inserted) for boundary in in_order(prompt.boundaries)
        ),
        tools=prompt.tools,
    )


def in_blocks(request: ChatRequest, prompt: Prompt) -> ChatRequest:
    """The request of a prompt with each system text, and the documents, as a part of its own. A boundary
    cuts a text in two; for APIs that cache by blocks the cuts must be the same whether one stands there or
    not."""
    messages = list(request.messages)
    if len(prompt.system) > 1:
        texts = [text + _SEPARATOR for text in prompt.system[:-1]] + [prompt.system[-1]]
        messages[0] = replace(messages[0], parts=tuple(map(TextPart, texts)))
    first = bool(prompt.system) + len(prompt.examples)
    if prompt.documents and first < len(messages) and not messages[first].parts:
        read = len("".join(map(document_text, prompt.documents)))
        content = messages[first].content
        pieces = (TextPart(content[:read]), TextPart(content[read:]))
        messages[first] = replace(messages[first], parts=tuple(each for each in pieces if each.text))
    return replace(request, messages=tuple(messages))


def document_text(document: Document) -> str:
    """A document as the model reads it."""
    return f'<document name="{document.name}">\n{document.text}\n</document>\n\n'


def in_order(boundaries: Sequence[Boundary]) -> list[Boundary]:
    """In the order in which providers read a prompt: tools, system, examples, documents, log."""
    return sorted(boundaries, key=lambda one: (_READ.index(one.section), one.count))


_SEPARATOR = "\n\n"
_READ: tuple[Section, ...] = (*STABLE, "log")


def _behind(read: str, turn: Message) -> Message:
    parts: tuple[Part, ...] = (TextPart(read), *turn.parts) if turn.parts else ()
    return Message("user", read + turn.content, turn.name, parts)


def _place(boundary: Boundary, prompt: Prompt, first_turn: int, inserted: int) -> CacheBoundary:
    """Where a boundary stands in the messages."""
    message, characters = 0, None
    match boundary.section:
        case "tools":
            message, characters = TOOLS, boundary.count - 1
        case "system":
            characters = len(_SEPARATOR.join(prompt.system[: boundary.count]))
        case "examples":
            message = first_turn - len(prompt.examples) + boundary.count - 1
        case "documents":
            message = first_turn
            characters = sum(len(document_text(each)) for each in prompt.documents[: boundary.count])
        case "log":
            message = first_turn + inserted + boundary.count - 1
    return CacheBoundary(message, characters, boundary.ttl_s, boundary.shared, boundary.tags)

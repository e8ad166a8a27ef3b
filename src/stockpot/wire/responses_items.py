"""The output of a response as a list of items, and the steps in which it comes to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from stockpot.events import Delta, TokenDetail, TokenLogprob, ToolCallDelta
from stockpot.wire.chat_answer import LOWEST_LOGPROB, Alternative, TokenEntry
from stockpot.wire.errors import GenerationFailed

ItemStatus = Literal["in_progress", "completed", "incomplete"]
PartKind = Literal["output_text", "refusal", "reasoning_text"]


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """Text of the answer; nothing is cited here."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenEntry] = []


class OutputRefusal(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    """Text in which the model refuses."""

    refusal: str


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """What the model thinks before it answers."""

    text: str


class OutputMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    status: ItemStatus
    content: list[OutputText | OutputRefusal]
    role: str = "assistant"


class OutputReasoning(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    """What the model thought; no summary of it is made."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[Any] = []
    encrypted_content: str | UnsetType = UNSET


class OutputCall(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A function the model wants called; `call_id` is what its output must be sent back under."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


@dataclass(slots=True)
class Part:
    """A stretch of one kind of text in an item, at place `index` of its content."""

    kind: PartKind
    index: int
    pieces: list[str] = field(default_factory=list[str])
    logprobs: list[TokenEntry] = field(default_factory=list[TokenEntry])

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def body(self) -> OutputText | OutputRefusal | ReasoningText:
        match self.kind:
            case "output_text":
                return OutputText(self.text, logprobs=self.logprobs)
            case "refusal":
                return OutputRefusal(self.text)
            case "reasoning_text":
                return ReasoningText(self.text)


@dataclass(slots=True)
class TextItem:
    """A message, or reasoning."""

    id: str
    index: int
    reasoning: bool
    status: ItemStatus = "in_progress"
    parts: list[Part] = field(default_factory=list[Part])

    def body(self) -> OutputItem:
        content: list[Any] = [part.body() for part in self.parts]
        if self.reasoning:
            return OutputReasoning(self.id, self.status, content)
        return OutputMessage(self.id, self.status, content)


@dataclass(slots=True)
class CallItem:
    """A call of a function."""

    id: str
    index: int
    call_id: str
    name: str
    status: ItemStatus = "in_progress"
    pieces: list[str] = field(default_factory=list[str])

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    def body(self) -> OutputItem:
        return OutputCall(self.id, self.status, self.call_id, self.name, self.arguments)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happened to an item, or to a part of it. The bodies of item and part are as they are
    now: a step must be told before the next one is taken."""

    kind: Literal["item_added", "part_added", "delta", "done", "part_done", "item_done"]
    item: TextItem | CallItem
    part: Part | None = None
    text: str = ""
    logprobs: tuple[TokenEntry, ...] = ()


class Items:
    """Items in the order in which they began. One is open at a time; the next one closes it."""

    def __init__(self, response_id: str, *, logprobs: bool) -> None:
        self._suffix = response_id.partition("_")[2]
        self._logprobs = logprobs
        self._items: list[TextItem | CallItem] = []
        self._calls: dict[int, CallItem] = {}

    def output(self) -> list[OutputItem]:
        """What there is by now."""
        return [item.body() for item in self._items]

    def add(self, event: Delta) -> Iterator[Step]:
        """Take what is new."""
        if event.reasoning:
            yield from self._text("reasoning_text", event.reasoning)
        if event.text or (event.details and self._logprobs):
            logprobs = tuple(map(_entry, event.details)) if self._logprobs else ()
            yield from self._text("output_text", event.text, logprobs)
        if event.refusal:
            yield from self._text("refusal", event.refusal)
        for call in event.tool_calls:
            yield from self._call(call)

    def close(self, *, whole: bool) -> Iterator[Step]:
        """Nothing comes any more. An answer that was cut off was cut off in its last item."""
        yield from self._leave("completed" if whole else "incomplete")

    def _text(self, kind: PartKind, text: str, logprobs: tuple[TokenEntry, ...] = ()) -> Iterator[Step]:
        item = self._items[-1] if self._items else None
        reasoning = kind == "reasoning_text"
        if not isinstance(item, TextItem) or item.reasoning != reasoning:
            yield from self._leave()
            item = TextItem(self._id("rs" if reasoning else "msg"), len(self._items), reasoning)
            self._items.append(item)
            yield Step("item_added", item)
        part = item.parts[-1] if item.parts else None
        if part is None or part.kind != kind:
            if part is not None:
                yield from _ended(item, part)
            part = Part(kind, len(item.parts))
            item.parts.append(part)
            yield Step("part_added", item, part)
        part.pieces.append(text)
        part.logprobs.extend(logprobs)
        yield Step("delta", item, part, text, logprobs)

    def _call(self, delta: ToolCallDelta) -> Iterator[Step]:
        item = self._calls.get(delta.index)
        if item is None:
            yield from self._leave()
            id_ = self._id("fc")
            item = CallItem(id_, len(self._items), delta.id or f"call_{id_}", delta.name or "")
            self._calls[delta.index] = item
            self._items.append(item)
            yield Step("item_added", item)
        elif item is not self._items[-1]:
            # An item that is done may have been acted upon: its arguments must not grow any more.
            raise GenerationFailed(
                f"The model went back to the call {item.name[:64]!r} after it had begun another; send the"
                " request again, or with 'parallel_tool_calls': false."
            )
        if delta.arguments:
            item.pieces.append(delta.arguments)
            yield Step("delta", item, text=delta.arguments)

    def _leave(self, status: ItemStatus = "completed") -> Iterator[Step]:
        item = self._items[-1] if self._items else None
        if item is None or item.status != "in_progress":
            return
        if isinstance(item, CallItem):
            yield Step("done", item)
        elif item.parts:
            yield from _ended(item, item.parts[-1])
        item.status = status
        yield Step("item_done", item)

    def _id(self, kind: str) -> str:
        return f"{kind}_{self._suffix}{len(self._items):02x}"


def _ended(item: TextItem, part: Part) -> Iterator[Step]:
    yield Step("done", item, part)
    yield Step("part_done", item, part)


def _entry(detail: TokenDetail) -> TokenEntry:
    chosen = _alternative(detail.chosen)
    return TokenEntry(chosen.token, chosen.logprob, chosen.bytes, [_alternative(each) for each in detail.top])


def _alternative(token: TokenLogprob) -> Alternative:
    text = token.data.decode(errors="replace")
    return Alternative(text, max(token.logprob, LOWEST_LOGPROB), list(token.data))

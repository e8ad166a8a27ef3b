"""Events as the JSON of /v1/messages: one message, or the events of a stream in the Anthropic API's order.

    message_start  (content_block_start content_block_delta* content_block_stop)*  message_delta  message_stop

Source: Anthropic API reference, "Messages" and "Streaming messages". `stockpot` beside `usage` is ours.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from stockpot.events import Completed, Delta, Finished, Started, ToolCallDelta, Usage
from stockpot.wire.delivery import Collector, Narrator
from stockpot.wire.shapes_common import TTL_S
from stockpot.wire.usage import CacheCreation, Extension, extension_of

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


class TextContent(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Text of the answer."""

    text: str


class ThinkingContent(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """What the model thought before; `signature` is "" where the backend signs nothing."""

    thinking: str
    signature: str = ""


class ToolUseContent(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call of a tool the model asks for."""

    id: str
    name: str
    input: Mapping[str, Any]


BlockContent = TextContent | ThinkingContent | ToolUseContent


class MessageUsage(msgspec.Struct, frozen=True):
    """Tokens. `input_tokens` were computed and are promised to nobody; those read from a cache and those put
    there under a promise are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int


class AnthropicMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """The whole body; at the start of a stream, with nothing in it yet."""

    id: str
    model: str
    content: list[BlockContent]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    stockpot: Extension | UnsetType = UNSET
    role: Literal["assistant"] = "assistant"


class MessageStart(msgspec.Struct, frozen=True, tag_field="type", tag="message_start"):
    """The first event."""

    message: AnthropicMessage


class BlockStart(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_start"):
    """A block begins, empty."""

    index: int
    content_block: BlockContent


class EndDelta(msgspec.Struct, frozen=True):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag_field="type", tag="message_delta"):
    """The end of the message, with its final counts."""

    delta: EndDelta
    usage: MessageUsage
    stockpot: Extension


class End:
    """How an answer ended, gathered from its events."""

    def __init__(self) -> None:
        self._finished: Finished | None = None
        self._called = False
        self._refused = False

    def delta(self, event: Delta) -> None:
        self._called = self._called or bool(event.tool_calls)
        self._refused = self._refused or bool(event.refusal)

    def finished(self, event: Finished) -> None:
        self._finished = event

    @property
    def reason(self) -> StopReason:
        finished = self._finished
        match finished.reason if finished else "stop":
            case "length":
                return "max_tokens"
            case "tool_calls":
                return "tool_use"
            case "content_filter":
                return "refusal"
            case _:
                # Servers of OpenAI's dialect end a call that was demanded by name with "stop".
                if self._called:
                    return "tool_use"
                if self._refused:
                    return "refusal"
                return "stop_sequence" if self.stop_sequence is not None else "end_turn"

    @property
    def stop_sequence(self) -> str | None:
        return self._finished.stop_sequence if self._finished else None


class MessageCollector(Collector):
    """Makes one AnthropicMessage."""

    def __init__(self, *, id: str, model: str) -> None:
        self._id, self._model = id, model
        self._blocks: list[_Gathered] = []
        self._calls: dict[int, _Gathered] = {}
        self._end = End()

    def delta(self, event: Delta) -> None:
        self._end.delta(event)
        if event.reasoning:
            self._last("thinking").texts.append(event.reasoning)
        if event.signature:
            # Signed, a piece of reasoning is complete: what comes after it is another.
            self._last("thinking").signature = event.signature
        if event.text or event.refusal:
            self._last("text").texts += (event.text, event.refusal)
        for call in event.tool_calls:
            block = self._calls.get(call.index)
            if block is None:
                block = self._calls[call.index] = _Gathered("tool_use", tool_id(call), call.name or "")
                self._blocks.append(block)
            block.texts.append(call.arguments)

    def finished(self, event: Finished) -> None:
        self._end.finished(event)

    def answer(self, event: Completed) -> AnthropicMessage:
        return AnthropicMessage(
            self._id,
            self._model,
            [block.content() for block in self._blocks],
            self._end.reason,
            self._end.stop_sequence,
            usage_of(event.usage),
            extension_of(event),
        )

    def _last(self, kind: Literal["text", "thinking"]) -> _Gathered:
        """The block a piece belongs to: the last one, where that is of its kind and not complete."""
        last = self._blocks[-1] if self._blocks else None
        if last is None or last.kind != kind or last.signature:
            last = _Gathered(kind)
            self._blocks.append(last)
        return last


class _Gathered:
    """A block in the making."""

    __slots__ = ("id", "kind", "name", "signature", "texts")

    def __init__(self, kind: Literal["text", "thinking", "tool_use"], id: str = "", name: str = "") -> None:
        self.kind, self.id, self.name = kind, id, name
        self.texts: list[str] = []
        self.signature = ""

    def content(self) -> BlockContent:
        text = "".join(self.texts)
        if self.kind == "text":
            return TextContent(text)
        if self.kind == "thinking":
            return ThinkingContent(text, self.signature)
        return ToolUseContent(self.id, self.name, arguments_of(text))


class MessageNarrator(Narrator):
    """Tells the events of a stream. Blocks come one after the other, each closed before the next begins.

    A call's pieces that come after another call has begun (no known server sends them so) still go out under
    the index of their own block; clients gather by index.
    """

    def __init__(self, *, id: str, model: str) -> None:
        self._id, self._model = id, model
        self._encode = msgspec.json.Encoder().encode
        self._prompt: Started | None = None
        self._begun = False
        self._open: Literal["text", "thinking", "tool_use"] | None = None
        self._open_call = -1
        self._index = -1
        self._calls: dict[int, int] = {}
        self._end = End()

    def started(self, event: Started) -> bytes:
        """Remembers what is known of the prompt: `message_start` goes out with the first piece of the answer,
        so that a first event means a first token."""
        self._prompt = event
        return b""

    def delta(self, event: Delta) -> bytes:
        self._end.delta(event)
        # Nearly all events of nearly all streams are text alone, in a block that is open already.
        if (
            self._open == "text"
            and event.text
            and not (event.reasoning or event.signature or event.tool_calls)
        ):
            return self._text(event.text + event.refusal)
        told = b""
        if event.reasoning:
            told += self._enter("thinking") + self._piece(
                b'{"type":"thinking_delta","thinking":', event.reasoning
            )
        if event.signature:
            told += self._enter("thinking") + self._piece(
                b'{"type":"signature_delta","signature":', event.signature
            )
            told += self._leave()
        if event.text or event.refusal:
            told += self._enter("text") + self._text(event.text + event.refusal)
        for call in event.tool_calls:
            told += self._call(call)
        return self._begin() + told if told else b""

    def finished(self, event: Finished) -> bytes:
        self._end.finished(event)
        return self._begin() + self._leave()

    def completed(self, event: Completed) -> bytes:
        end = MessageDelta(
            EndDelta(self._end.reason, self._end.stop_sequence), usage_of(event.usage), extension_of(event)
        )
        return self._begin() + self._event(b"message_delta", end) + _MESSAGE_STOP

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        known = self._prompt
        usage = Usage(0, {}, 0) if known is None else Usage(known.prompt_tokens, known.cached_tokens, 0)
        message = AnthropicMessage(self._id, self._model, [], None, None, usage_of(usage))
        return self._event(b"message_start", MessageStart(message))

    def _enter(self, kind: Literal["text", "thinking"]) -> bytes:
        """See that the open block is of this kind."""
        if self._open == kind:
            return b""
        empty = TextContent("") if kind == "text" else ThinkingContent("")
        return self._leave() + self._start(kind, empty)

    def _call(self, call: ToolCallDelta) -> bytes:
        told = b""
        if call.index not in self._calls:
            told = self._leave()
            told += self._start("tool_use", ToolUseContent(tool_id(call), call.name or "", {}))
            self._calls[call.index] = self._index
        if call.arguments:
            told += self._piece(
                b'{"type":"input_json_delta","partial_json":', call.arguments, self._calls[call.index]
            )
        return told

    def _start(self, kind: Literal["text", "thinking", "tool_use"], empty: BlockContent) -> bytes:
        self._open = kind
        self._index += 1
        return self._event(b"content_block_start", BlockStart(self._index, empty))

    def _leave(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n' % self._index

    def _text(self, text: str) -> bytes:
        return self._piece(b'{"type":"text_delta","text":', text)

    def _piece(self, delta: bytes, text: str, index: int | None = None) -> bytes:
        return (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%b%b}}\n\n'
            % (
                self._index if index is None else index,
                delta,
                self._encode(text),
            )
        )

    def _event(self, name: bytes, content: Any) -> bytes:
        return b"event: %b\ndata: %b\n\n" % (name, self._encode(content))


_MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'


def usage_of(usage: Usage) -> MessageUsage:
    """The counts of a request as the Anthropic API divides them."""
    cached = usage.cached_total
    promised = usage.promised_tokens or {}
    written = sum(promised.values())
    return MessageUsage(
        input_tokens=max(0, usage.prompt_tokens - cached - written),
        cache_creation_input_tokens=written,
        cache_read_input_tokens=cached,
        cache_creation=CacheCreation(promised.get(TTL_S["5m"], 0), promised.get(TTL_S["1h"], 0)),
        output_tokens=usage.completion_tokens,
    )


def tool_id(call: ToolCallDelta) -> str:
    """The id of a call; servers that give none get one, or no result could be sent back."""
    return call.id or f"toolu_{uuid.uuid4().hex}"


def arguments_of(text: str) -> Mapping[str, Any]:
    """A call's `input`. JSON that is broken (the answer was cut off) or no object is wrapped, as Anthropic's
    "Fine-grained tool streaming" advises; nothing is lost."""
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return {"INVALID_JSON": text}

"""Events as the JSON of /v1/chat/completions: one object, or chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from stockpot.events import Completed, Delta, Finished, FinishReason, TokenDetail, TokenLogprob, ToolCallDelta
from stockpot.wire.delivery import Collector, Narrator
from stockpot.wire.sse import Framer
from stockpot.wire.usage import Extension, UsageBody, extension_of, usage_of

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (the OpenAI API uses the same number)."""


class Alternative(msgspec.Struct, frozen=True):
    """A token that was likely. `bytes` is exact where `token` shows part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(msgspec.Struct, frozen=True):
    """A token of the answer and the likeliest ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class Logprobs(msgspec.Struct, frozen=True):
    """One entry for each token."""

    content: list[TokenEntry]
    refusal: None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """`arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCallBody(msgspec.Struct, frozen=True):
    """A call of a tool the model asks for."""

    id: str
    function: CalledFunction
    type: str = "function"


class ChatMessage(msgspec.Struct, frozen=True, tag_field="role", tag="assistant"):
    """The answer. `content` is null where the model did something else than to speak."""

    content: str | None
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallBody] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion"):
    """The whole body."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    stockpot: Extension


class FunctionPiece(msgspec.Struct, frozen=True):
    """The name once; `arguments` in pieces."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallPiece(msgspec.Struct, frozen=True):
    """What is new of call `index`; `id` and `type` once, in its first piece."""

    index: int
    function: FunctionPiece
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ChunkDelta(msgspec.Struct, frozen=True):
    """What is new; the role once, in the first chunk of a choice."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    tool_calls: list[ToolCallPiece] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    """What is new of one choice."""

    index: int
    delta: ChunkDelta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """One event. `usage` is null in all chunks but the last where it was asked for, absent where not."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET
    stockpot: Extension | UnsetType = UNSET


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list[str])


class _Gathered:
    """One choice, as far as it has come."""

    __slots__ = ("calls", "entries", "reason", "reasoning", "refusal", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.calls: dict[int, _Call] = {}
        self.entries: list[TokenEntry] = []
        self.reason: FinishReason = "stop"

    def take(self, event: Delta) -> None:
        if event.text:
            self.texts.append(event.text)
        if event.reasoning:
            self.reasoning.append(event.reasoning)
        if event.refusal:
            self.refusal.append(event.refusal)
        for piece in event.tool_calls:
            call = self.calls.setdefault(piece.index, _Call())
            call.id = piece.id or call.id
            call.name = piece.name or call.name
            call.arguments.append(piece.arguments)

    def message(self) -> ChatMessage:
        calls = [
            ToolCallBody(call.id, CalledFunction(call.name, "".join(call.arguments)))
            for _, call in sorted(self.calls.items())
        ]
        text = "".join(self.texts)
        return ChatMessage(
            content=text if text or not (calls or self.refusal) else None,
            refusal="".join(self.refusal) or None,
            reasoning_content="".join(self.reasoning) or UNSET,
            tool_calls=calls or UNSET,
        )


class ChatCollector(Collector):
    """Makes one ChatCompletion."""

    def __init__(self, *, id: str, created: int, model: str, choices: int, logprobs: bool) -> None:
        self._id, self._created, self._model = id, created, model
        self._choices = [_Gathered() for _ in range(choices)]
        self._logprobs = logprobs

    def delta(self, event: Delta) -> None:
        choice = self._choices[event.choice]
        choice.take(event)
        if self._logprobs and event.details:
            choice.entries.extend(_entries(event.details))

    def finished(self, event: Finished) -> None:
        self._choices[event.choice].reason = event.reason

    def answer(self, event: Completed) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=choice.message(),
                logprobs=Logprobs(choice.entries) if self._logprobs else None,
                finish_reason=choice.reason,
            )
            for index, choice in enumerate(self._choices)
        ]
        return ChatCompletion(
            self._id, self._created, self._model, choices, usage_of(event), extension_of(event)
        )


class ChatNarrator(Narrator):
    """Makes ChatChunks. The role goes out with the first token, so that a first chunk means a first token."""

    def __init__(self, *, id: str, created: int, model: str, usage: bool) -> None:
        self._id, self._created, self._model = id, created, model
        self._usage: UnsetType | None = None if usage else UNSET
        self._introduced: set[int] = set()
        self._framer = Framer()

    def delta(self, event: Delta) -> bytes:
        # Nearly all chunks of nearly all streams are text alone.
        if event.text and not (event.reasoning or event.refusal or event.tool_calls):
            new = ChunkDelta(content=event.text)
        elif event.details or event.reasoning or event.refusal or event.tool_calls:
            new = _new(event)
        else:
            return b""
        logprobs = Logprobs(list(_entries(event.details))) if event.details else None
        speaks = not (event.tool_calls or event.refusal) or bool(event.text)
        chunk = self._chunk(ChunkChoice(event.choice, new, logprobs))
        return self._introduction(event.choice, speaks=speaks) + chunk

    def finished(self, event: Finished) -> bytes:
        end = ChunkChoice(event.choice, ChunkDelta(), finish_reason=event.reason)
        return self._introduction(event.choice) + self._chunk(end)

    def completed(self, event: Completed) -> bytes:
        if self._usage is UNSET:
            return b""
        return self._framer.event(
            ChatChunk(self._id, self._created, self._model, [], usage_of(event), extension_of(event))
        )

    def _introduction(self, choice: int, *, speaks: bool = True) -> bytes:
        if choice in self._introduced:
            return b""
        self._introduced.add(choice)
        content = "" if speaks else None
        return self._chunk(ChunkChoice(choice, ChunkDelta(role="assistant", content=content)))

    def _chunk(self, choice: ChunkChoice) -> bytes:
        return self._framer.event(ChatChunk(self._id, self._created, self._model, [choice], self._usage))


def _new(event: Delta) -> ChunkDelta:
    """All that a delta brings; a delta of log probabilities alone has an empty text."""
    others = event.reasoning or event.refusal or event.tool_calls
    return ChunkDelta(
        content=event.text if event.text or not others else UNSET,
        reasoning_content=event.reasoning or UNSET,
        refusal=event.refusal or UNSET,
        tool_calls=[_piece(piece) for piece in event.tool_calls] or UNSET,
    )


def _piece(piece: ToolCallDelta) -> ToolCallPiece:
    first = piece.id is not None
    return ToolCallPiece(
        piece.index,
        FunctionPiece(piece.arguments, UNSET if piece.name is None else piece.name),
        piece.id if piece.id is not None else UNSET,
        "function" if first else UNSET,
    )


def _entries(details: Iterable[TokenDetail]) -> Iterable[TokenEntry]:
    for detail in details:
        chosen = _alternative(detail.chosen)
        yield TokenEntry(
            chosen.token, chosen.logprob, chosen.bytes, [_alternative(token) for token in detail.top]
        )


def _alternative(token: TokenLogprob) -> Alternative:
    return Alternative(
        token.data.decode(errors="replace"), max(token.logprob, LOWEST_LOGPROB), list(token.data)
    )

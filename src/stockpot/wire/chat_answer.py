"""Events as the JSON of /v1/chat/completions: one object, or chunks."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType

from stockpot.events import Completed, Delta, Finished, FinishReason, TokenDetail, TokenLogprob
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


class ChatMessage(msgspec.Struct, frozen=True, tag_field="role", tag="assistant"):
    """The answer."""

    content: str
    refusal: None = None


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


class ChunkDelta(msgspec.Struct, frozen=True):
    """What is new; the role once, in the first chunk of a choice."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


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


class ChatCollector(Collector):
    """Makes one ChatCompletion."""

    def __init__(self, *, id: str, created: int, model: str, choices: int, logprobs: bool) -> None:
        self._id, self._created, self._model = id, created, model
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._entries: list[list[TokenEntry]] | None = [[] for _ in range(choices)] if logprobs else None
        self._reasons: list[FinishReason] = ["stop"] * choices

    def delta(self, event: Delta) -> None:
        self._texts[event.choice].append(event.text)
        if self._entries is not None:
            self._entries[event.choice].extend(_entries(event.details))

    def finished(self, event: Finished) -> None:
        self._reasons[event.choice] = event.reason

    def answer(self, event: Completed) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage("".join(texts)),
                logprobs=None if self._entries is None else Logprobs(self._entries[index]),
                finish_reason=reason,
            )
            for index, (texts, reason) in enumerate(zip(self._texts, self._reasons, strict=True))
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
        if not event.text and not event.details:
            return b""
        logprobs = Logprobs(list(_entries(event.details))) if event.details else None
        new = self._chunk(ChunkChoice(event.choice, ChunkDelta(content=event.text), logprobs))
        return self._introduction(event.choice) + new

    def finished(self, event: Finished) -> bytes:
        end = ChunkChoice(event.choice, ChunkDelta(), finish_reason=event.reason)
        return self._introduction(event.choice) + self._chunk(end)

    def completed(self, event: Completed) -> bytes:
        if self._usage is UNSET:
            return b""
        return self._framer.event(
            ChatChunk(self._id, self._created, self._model, [], usage_of(event), extension_of(event))
        )

    def _introduction(self, choice: int) -> bytes:
        if choice in self._introduced:
            return b""
        self._introduced.add(choice)
        return self._chunk(ChunkChoice(choice, ChunkDelta(role="assistant", content="")))

    def _chunk(self, choice: ChunkChoice) -> bytes:
        return self._framer.event(ChatChunk(self._id, self._created, self._model, [choice], self._usage))


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

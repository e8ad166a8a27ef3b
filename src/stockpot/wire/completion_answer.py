"""Events as the JSON of /v1/completions: one object, or chunks (which have the same shape)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from stockpot.events import Completed, Delta, Finished, FinishReason, TokenDetail, TokenLogprob
from stockpot.wire.chat_answer import LOWEST_LOGPROB
from stockpot.wire.delivery import Collector, Narrator
from stockpot.wire.sse import Framer
from stockpot.wire.usage import Extension, UsageBody, extension_of, usage_of


class CompletionLogprobs(msgspec.Struct):
    """Four lists with one entry for each token; `text_offset` counts characters from the answer's start."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One of `n` answers, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(msgspec.Struct, frozen=True, tag_field="object", tag="text_completion"):
    """The whole body, or one event."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | UnsetType | None = UNSET
    stockpot: Extension | UnsetType = UNSET


class _LogprobsOf:
    """Log probabilities of one choice; keeps where in the text the next token stands."""

    def __init__(self) -> None:
        self._offset = 0

    def take(self, details: Sequence[TokenDetail]) -> CompletionLogprobs:
        new = CompletionLogprobs([], [], [], [])
        for detail in details:
            text, logprob = _named(detail.chosen)
            new.tokens.append(text)
            new.token_logprobs.append(logprob)
            # The chosen token is always among them, as the API promises, likely or not.
            new.top_logprobs.append({**dict(_named(token) for token in detail.top), text: logprob})
            new.text_offset.append(self._offset)
            self._offset += len(text)
        return new


class CompletionCollector(Collector):
    """Makes one Completion."""

    def __init__(self, *, id: str, created: int, model: str, choices: int, logprobs: bool) -> None:
        self._id, self._created, self._model = id, created, model
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._details: list[list[TokenDetail]] | None = [[] for _ in range(choices)] if logprobs else None
        self._reasons: list[FinishReason] = ["stop"] * choices

    def delta(self, event: Delta) -> None:
        self._texts[event.choice].append(event.text)
        if self._details is not None:
            self._details[event.choice].extend(event.details)

    def finished(self, event: Finished) -> None:
        self._reasons[event.choice] = event.reason

    def answer(self, event: Completed) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text="".join(texts),
                logprobs=None if self._details is None else _LogprobsOf().take(self._details[index]),
                finish_reason=reason,
            )
            for index, (texts, reason) in enumerate(zip(self._texts, self._reasons, strict=True))
        ]
        return Completion(self._id, self._created, self._model, choices, usage_of(event), extension_of(event))


class CompletionNarrator(Narrator):
    """Makes a Completion for each event."""

    def __init__(self, *, id: str, created: int, model: str, choices: int, usage: bool) -> None:
        self._id, self._created, self._model = id, created, model
        self._usage: UnsetType | None = None if usage else UNSET
        self._logprobs = [_LogprobsOf() for _ in range(choices)]
        self._framer = Framer()

    def delta(self, event: Delta) -> bytes:
        if not event.text and not event.details:
            return b""
        logprobs = self._logprobs[event.choice].take(event.details) if event.details else None
        return self._chunk(CompletionChoice(event.choice, event.text, logprobs))

    def finished(self, event: Finished) -> bytes:
        return self._chunk(CompletionChoice(event.choice, "", finish_reason=event.reason))

    def completed(self, event: Completed) -> bytes:
        if self._usage is UNSET:
            return b""
        return self._framer.event(
            Completion(self._id, self._created, self._model, [], usage_of(event), extension_of(event))
        )

    def _chunk(self, choice: CompletionChoice) -> bytes:
        return self._framer.event(Completion(self._id, self._created, self._model, [choice], self._usage))


def _named(token: TokenLogprob) -> tuple[str, float]:
    return token.data.decode(errors="replace"), max(token.logprob, LOWEST_LOGPROB)

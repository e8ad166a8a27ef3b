"""Answers of OpenAI-compatible servers as events: chunks of a stream, or one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stockpot.backends.prompt_estimate import tokens_of
from stockpot.backends.upstream_errors import Failures
from stockpot.events import (
    CacheTier,
    Delta,
    Event,
    Finished,
    FinishReason,
    Started,
    TokenDetail,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "abort": "cancelled",
    "cancelled": "cancelled",
    "deadline": "deadline",
}


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Text(msgspec.Struct):
    """`delta` of a chunk, `message` of a whole answer."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None
    function_call: _Function | None = None


class _Logprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    id: int = -1
    top_logprobs: list[_Logprob] = []


class _Logprobs(msgspec.Struct):
    """Of chats (`content`) and of plain completions (the others, one entry for each token)."""

    content: list[_Logprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CacheCreation(msgspec.Struct):
    ephemeral_5m_input_tokens: int = 0
    ephemeral_1h_input_tokens: int = 0


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    prompt_cache_hit_tokens: int | None = None  # DeepSeek's name of it
    cache_creation: _CacheCreation | None = None  # Stockpot's, of requests with boundaries


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    object: str = ""
    message: Any = None
    code: Any = None


_DECODER = msgspec.json.Decoder(_Answer)


class OpenAIParser:
    """Reads one answer with `choices` choices; see `remote.AnswerParser`. `prompt_characters`: the length of
    the prompt, for a backend that does not count."""

    def __init__(self, fail: Failures, *, choices: int, prompt_characters: int) -> None:
        self.done = False
        self._fail = fail
        self._open = set(range(choices))
        self._unseen = set(self._open)
        self._choices = choices
        self._started = False
        self._usage: _Usage | None = None
        self._prompt_characters = prompt_characters
        self._in_one_piece = False
        self._deltas = 0
        self._characters = 0

    def event(self, payload: bytes) -> Sequence[Event]:
        if payload == b"[DONE]":
            self.done = True
            return ()
        answer = self._decoded(payload)
        if answer.usage is not None:
            self._usage = answer.usage
        events: list[Event] = []
        if not self._started:
            self._started = True
            events.append(self._start())
        for choice in answer.choices:
            self._choice(choice, choice.delta, events)
        return events

    def whole(self, body: bytes) -> Sequence[Event]:
        answer = self._decoded(body)
        self._usage = answer.usage
        self._started = self._in_one_piece = True
        events: list[Event] = [self._start()]
        for choice in answer.choices:
            self._choice(choice, choice.message, events)
            if choice.index in self._open:
                raise self._fail.error("format", f"gave no 'finish_reason' for choice {choice.index}.")
        self._count_choices()
        self.done = True
        return events

    def end(self) -> Sequence[Event]:
        if not self.done and self._open:
            raise self._fail.error("truncated", "ended its answer in the middle, without a reason.")
        if self._choices > 1 and self.done:
            self._count_choices()
        # `[DONE]` without a reason: nothing is missing, and no more is known.
        missing: list[Event] = [] if self._started else [self._start()]
        missing += [Finished(choice, "stop") for choice in self.unfinished()]
        self._started = True
        self._open.clear()
        return missing

    def unfinished(self) -> Sequence[int]:
        return sorted(self._open)

    def usage(self) -> Usage:
        told = self._usage
        if told is None or told.completion_tokens is None:
            prompt = told.prompt_tokens if told is not None else 0
            prompt = prompt or tokens_of(self._prompt_characters)
            # Streams come a token at a time, mostly.
            written = tokens_of(self._characters) if self._in_one_piece else self._deltas
            return Usage(prompt, self._cached(), written, estimated=True)
        promised: dict[int, int] | None = None
        if (creation := told.cache_creation) is not None:
            promised = {300: creation.ephemeral_5m_input_tokens, 3600: creation.ephemeral_1h_input_tokens}
        details = told.completion_tokens_details
        return Usage(
            told.prompt_tokens,
            self._cached(),
            told.completion_tokens,
            promised,
            reasoning_tokens=details.reasoning_tokens if details is not None else None,
        )

    def _start(self) -> Started:
        return Started(self._usage.prompt_tokens if self._usage else 0, self._cached(), 0.0)

    def _cached(self) -> dict[CacheTier, int]:
        told = self._usage
        if told is None:
            return {}
        details = told.prompt_tokens_details
        cached = details.cached_tokens if details is not None else None
        if cached is None:
            cached = told.prompt_cache_hit_tokens or 0
        # Some count the last token too, which is computed in any case.
        return {"upstream": max(0, min(cached, told.prompt_tokens - 1))}

    def _decoded(self, payload: bytes) -> _Answer:
        try:
            answer = _DECODER.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._fail.error("format", f"sent an answer that cannot be read: {error}.") from error
        if answer.error is not None:
            raise self._fail.in_stream(answer.error)
        if answer.object == "error":  # as vLLM wrote it once
            raise self._fail.in_stream({"message": answer.message, "code": answer.code})
        return answer

    def _count_choices(self) -> None:
        """Raises where choices are missing. A backend that gives some of them ignores `n`: that is about this
        request, and trying again would not help. One that gives none gave no answer."""
        if len(self._unseen) == self._choices:
            raise self._fail.error("format", "gave an answer without choices.")
        if self._unseen:
            given = self._choices - len(self._unseen)
            raise self._fail.error(
                "invalid_request",
                f"gave {given} of the {self._choices} choices that were asked for; ask for one choice at a"
                " time.",
                param="n",
            )

    def _choice(self, choice: _Choice, text: _Text | None, events: list[Event]) -> None:
        if choice.index not in self._open:
            if not 0 <= choice.index < self._choices:
                raise self._fail.error(
                    "invalid_request",
                    f"sent choice {choice.index} where {self._choices} were asked for (from 0); leave out the"
                    " fields that ask it for more.",
                    param="n",
                )
            return  # what comes behind its end (as empty chunks with usage do) adds nothing
        self._unseen.discard(choice.index)
        delta = self._delta(choice, text)
        if delta is not None:
            self._deltas += 1
            self._characters += len(delta.text) + len(delta.reasoning)
            events.append(delta)
        if choice.finish_reason is not None:
            self._open.discard(choice.index)
            events.append(_finished(choice))

    def _delta(self, choice: _Choice, text: _Text | None) -> Delta | None:
        details = _details(choice.logprobs) if choice.logprobs is not None else ()
        tokens = tuple(choice.token_ids) if choice.token_ids else ()
        if text is None:
            words = choice.text or ""
            return Delta(choice.index, words, tokens, details) if words or details or tokens else None
        words = text.content or ""
        reasoning = text.reasoning_content or text.reasoning or ""
        calls = _calls(text)
        refusal = text.refusal or ""
        if not (words or reasoning or calls or refusal or details or tokens):
            return None
        return Delta(choice.index, words, tokens, details, reasoning, refusal, calls)


def _calls(text: _Text) -> tuple[ToolCallDelta, ...]:
    if text.function_call is not None:  # the older form, of one call without an id
        called = text.function_call
        return (ToolCallDelta(0, "call_0" if called.name else None, called.name, called.arguments or ""),)
    if not text.tool_calls:
        return ()
    return tuple(
        ToolCallDelta(
            place if call.index is None else call.index,
            call.id or None,
            (call.function and call.function.name) or None,
            (call.function and call.function.arguments) or "",
        )
        for place, call in enumerate(text.tool_calls)
    )


def _finished(choice: _Choice) -> Finished:
    told = choice.finish_reason or ""
    reason = _REASONS.get(told)
    if reason is None:
        return Finished(choice.index, "error", f"The backend gave the reason {told[:80]!r}.")
    stop = choice.stop_reason if reason == "stop" and isinstance(choice.stop_reason, str) else None
    return Finished(choice.index, reason, stop_sequence=stop)


def _details(told: _Logprobs) -> tuple[TokenDetail, ...]:
    if told.content is not None:
        return tuple(
            TokenDetail(_logprob(entry), tuple(_logprob(other) for other in entry.top_logprobs))
            for entry in told.content
        )
    if told.tokens is None or told.token_logprobs is None:
        return ()
    tops = told.top_logprobs or [None] * len(told.tokens)
    return tuple(
        TokenDetail(
            TokenLogprob(-1, token.encode(), 0.0 if logprob is None else logprob),
            tuple(
                TokenLogprob(-1, other.encode(), its)
                for other, its in sorted((top or {}).items(), key=lambda pair: -pair[1])
            ),
        )
        for token, logprob, top in zip(told.tokens, told.token_logprobs, tops, strict=False)
    )


def _logprob(entry: _Logprob) -> TokenLogprob:
    data = entry.token.encode() if entry.bytes is None else bytes(entry.bytes)
    return TokenLogprob(entry.id, data, entry.logprob)

"""Answers of the Anthropic Messages API as events: its stream of blocks, or one message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stockpot.backends.prompt_estimate import tokens_of
from stockpot.backends.upstream_errors import Failures
from stockpot.events import CacheTier, Delta, Event, Finished, FinishReason, Started, ToolCallDelta, Usage

_REASONS: Mapping[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class _Creation(msgspec.Struct):
    ephemeral_5m_input_tokens: int = 0
    ephemeral_1h_input_tokens: int = 0


class _Usage(msgspec.Struct):
    """`input_tokens` are those behind the last boundary: neither read from the cache nor put there."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: _Creation | None = None


class _Block(msgspec.Struct):
    type: str
    text: str = ""
    thinking: str = ""
    signature: str = ""
    id: str = ""
    name: str = ""
    input: Any = None


class _Change(msgspec.Struct):
    """`delta` of a block, or of the message."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    signature: str = ""
    partial_json: str = ""
    stop_reason: str | None = None
    stop_sequence: str | None = None


class _Message(msgspec.Struct):
    content: list[_Block] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: _Usage | None = None
    type: str = ""
    error: Any = None


class _Event(msgspec.Struct):
    type: str
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Change | None = None
    usage: _Usage | None = None
    error: Any = None


_EVENT = msgspec.json.Decoder(_Event)
_MESSAGE = msgspec.json.Decoder(_Message)


class AnthropicParser:
    """Reads one answer; see `remote.AnswerParser`. Events of unknown types are skipped, as the API asks.

    `has_boundaries`: the request has cache boundaries, so usage says what was kept for them.
    """

    def __init__(self, fail: Failures, *, has_boundaries: bool, prompt_characters: int) -> None:
        self.done = False
        self._fail = fail
        self._has_boundaries = has_boundaries
        self._prompt_characters = prompt_characters
        self._usage = _Usage()
        self._finished = False
        self._characters = 0
        self._calls: dict[int, int] = {}
        self._silent_calls: set[int] = set()

    def event(self, payload: bytes) -> Sequence[Event]:
        try:
            told = _EVENT.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._unreadable(error) from error
        match told.type:
            case "content_block_delta":
                return self._block_delta(told)
            case "content_block_start":
                return self._block_start(told)
            case "content_block_stop":
                return self._block_stop(told.index)
            case "message_start":
                self._count(told.message.usage if told.message is not None else None)
                return (self._start(),)
            case "message_delta":
                self._count(told.usage)
                if told.delta is not None and told.delta.stop_reason is not None:
                    return (self._finish(told.delta.stop_reason, told.delta.stop_sequence),)
            case "message_stop":
                self.done = True
            case "error":
                raise self._fail.in_stream(told.error)
            case _:
                pass
        return ()

    def whole(self, body: bytes) -> Sequence[Event]:
        try:
            message = _MESSAGE.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._unreadable(error) from error
        if message.type == "error":
            raise self._fail.in_stream(message.error)
        if message.stop_reason is None:
            raise self._fail.error("format", "gave an answer without a 'stop_reason'.")
        self._count(message.usage)
        events: list[Event] = [self._start()]
        for index, block in enumerate(message.content):
            events += self._block_start(_Event("content_block_start", index, content_block=block))
            events += self._block_stop(index)
        events.append(self._finish(message.stop_reason, message.stop_sequence))
        self.done = True
        return events

    def end(self) -> Sequence[Event]:
        if not self._finished:
            raise self._fail.error("truncated", "ended its answer in the middle, without a reason.")
        return ()

    def unfinished(self) -> Sequence[int]:
        return () if self._finished else (0,)

    def usage(self) -> Usage:
        told = self._usage
        prompt = self._prompt_tokens()
        promised = self._promised()
        if told.input_tokens is not None and told.output_tokens is not None and self._finished:
            return Usage(prompt, self._cached(), told.output_tokens, promised)
        if told.input_tokens is None:
            prompt = tokens_of(self._prompt_characters)
        written = max(told.output_tokens or 0, tokens_of(self._characters))
        return Usage(prompt, self._cached(), written, promised, estimated=True)

    def _count(self, told: _Usage | None) -> None:
        """Counts are cumulative, and the last that were told hold."""
        if told is None:
            return
        for name in told.__struct_fields__:
            if (value := getattr(told, name)) is not None:
                setattr(self._usage, name, value)

    def _prompt_tokens(self) -> int:
        told = self._usage
        return (
            (told.input_tokens or 0)
            + (told.cache_read_input_tokens or 0)
            + (told.cache_creation_input_tokens or 0)
        )

    def _cached(self) -> dict[CacheTier, int]:
        read = self._usage.cache_read_input_tokens or 0
        return {"upstream": max(0, min(read, self._prompt_tokens() - 1))}

    def _promised(self) -> dict[int, int] | None:
        told = self._usage
        written = told.cache_creation_input_tokens or 0
        if not written and not self._has_boundaries:
            return None
        creation = told.cache_creation
        if creation is None:
            return {300: written, 3600: 0}
        return {300: creation.ephemeral_5m_input_tokens, 3600: creation.ephemeral_1h_input_tokens}

    def _start(self) -> Started:
        return Started(self._prompt_tokens(), self._cached(), 0.0)

    def _finish(self, reason: str, stop_sequence: str | None) -> Finished:
        self._finished = True
        known = _REASONS.get(reason)
        if known is None:
            return Finished(0, "error", f"The backend gave the reason {reason[:80]!r}.")
        return Finished(0, known, stop_sequence=stop_sequence)

    def _block_start(self, told: _Event) -> Sequence[Event]:
        """What a block begins with: mostly nothing in a stream, all of it in a whole message."""
        block = told.content_block
        if block is None:
            return ()
        if block.type == "tool_use":
            call = self._calls.setdefault(told.index, len(self._calls))
            arguments = msgspec.json.encode(block.input).decode() if block.input else ""
            if not arguments:
                self._silent_calls.add(call)
            self._characters += len(arguments)
            return (Delta(0, "", tool_calls=(ToolCallDelta(call, block.id, block.name, arguments),)),)
        return self._delta(block.text, block.thinking, block.signature)

    def _block_delta(self, told: _Event) -> Sequence[Event]:
        change = told.delta
        if change is None:
            return ()
        if change.type == "input_json_delta":
            call = self._calls.get(told.index)
            if call is None or not change.partial_json:
                return ()
            self._silent_calls.discard(call)
            self._characters += len(change.partial_json)
            return (Delta(0, "", tool_calls=(ToolCallDelta(call, arguments=change.partial_json),)),)
        return self._delta(change.text, change.thinking, change.signature)

    def _block_stop(self, index: int) -> Sequence[Event]:
        call = self._calls.get(index)
        if call is None or call not in self._silent_calls:
            return ()
        self._silent_calls.discard(call)  # a call without arguments; as JSON text that is an empty object
        return (Delta(0, "", tool_calls=(ToolCallDelta(call, arguments="{}"),)),)

    def _delta(self, text: str, reasoning: str, signature: str) -> Sequence[Event]:
        if not (text or reasoning or signature):
            return ()
        self._characters += len(text) + len(reasoning)
        return (Delta(0, text, reasoning=reasoning, signature=signature),)

    def _unreadable(self, error: Exception) -> Exception:
        return self._fail.error("format", f"sent an answer that cannot be read: {error}.")

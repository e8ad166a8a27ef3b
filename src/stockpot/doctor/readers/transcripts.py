"""Transcripts of coding agents: each answer in them is a request, whose prompt is all that stands before it.

Claude Code writes a line for each block of a turn, and an answer's usage on each of its lines. Codex writes
items, and after each answer a `token_count`. What such a program puts before the conversation (its system
prompt, its tools) is in neither.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from stockpot.doctor.exchange import Exchange, Piece, Usage, start_of
from stockpot.doctor.readers.line import Line, UsageJson, time_of, usage_of

_THREADS_MAX = 1_000
_OUTPUTS = ("function_call", "reasoning", "custom_tool_call", "local_shell_call", "web_search_call")


class _Message(msgspec.Struct):
    role: str = ""
    id: str = ""
    model: str = ""
    content: Raw = Raw(b"null")
    usage: UsageJson | None = None


class _TokenInfo(msgspec.Struct):
    last_token_usage: UsageJson | None = None


class _Payload(msgspec.Struct):
    type: str = ""
    role: str = ""
    id: str = ""
    model: str = ""
    instructions: Any = None
    info: _TokenInfo | None = None


class _Thread:
    """What a conversation is so far. `answers` are the items since the last request that the model made."""

    __slots__ = ("answer", "items", "model", "outputs", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.answer = ""
        self.model = ""
        self.outputs = 0
        self.items = 0

    def add(self, raw: bytes) -> None:
        self.pieces.append(Piece("message", f"messages[{len(self.pieces)}]", raw, raw))


_MESSAGE = msgspec.json.Decoder(_Message)
_PAYLOAD = msgspec.json.Decoder(_Payload)


class Transcripts:
    """Reads lines in order; the last thousand conversations are known."""

    def __init__(self) -> None:
        self._threads: OrderedDict[tuple[str, str, str], _Thread] = OrderedDict()

    def read(self, line: Line, file: str, number: int, size_bytes: int) -> Iterator[Exchange] | None:
        """The requests a line completes; None: it is no line of a transcript. Raises msgspec.MsgspecError."""
        if line.payload is not UNSET and line.type is not UNSET:
            return self._codex(line, line.payload, file, number, size_bytes)
        if line.type is not UNSET and (line.message is not UNSET or line.sessionId is not UNSET):
            return self._claude(line, file, number, size_bytes)
        return None

    def _thread(self, file: str, session: str, branch: str) -> _Thread:
        key = (file, session, branch)
        thread = self._threads.get(key)
        if thread is None:
            thread = self._threads[key] = _Thread()
            if len(self._threads) > _THREADS_MAX:
                self._threads.popitem(last=False)
        self._threads.move_to_end(key)
        return thread

    def _claude(self, line: Line, file: str, number: int, size_bytes: int) -> Iterator[Exchange]:
        kind = _said(line.type)
        if kind not in ("user", "assistant") or line.message is UNSET:
            return  # summaries, snapshots of files, hooks
        message = _MESSAGE.decode(line.message)
        session = _said(line.sessionId)
        branch = _said(line.agentId) or _said(line.isSidechain)
        thread = self._thread(file, session, branch)
        if _said(line.isCompactSummary) == "true":
            thread.pieces.clear()  # what was said before is replaced by this
        if kind == "assistant" and message.usage is not None and message.id != thread.answer:
            thread.answer = message.id
            yield Exchange(
                file=file,
                line=number,
                shape="anthropic",
                pieces=(pieces := tuple(thread.pieces)),
                start=start_of(pieces),
                model=message.model,
                provider="anthropic",
                at_s=time_of(None if line.timestamp is UNSET else line.timestamp),
                request=message.id,
                session=session + (f"/{branch}" if branch not in ("", "false") else ""),
                usage=usage_of(message.usage),
                size_bytes=size_bytes,
            )
        # Without its usage and ids: the conversation as it is sent again.
        thread.add(msgspec.json.encode({"role": message.role, "content": message.content}))

    def _codex(self, line: Line, given: Raw, file: str, number: int, size_bytes: int) -> Iterator[Exchange]:
        kind, payload = _said(line.type), _PAYLOAD.decode(given)
        thread = self._thread(file, "", "")
        if kind == "session_meta":
            thread.answer = payload.id
            if isinstance(payload.instructions, str):
                raw = msgspec.json.encode(payload.instructions)
                thread.pieces.append(Piece("system", "instructions", raw, raw))
        elif kind == "turn_context":
            thread.model = payload.model or thread.model
        elif kind == "response_item":
            raw = bytes(given)
            thread.pieces.append(Piece("message", f"input[{thread.items}]", raw, raw))
            thread.items += 1
            is_output = payload.type in _OUTPUTS or payload.role == "assistant"
            thread.outputs = thread.outputs + 1 if is_output else 0
        elif kind == "compacted":
            thread.pieces = [piece for piece in thread.pieces if piece.kind == "system"]
        elif kind == "event_msg" and payload.type == "token_count" and payload.info is not None:
            usage = usage_of(payload.info.last_token_usage)
            if usage is None or not thread.outputs:
                return  # told again, or of no answer
            prompt = tuple(thread.pieces[: len(thread.pieces) - thread.outputs])
            thread.outputs = 0
            yield Exchange(
                file=file,
                line=number,
                shape="openai-responses",
                pieces=prompt,
                start=start_of(prompt),
                model=thread.model,
                provider="openai",
                at_s=time_of(None if line.timestamp is UNSET else line.timestamp),
                session=thread.answer,
                usage=Usage(usage.prompt_tokens, usage.cached_tokens or 0, None, usage.completion_tokens),
                size_bytes=size_bytes,
            )


def _said(value: Raw | msgspec.UnsetType) -> str:
    if value is UNSET:
        return ""
    raw = bytes(value)
    return msgspec.json.decode(raw, type=str) if raw[:1] == b'"' else raw.decode()

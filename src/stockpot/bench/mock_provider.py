"""A provider that costs next to nothing: answers of the OpenAI chat API, made before they are asked for.

`python -m stockpot.bench.mock_provider PORT CHUNKS INTERVAL_S`. A whole answer comes at once; a streamed one
has CHUNKS tokens, one each INTERVAL_S, and each says when it was sent (monotonic seconds, which all processes
of a machine share), so that whoever reads it knows how long it was under way. Speaks just enough HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import cast

from stockpot.bench.server import ServerCommand, free_port

MOCK_MODEL = "mock"
PROMPT_TOKENS, ANSWER_TOKENS = 180, 100
_ANSWER = " ".join(["An answer of about a hundred tokens, as a chat gives one."] * 7)
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_STREAMED = re.compile(rb'"stream":\s*true')
_WANTS_USAGE = re.compile(rb'"include_usage":\s*true')
_HOST = "127.0.0.1"


def mock_command(*, chunks: int, interval_s: float) -> ServerCommand:
    """How to start one on a free port."""
    port = free_port()
    arguments = (sys.executable, "-m", __name__, str(port), str(chunks), str(interval_s))
    return ServerCommand("the mock provider", arguments, port, "/v1/models", start_s=60.0)


class _Answers:
    """Everything that is sent, as bytes. No streamed chunk is larger than a packet."""

    def __init__(self, chunks: int, interval_s: float) -> None:
        self.chunks = chunks
        self.interval_s = interval_s
        usage = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": ANSWER_TOKENS,
            "total_tokens": PROMPT_TOKENS + ANSWER_TOKENS,
        }
        head: dict[str, object] = {"id": "chatcmpl-mock", "created": 1, "model": MOCK_MODEL}
        message = {"role": "assistant", "content": _ANSWER}
        whole = {"index": 0, "message": message, "finish_reason": "stop"}
        self.whole = _counted(200, {**head, "object": "chat.completion", "choices": [whole], "usage": usage})
        model = {"id": MOCK_MODEL, "object": "model", "created": 1, "owned_by": "mock"}
        self.models = _counted(200, {"object": "list", "data": [model]})
        self.unknown = _counted(404, {"error": {"message": "There is no such page.", "type": "not_found"}})
        self.stream_head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        head["object"] = "chat.completion.chunk"
        self.first = _event({**head, "choices": [_choice({"role": "assistant", "content": ""})]})
        before, after = _event_text({**head, "choices": [_choice({"content": "@TIME@ "})]}).split("TIME")
        self._chunk = f"{len(before) + len(after) + 16:x}\r\n{before}%016.6f{after}\r\n".encode()
        self.last = _event({**head, "choices": [_choice({}, "stop")]})
        spent = {**usage, "completion_tokens": chunks, "total_tokens": PROMPT_TOKENS + chunks}
        self.usage = _event({**head, "choices": [], "usage": spent})
        self.end = _chunked("data: [DONE]\n\n") + b"0\r\n\r\n"

    def chunk(self, at_s: float) -> bytes:
        """One token, sent at `at_s`."""
        return self._chunk % at_s


class _Connection(asyncio.Protocol):
    def __init__(self, answers: _Answers, loop: asyncio.AbstractEventLoop) -> None:
        self._answers = answers
        self._loop = loop
        self._received = b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._received, 0, end)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < size:
                return
            request, self._received = self._received[:size], self._received[size:]
            self._answer(request, end)

    def _answer(self, request: bytes, end: int) -> None:
        answers = self._answers
        if request.startswith(b"GET /v1/models "):
            self._transport.write(answers.models)
        elif not request.startswith(b"POST /v1/chat/completions "):
            self._transport.write(answers.unknown)
        elif _STREAMED.search(request, end):
            self._transport.write(answers.stream_head + answers.first)
            wants_usage = _WANTS_USAGE.search(request, end) is not None
            self._later(self._loop.time() + answers.interval_s, answers.chunks, wants_usage)
        else:
            self._transport.write(answers.whole)

    def _later(self, due_s: float, left: int, wants_usage: bool) -> None:
        self._timer = self._loop.call_at(due_s, self._continue, due_s, left, wants_usage)

    def _continue(self, due_s: float, left: int, wants_usage: bool) -> None:
        """Send a token, and the next one an interval after this one was due: a late one delays none."""
        answers = self._answers
        if left:
            self._transport.write(answers.chunk(time.monotonic()))
            self._later(due_s + answers.interval_s, left - 1, wants_usage)
        else:
            self._transport.write(answers.last + (answers.usage if wants_usage else b"") + answers.end)


def _choice(delta: dict[str, str], reason: str | None = None) -> dict[str, object]:
    return {"index": 0, "delta": delta, "finish_reason": reason}


def _counted(status: int, content: object) -> bytes:
    body = json.dumps(content).encode()
    reason = "OK" if status == 200 else "Not Found"
    head = (
        f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _event_text(content: object) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _event(content: object) -> bytes:
    return _chunked(_event_text(content))


def _chunked(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


async def _serve(port: int, answers: _Answers) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(answers, loop), _HOST, port, backlog=1024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(int(sys.argv[1]), _Answers(int(sys.argv[2]), float(sys.argv[3]))))

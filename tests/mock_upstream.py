"""A scripted OpenAI- and Anthropic-compatible server in the running loop: answers and faults on demand.

    async with MockUpstream() as mock:
        mock.scripts.append(Script(status=429, headers={"retry-after": "2"}))  # the next request
        mock.default = Script(text="always this")                             # all others; or a function
        ... BackendSettings(url=mock.url) ...                                 # mock.url ends in /v1
        assert mock.requests[0].body["model"] == "m"

A token of an answer is a word with the white space before it; a token of a prompt is a word.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

from aiohttp import web

Fault = Literal["reset", "hang", "broken_sse", "broken_json", "close", "hang_midway", "error_event"]
"""reset: the connection is lost before an answer. hang: no answer ever. broken_sse, broken_json: bytes that
are neither, after `fault_after` tokens. close: the connection is lost there. hang_midway: silence from there
on. error_event: an error of the API inside the stream, there."""


@dataclass(frozen=True, slots=True)
class Script:
    """What one request gets. `text` None echoes the last user message (or the prompt). `usage` None is
    counted, False left out. `tool_calls` are (id, name, arguments). `raw` is sent as it is, as an event
    stream. `drip_bytes`: so many bytes at a time, `token_delay_s` between them."""

    text: str | None = None
    reasoning: str = ""
    tool_calls: tuple[tuple[str, str, str], ...] = ()
    finish_reason: str | None = None
    cached_tokens: int = 0
    usage: Mapping[str, Any] | Literal[False] | None = None
    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    first_delay_s: float = 0.0
    token_delay_s: float = 0.0
    drip_bytes: int = 0
    fault: Fault | None = None
    fault_after: int = 0
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request as it came; names of headers in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


class _Lost(Exception):
    """The script wants the connection gone."""


class MockUpstream:
    """`requests` holds the POSTs (the last `keep`), `probes` counts GETs by path, `disconnects` clients that
    left before their answer was complete, `connections` those opened in all.
    `model_list` is what /v1/models says, `model_list_status` its status."""

    def __init__(self, *models: str, keep: int = 1000, port: int = 0) -> None:
        self.scripts: deque[Script] = deque()
        self.default: Script | Callable[[Recorded], Script] = Script()
        self.requests: deque[Recorded] = deque(maxlen=keep)
        self.probes: Counter[str] = Counter()
        self.model_list: list[dict[str, Any]] = [
            {
                "id": model,
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "mock",
                "max_model_len": 4096,
            }
            for model in models or ("m",)
        ]
        self.model_list_status = 200
        self.served = self.disconnects = self.running = 0
        self._peers: set[tuple[str, int]] = set()
        self.changed = asyncio.Condition()
        self.port = port
        self._runner: web.AppRunner | None = None

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    @property
    def connections(self) -> int:
        return len(self._peers)

    async def start(self) -> None:
        """Listen; on the same port as before, if there was one."""
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/{path:.*}", self._probe)
        app.router.add_post("/{path:.*}", self._post)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        await web.SockSite(self._runner, listener).start()

    async def stop(self) -> None:
        """Close the port and all connections. Idempotent."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def until(self, holds: Callable[[MockUpstream], bool], *, within_s: float = 20.0) -> None:
        """Wait until something is so: `await mock.until(lambda m: m.disconnects == 1)`."""
        async with asyncio.timeout(within_s), self.changed:
            await self.changed.wait_for(lambda: holds(self))

    async def _probe(self, request: web.Request) -> web.StreamResponse:
        self.probes[request.path] += 1
        self._peer(request)
        if request.path == "/v1/models":
            return web.json_response(
                {"object": "list", "data": self.model_list}, status=self.model_list_status
            )
        return web.json_response({"status": "ok"})

    async def _post(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        headers = {name.lower(): value for name, value in request.headers.items()}
        recorded = Recorded("POST", request.path, headers, json.loads(text) if text else None)
        self.requests.append(recorded)
        self._peer(request)
        script = self.scripts.popleft() if self.scripts else self.default
        script = script if isinstance(script, Script) else script(recorded)
        await self._count(running=1)
        try:
            answer = await _Answer(request, recorded, script).send()
        except (asyncio.CancelledError, ConnectionError):
            self.disconnects += 1
            raise
        except _Lost:
            return _gone(request)
        else:
            self.served += 1
            return answer
        finally:
            await asyncio.shield(self._count(running=-1))

    def _peer(self, request: web.Request) -> None:
        if request.transport is not None:
            self._peers.add(request.transport.get_extra_info("peername"))

    async def _count(self, *, running: int) -> None:
        self.running += running
        async with self.changed:
            self.changed.notify_all()


class _Answer:
    """One answer, as its script says."""

    def __init__(self, request: web.Request, recorded: Recorded, script: Script) -> None:
        self.request, self.path, self.body, self.script = request, recorded.path, recorded.body, script
        self.prompt = _prompt_of(self.body)
        self.text = self.prompt.rsplit("\n", 1)[-1] if script.text is None else script.text
        self.words = re.findall(r"\s*\S+|\s+$", self.text)
        self.model = self.body.get("model", "m")

    async def send(self) -> web.StreamResponse:
        script = self.script
        await asyncio.sleep(script.first_delay_s)
        if script.fault == "reset":
            raise _Lost
        if script.fault == "hang":
            await asyncio.Event().wait()
        if script.status != 200 or script.body is not None:
            return self._plain(script.body if script.body is not None else {"error": {"message": "scripted"}})
        if (extra := self._beside_generation()) is not None:
            return self._plain(extra)
        if script.raw is not None or self.body.get("stream"):
            return await self._stream()
        await asyncio.sleep(script.token_delay_s * len(self.words))
        if script.fault == "close":
            response = await self._begin({"content-length": "1000"}, "application/json")
            await response.write(b'{"id": ')
            raise _Lost
        broken = script.fault in ("broken_json", "broken_sse")
        whole = self._message() if self._is_anthropic else self._completion()
        return self._plain(b'{"id": "x", "choices": [' if broken else whole)

    def _beside_generation(self) -> dict[str, Any] | None:
        """The answers of what is no generation."""
        if self.path.endswith("/embeddings"):
            return self._embeddings()
        if self.path.endswith("/tokenize"):
            tokens = list(self.prompt.encode())
            return {"tokens": tokens, "count": len(tokens), "max_model_len": 4096}
        if self.path.endswith("/apply-template"):
            return {"prompt": self.prompt}
        return None

    @property
    def _is_anthropic(self) -> bool:
        return self.path.endswith("/messages")

    def _plain(self, body: Any) -> web.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(
            body=data, status=self.script.status, headers=self.script.headers, content_type="application/json"
        )

    async def _begin(self, headers: Mapping[str, str], content_type: str) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={**headers, **self.script.headers, "content-type": content_type}
        )
        await response.prepare(self.request)
        return response

    async def _stream(self) -> web.StreamResponse:
        script = self.script
        response = await self._begin({}, "text/event-stream")
        if script.raw is not None:
            await self._write(response, script.raw)
        else:
            async for event in self._events():
                await self._write(response, event)
        await response.write_eof()
        return response

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        size = self.script.drip_bytes or len(data) or 1
        for start in range(0, len(data), size):
            if self.script.drip_bytes:
                await asyncio.sleep(self.script.token_delay_s)
            await response.write(data[start : start + size])

    async def _events(self) -> AsyncIterator[bytes]:
        opening, closing = self._message_frames() if self._is_anthropic else self._completion_frames()
        for event in opening:
            yield event
        for index, word in enumerate(self.words):
            if self.script.fault and index >= self.script.fault_after:
                break
            if not self.script.drip_bytes:
                await asyncio.sleep(self.script.token_delay_s)
            yield self._word(word)
        match self.script.fault:
            case "close":
                raise _Lost
            case "hang_midway":
                await asyncio.Event().wait()
            case "broken_json":
                yield b'data: {"choices": [{\n\n'
            case "broken_sse":
                yield b"<html>this is no event stream\xff\xfe</html>\n\n"
            case "error_event":
                yield self._error_event()
            case _:
                for event in closing:
                    yield event

    def _error_event(self) -> bytes:
        if self._is_anthropic:
            error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
            return _named("error", error)
        return _data({"error": {"message": "the engine is gone", "type": "server_error", "code": 500}})

    def _word(self, word: str) -> bytes:
        if self._is_anthropic:
            delta = {"type": "text_delta", "text": word}
            return _named("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta})
        return self._chunk({"content": word})

    # -- OpenAI

    def _usage(self) -> dict[str, Any] | None:
        if self.script.usage is False:
            return None
        if self.script.usage is not None:
            return dict(self.script.usage)
        prompt, written = len(self.prompt.split()), len(self.words)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": self.script.cached_tokens},
        }

    def _calls(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "id": id_,
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for index, (id_, name, arguments) in enumerate(self.script.tool_calls)
        ]

    def _reason(self, tools: str, plain: str) -> str:
        return self.script.finish_reason or (tools if self.script.tool_calls else plain)

    def _completion(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index in range(self.body.get("n") or 1):
            choice: dict[str, Any] = {"index": index, "finish_reason": self._reason("tool_calls", "stop")}
            if self.path.endswith("/chat/completions"):
                message: dict[str, Any] = {"role": "assistant", "content": self.text}
                if self.script.tool_calls:
                    message["tool_calls"] = self._calls()
                if self.script.reasoning:
                    message["reasoning_content"] = self.script.reasoning
                choice["message"] = message
            else:
                choice["text"] = self.text
            choices.append(choice)
        kind = "chat.completion" if self.path.endswith("/chat/completions") else "text_completion"
        head = {"id": "cmpl-1", "object": kind, "created": 1_700_000_000, "model": self.model}
        usage = self._usage()
        return {**head, "choices": choices, **({} if usage is None else {"usage": usage})}

    def _completion_frames(self) -> tuple[list[bytes], list[bytes]]:
        opening = [self._chunk({"role": "assistant", "content": ""})]
        if self.script.reasoning:
            opening.append(self._chunk({"reasoning_content": self.script.reasoning}))
        closing = [self._chunk({"tool_calls": [call]}) for call in self._calls()]
        closing.append(self._chunk({}, self._reason("tool_calls", "stop")))
        usage = self._usage()
        if usage is not None and self.body.get("stream_options") == {"include_usage": True}:
            closing.append(_data({**self._chunk_head(), "choices": [], "usage": usage}))
        return opening, [*closing, b"data: [DONE]\n\n"]

    def _chunk_head(self) -> dict[str, Any]:
        return {"id": "c-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": self.model}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        if self.path.endswith("/chat/completions"):
            choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": reason}
        else:
            choice = {"index": 0, "text": delta.get("content", ""), "finish_reason": reason}
        return _data({**self._chunk_head(), "choices": [choice]})

    def _embeddings(self) -> dict[str, Any]:
        given: Any = self.body["input"]
        inputs = cast(list[Any], given) if isinstance(given, list) else [given]
        data: list[dict[str, Any]] = [
            {"object": "embedding", "index": index, "embedding": [float(index), 0.5]}
            for index in range(len(inputs))
        ]
        usage = {"prompt_tokens": 3 * len(inputs), "total_tokens": 3 * len(inputs)}
        return {"object": "list", "model": self.model, "data": data, "usage": usage}

    # -- Anthropic

    def _anthropic_usage(self) -> dict[str, Any]:
        if isinstance(self.script.usage, Mapping):
            return dict(self.script.usage)
        return {
            "input_tokens": max(0, len(self.prompt.split()) - self.script.cached_tokens),
            "cache_read_input_tokens": self.script.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": len(self.words),
        }

    def _blocks(self) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = [{"type": "text", "text": self.text}] if self.words else []
        for id_, name, arguments in self.script.tool_calls:
            blocks.append(
                {"type": "tool_use", "id": id_, "name": name, "input": json.loads(arguments or "{}")}
            )
        return blocks

    def _message(self) -> dict[str, Any]:
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self._blocks(),
            "stop_reason": self._reason("tool_use", "end_turn"),
            "stop_sequence": None,
            "usage": self._anthropic_usage(),
        }

    def _message_frames(self) -> tuple[list[bytes], list[bytes]]:
        usage = self._anthropic_usage()
        message: dict[str, Any] = {
            **self._message(),
            "content": [],
            "stop_reason": None,
            "usage": {**usage, "output_tokens": 1},
        }
        opening = [
            _named("message_start", {"type": "message_start", "message": message}),
            _block_start(0, {"type": "text", "text": ""}),
            _named("ping", {"type": "ping"}),
        ]
        closing = [_block_stop(0)]
        for index, (id_, name, arguments) in enumerate(self.script.tool_calls, start=1):
            delta = {"type": "input_json_delta", "partial_json": arguments}
            piece = {"type": "content_block_delta", "index": index, "delta": delta}
            closing += [
                _block_start(index, {"type": "tool_use", "id": id_, "name": name, "input": {}}),
                _named("content_block_delta", piece),
                _block_stop(index),
            ]
        end = {"stop_reason": self._reason("tool_use", "end_turn"), "stop_sequence": None}
        output = {"output_tokens": usage.get("output_tokens", 0)}
        closing.append(_named("message_delta", {"type": "message_delta", "delta": end, "usage": output}))
        return opening, [*closing, _named("message_stop", {"type": "message_stop"})]


def _gone(request: web.Request) -> web.StreamResponse:
    """The connection, reset."""
    transport = request.transport
    if transport is not None:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    raise asyncio.CancelledError


def _prompt_of(body: Any) -> str:
    """The texts of a request, a line each; the last user message is the last line."""
    if "messages" in body:
        texts = [
            _content(message.get("content")) for message in body["messages"] if message["role"] != "assistant"
        ]
        return "\n".join([*texts[:-1], texts[-1].replace("\n", " ")]) if texts else ""
    prompt = body.get("prompt", body.get("content", ""))
    return prompt if isinstance(prompt, str) else " ".join(str(token) for token in prompt)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def _data(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _named(name: str, content: Any) -> bytes:
    return b"event: " + name.encode() + b"\n" + _data(content)


def _block_start(index: int, block: dict[str, Any]) -> bytes:
    content = {"type": "content_block_start", "index": index, "content_block": block}
    return _named("content_block_start", content)


def _block_stop(index: int) -> bytes:
    return _named("content_block_stop", {"type": "content_block_stop", "index": index})

"""The client of the benchmarks: streams answers of any OpenAI-compatible server and keeps the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec

from stockpot.bench.http_stream import EventSplitter, fetch, stream
from stockpot.bench.statistics import median
from stockpot.errors import ServerUnreachable

_ERROR_SHOWN = 300


class ChatMessage(TypedDict):
    """A message as it stands in a request."""

    role: str
    content: str


class ServerTimings(msgspec.Struct, frozen=True):
    """Stockpot's own account of a request, milliseconds (see `wire.usage.Extension`)."""

    queue_ms: float
    ttft_ms: float | None
    total_ms: float
    cached_tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times are seconds from just before the connection was opened.

    `ttft_s` is when the first text arrived (the end, where none did), `arrivals_s` when each piece of text
    did. `cached_tokens` is None where the server does not say.
    """

    text: str
    ttft_s: float
    total_s: float
    arrivals_s: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    server: ServerTimings | None = None

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens the server had to compute; all of them where it does not say."""
        return self.prompt_tokens - (self.cached_tokens or 0)

    @property
    def inter_token_s(self) -> tuple[float, ...]:
        """Times between neighbouring pieces of text."""
        return tuple(b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))

    @property
    def time_per_output_token_s(self) -> float | None:
        """TPOT: mean time of the tokens after the first; None for a single one."""
        if self.completion_tokens < 2 or len(self.arrivals_s) < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.completion_tokens - 1)

    @property
    def decode_step_s(self) -> float | None:
        """The median time between tokens; None for a single one."""
        return median(self.inter_token_s) if len(self.arrivals_s) > 1 else None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _LlamaServerTimings(msgspec.Struct):
    cache_n: int | None = None


class _Chunk(msgspec.Struct):
    """What the three servers have in common, and what each adds."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    stockpot: ServerTimings | None = None
    timings: _LlamaServerTimings | None = None


class BenchClient:
    """Sends requests to one server; any number at once."""

    def __init__(self, url: str, model: str, *, monotonic: Callable[[], float] = time.perf_counter) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._monotonic = monotonic
        self._chunks = msgspec.json.Decoder(_Chunk)

    async def chat(self, messages: Sequence[ChatMessage], *, max_tokens: int) -> Answer:
        """Continue a conversation greedily by exactly `max_tokens` tokens (the end token is ignored)."""
        return await self._stream("/v1/chat/completions", {"messages": list(messages)}, max_tokens)

    async def complete(self, prompt: str, *, max_tokens: int) -> Answer:
        """Continue a text greedily by exactly `max_tokens` tokens."""
        return await self._stream("/v1/completions", {"prompt": prompt}, max_tokens)

    async def get(self, path: str) -> Any:
        """A JSON document. Raises ServerUnreachable where there is none."""
        return self._document(path, await fetch(self.url + path))

    async def post(self, path: str, content: object) -> Any:
        """The JSON answer to a JSON document. Raises ServerUnreachable where there is none."""
        return self._document(path, await fetch(self.url + path, method="POST", content=content))

    def _document(self, path: str, response: Any) -> Any:
        if response.status != 200:
            raise ServerUnreachable(
                f"{self.url}{path} answered {response.status}: {response.body[:_ERROR_SHOWN]!r}."
            )
        return msgspec.json.decode(response.body)

    async def _stream(self, path: str, prompt: dict[str, Any], max_tokens: int) -> Answer:
        content = {
            "model": self.model,
            **prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        record = _Record(self._monotonic)
        events = EventSplitter()
        failure = b""
        async with aclosing(stream(self.url + path, content=content)) as parts:
            async for status, part in parts:
                if status != 200:
                    failure = f"{status}: ".encode() + failure.partition(b": ")[2] + part
                    continue
                for event in events.feed(part):
                    if event != b"[DONE]":
                        record.take(self._chunks.decode(event), self.url + path)
        if failure:
            raise ServerUnreachable(f"{self.url}{path} answered {failure[:_ERROR_SHOWN].decode()!r}.")
        return record.answer()


class _Record:
    """The answer so far."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._start_s = monotonic()
        self._pieces: list[str] = []
        self._arrivals_s: list[float] = []
        self._usage = _Usage()
        self._server: ServerTimings | None = None
        self._cached: int | None = None

    def take(self, chunk: _Chunk, address: str) -> None:
        if chunk.error is not None:
            raise ServerUnreachable(f"{address} failed in the middle of an answer: {chunk.error}.")
        for choice in chunk.choices:
            text = choice.delta.content if choice.delta is not None else choice.text
            if text:
                self._pieces.append(text)
                self._arrivals_s.append(self._monotonic() - self._start_s)
        if chunk.usage is not None:
            self._usage = chunk.usage
            if chunk.usage.prompt_tokens_details is not None:
                self._cached = chunk.usage.prompt_tokens_details.cached_tokens
        if chunk.timings is not None and self._cached is None:
            self._cached = chunk.timings.cache_n
        self._server = chunk.stockpot or self._server

    def answer(self) -> Answer:
        total_s = self._monotonic() - self._start_s
        return Answer(
            text="".join(self._pieces),
            ttft_s=self._arrivals_s[0] if self._arrivals_s else total_s,
            total_s=total_s,
            arrivals_s=tuple(self._arrivals_s),
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=self._cached,
            completion_tokens=self._usage.completion_tokens,
            server=self._server,
        )

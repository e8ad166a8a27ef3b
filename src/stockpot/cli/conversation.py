"""A conversation with a model, wherever it runs: behind HTTP, or in this process."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from stockpot.errors import EngineFailed, RequestError, ServerUnreachable
from stockpot.events import Completed, Delta, Finished
from stockpot.requests import ChatRequest, Generation, Message, Sampling

if TYPE_CHECKING:
    from stockpot.backends.backend import Backend


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How answers are made."""

    max_tokens: int = 512
    temperature: float = 0.7


@dataclass(frozen=True, slots=True)
class TurnFigures:
    """What an answer took. Times are seconds from the question; `ttft_s` is None where no token came."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float | None
    total_s: float

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Rate of the tokens after the first; None for less than two."""
        if self.ttft_s is None or self.completion_tokens < 2 or self.total_s <= self.ttft_s:
            return None
        return (self.completion_tokens - 1) / (self.total_s - self.ttft_s)


class ChatSource(Protocol):
    """Where answers come from. Closing the stream stops the answer."""

    model: str

    def ask(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> AsyncGenerator[str | TurnFigures, None]:
        """Pieces of the answer, then its figures, last. Raises StockpotError."""
        ...


class BackendSource:
    """A model in this process."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.model = backend.models()[0].id

    async def ask(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> AsyncGenerator[str | TurnFigures, None]:
        generation = Generation(
            model=self.model,
            request_id=uuid.uuid4().hex,
            sampling=Sampling(temperature=options.temperature),
            max_tokens=options.max_tokens,
        )
        # Backend promises an async iterator that can be closed: an async generator.
        events = cast(
            "AsyncGenerator[Any, None]", self._backend.generate(ChatRequest(generation, tuple(messages)))
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta) and event.text:
                    yield event.text
                elif isinstance(event, Finished) and event.reason == "error":
                    raise EngineFailed(f"The answer broke off: {event.detail}")
                elif isinstance(event, Completed):
                    usage, timings = event.usage, event.timings
                    yield TurnFigures(
                        usage.prompt_tokens,
                        usage.cached_total,
                        usage.completion_tokens,
                        timings.ttft_s,
                        timings.total_s,
                    )


class HttpSource:
    """A server with the OpenAI wire. Times are taken here, so the network is in them."""

    def __init__(self, url: str, model: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._endpoint = f"{api_root(url)}/v1/chat/completions"
        self._monotonic = monotonic
        self.model = model

    async def ask(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> AsyncGenerator[str | TurnFigures, None]:
        import httpx2

        content = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start_s = self._monotonic()
        ttft_s: float | None = None
        usage = _Usage()
        timeout = httpx2.Timeout(30.0, read=None)  # the first token may take as long as the queue is
        try:
            async with (
                httpx2.AsyncClient(timeout=timeout) as client,
                client.stream("POST", self._endpoint, json=content) as response,
            ):
                if response.is_error:
                    raise _refusal(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    chunk = _chunk(line)
                    usage = chunk.usage or usage
                    if chunk.text:
                        ttft_s = ttft_s or self._monotonic() - start_s
                        yield chunk.text
        except httpx2.HTTPError as error:
            raise ServerUnreachable(
                f"{self._endpoint} broke off ({error}). Is the server still running?"
            ) from error
        details = usage.prompt_tokens_details or _PromptDetails()
        yield TurnFigures(
            usage.prompt_tokens,
            details.cached_tokens or 0,
            usage.completion_tokens,
            ttft_s,
            self._monotonic() - start_s,
        )


class Conversation:
    """Messages so far, and a source that continues them.

    A question whose answer was stopped or broke off stays, with the part that was shown; one without any
    text in answer is taken back, so that it can be asked again.
    """

    def __init__(self, source: ChatSource, options: ChatOptions, *, system: str | None = None) -> None:
        self.source = source
        self.options = options
        self.turns: list[TurnFigures] = []
        self._system = system
        self._messages: list[Message] = []
        self.clear()

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(self._messages)

    def clear(self) -> None:
        """Begin anew, with the same system prompt."""
        self._messages = [] if self._system is None else [Message("system", self._system)]
        self.turns = []

    async def ask(self, question: str) -> AsyncGenerator[str, None]:
        """The answer, piece by piece; its figures are then the last of `turns`."""
        self._messages.append(Message("user", question))
        pieces: list[str] = []
        try:
            async with aclosing(self.source.ask(self.messages, self.options)) as answer:
                async for part in answer:
                    if isinstance(part, str):
                        pieces.append(part)
                        yield part
                    else:
                        self.turns.append(part)
        finally:
            if pieces:
                self._messages.append(Message("assistant", "".join(pieces)))
            else:
                self._messages.pop()


def api_root(url: str) -> str:
    """The server's address without /v1, which people copy along."""
    return url.rstrip("/").removesuffix("/v1")


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _ErrorBody(msgspec.Struct):
    message: str = "no reason given"


class _Chunk(msgspec.Struct):
    """One event of a stream, or the body of a refusal."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _ErrorBody | None = None

    @property
    def text(self) -> str:
        return "".join(choice.delta.content or "" for choice in self.choices if choice.delta)


def _chunk(line: str) -> _Chunk:
    """The JSON of an event line; empty for other lines. Raises ServerUnreachable for an error in it."""
    if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
        return _Chunk()
    try:
        chunk = msgspec.json.decode(data, type=_Chunk)
    except msgspec.MsgspecError as error:
        raise ServerUnreachable(f"The server sent no chunk of an answer: {data[:100]!r}.") from error
    if chunk.error is not None:
        raise ServerUnreachable(f"The server ended the answer: {chunk.error.message}")
    return chunk


def _refusal(status: int, body: bytes) -> RequestError:
    """What the server says is wrong with the request."""
    message = body[:200].decode(errors="replace")
    with suppress(msgspec.MsgspecError):
        error = msgspec.json.decode(body, type=_Chunk).error
        message = message if error is None else error.message
    return RequestError(f"The server refuses ({status}): {message}")

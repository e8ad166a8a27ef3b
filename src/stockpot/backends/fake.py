"""A backend without a model: deterministic answers made from the prompt, with every outcome on demand.

Good enough to test all that stands above the seam: order of events, limits, queueing, deadlines, stop
strings, log probabilities, cancellation, draining. A token of the prompt is one byte of its UTF-8 text; a
token of the answer is a word with the white space behind it.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for

from stockpot.backends.backend import Backend, Health, ModelCard
from stockpot.backends.refusals import refuse_extras, refuse_tools_and_parts
from stockpot.engine.reports import EngineStats
from stockpot.errors import (
    ContextLengthExceeded,
    EngineFailed,
    QueueFull,
    RequestError,
    ShuttingDown,
    UnknownModel,
)
from stockpot.events import (
    CacheTier,
    Completed,
    Delta,
    Event,
    Finished,
    FinishReason,
    Progress,
    Queued,
    Started,
    Timings,
    TokenDetail,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from stockpot.requests import ChatRequest, CompletionRequest, Generation, Tool

_VOCABULARY_SIZE = 50_000
_ARGUMENTS = ('{"city":', ' "Paris"}')


@dataclass(frozen=True, slots=True)
class FakeBehaviour:
    """What the fake does. `fail_after_tokens` k: the engine fails when token k of an answer is due (0: before
    the first); `error_after_tokens` k: the choice ends there with reason `error`. `prefill_steps` k: the
    prefill is told in k steps. `accepts_all`: as a remote backend it takes tools, parts that are not text and
    fields it does not know; a tool is called, always with the same arguments, where the request demands it.
    """

    model: str = "fake"
    context_tokens: int = 4096
    max_running: int = 4
    queue_limit: int = 8
    prefill_delay_s: float = 0.0
    prefill_steps: int = 0
    accepts_all: bool = False
    token_delay_s: float = 0.0
    fail_after_tokens: int | None = None
    error_after_tokens: int | None = None


class FakeBackend(Backend):
    """Echoes; `cancelled` counts requests closed before their end, `running` those that hold a place."""

    def __init__(self, behaviour: FakeBehaviour | None = None) -> None:
        self.behaviour = behaviour = behaviour or FakeBehaviour()
        self.cancelled = 0
        self.running = 0
        self._in_flight = 0
        self._slots = asyncio.Semaphore(behaviour.max_running)
        self._idle = asyncio.Event()
        self._idle.set()
        self._abort = asyncio.Event()
        self._accepts = False
        self._remembered: deque[Sequence[int]] = deque(maxlen=16)
        self._steps = self._computed = self._cached = self._generated = 0

    @property
    def waiting(self) -> int:
        """Requests without a place yet."""
        return self._in_flight - self.running

    async def start(self) -> None:
        self._accepts = True

    async def stop(self, *, drain: bool) -> None:
        self._accepts = False
        if not drain:
            self._abort.set()
        await self._idle.wait()

    def models(self) -> tuple[ModelCard, ...]:
        return (
            ModelCard(self.behaviour.model, 1_700_000_000, "stockpot", self.behaviour.context_tokens, {}),
        )

    def health(self) -> Health:
        return Health(True) if self._accepts else Health(False, "The fake backend is not running.")

    def cache_stats(self) -> Mapping[str, Any]:
        stats = self.engine_stats()
        return {**asdict(stats), "hit_ratio": stats.hit_ratio}

    def engine_stats(self) -> EngineStats:
        """A snapshot in the shape the engine's has."""
        return EngineStats(
            running=self.running,
            waiting=self.waiting,
            joining=0,
            preempted=0,
            steps=self._steps,
            cells=self.behaviour.context_tokens,
            cells_used=0,
            kv_bytes_per_token=64,
            ram_capacity_bytes=2**20,
            ram_used_bytes=0,
            ram_blocks=0,
            ram_pinned_blocks=0,
            prompt_tokens_computed=self._computed,
            prompt_tokens_cached={"context": 0, "ram": self._cached},
            tokens_generated=self._generated,
            preemptions=0,
            evicted_blocks={"capacity": 0},
        )

    async def tokenize(
        self, model: str, content: str | ChatRequest, *, special: bool, tenant: str = ""
    ) -> list[int]:
        del special, tenant
        self._known(model)
        if isinstance(content, ChatRequest) and not self.behaviour.accepts_all:
            refuse_tools_and_parts(content)
        return list((content if isinstance(content, str) else _conversation(content)).encode())

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        prompt = self._admitted(request)
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        over = False
        self._in_flight += 1
        self._idle.clear()
        try:
            yield Queued(max(0, self._in_flight - self.behaviour.max_running - 1))
            async with self._slots:
                self.running += 1
                try:
                    started_s = loop.time()
                    cached = self._recall(prompt)
                    yield Started(len(prompt), cached, started_s - arrived_s)
                    for progress in self._prefill(len(prompt) - sum(cached.values())):
                        yield progress
                    await self._pause(self.behaviour.prefill_delay_s)
                    first_s: float | None = None
                    produced = 0
                    async for event in self._answer(request, prompt, arrived_s):
                        if isinstance(event, Delta):
                            first_s = first_s or loop.time()
                            produced += len(event.token_ids)
                        yield event
                finally:
                    self.running -= 1
            over = True
            ttft_s = None if first_s is None else first_s - arrived_s
            timings = Timings(started_s - arrived_s, ttft_s, loop.time() - arrived_s)
            yield Completed(Usage(len(prompt), cached, produced), timings)
        finally:
            self._in_flight -= 1
            self.cancelled += not over
            if not self._in_flight:
                self._idle.set()

    async def _answer(
        self, request: ChatRequest | CompletionRequest, prompt: Sequence[int], arrived_s: float
    ) -> AsyncGenerator[Event]:
        """The deltas of all choices in turn, word by word, and how each ends."""
        generation = request.generation
        if isinstance(request, CompletionRequest) and request.echo:
            for choice in range(generation.choices):
                yield Delta(choice, _text_of(prompt))
        if called := _demanded(request):
            for choice in range(generation.choices):
                for event in _calling(called, choice):
                    await self._pause(self.behaviour.token_delay_s)
                    yield event
            return
        words, reason = self._script(request, room=self.behaviour.context_tokens - len(prompt))
        for index, word in enumerate(words):
            if index == self.behaviour.fail_after_tokens:
                raise EngineFailed("The fake engine failed, as it was told to.")
            if index == self.behaviour.error_after_tokens:
                reason = "error"
                break
            await self._pause(self.behaviour.token_delay_s)
            if ended := self._ended_early(generation, arrived_s):
                reason = ended
                break
            self._steps += 1
            for choice in range(generation.choices):
                self._generated += 1
                details = () if generation.logprobs is None else (_detail(word, generation.logprobs),)
                yield Delta(choice, word, (_token(word),), details)
        detail = "The fake choice failed, as it was told to." if reason == "error" else None
        for choice in range(generation.choices):
            yield Finished(choice, reason, detail)

    def _script(
        self, request: ChatRequest | CompletionRequest, *, room: int
    ) -> tuple[list[str], FinishReason]:
        """The words of the answer and why it ends."""
        generation = request.generation
        limit = min(generation.max_tokens or room, room)
        if generation.output_format.kind != "text":
            text = "{}"
        elif isinstance(request, ChatRequest):
            text = f"You said: {request.messages[-1].content}"
        else:
            text = f" and so on, {request.generation.sampling.seed or 0}"
        cuts = [text.find(stop) for stop in generation.stop if stop in text]
        if cuts:
            text = text[: min(cuts)]
        words = re.findall(r"\s*\S+\s*", text)
        if generation.ignore_eos and words:
            words = [words[index % len(words)] for index in range(limit)]
        return (words[:limit], "length") if len(words) >= limit else (words, "stop")

    def _ended_early(self, generation: Generation, arrived_s: float) -> FinishReason | None:
        if self._abort.is_set():
            return "cancelled"
        elapsed_s = asyncio.get_running_loop().time() - arrived_s
        if generation.deadline_s is not None and elapsed_s > generation.deadline_s:
            return "deadline"
        return None

    def _admitted(self, request: ChatRequest | CompletionRequest) -> Sequence[int]:
        """The prompt's tokens, of a request that may come in."""
        generation = request.generation
        self._known(generation.model)
        if not self.behaviour.accepts_all:
            refuse_extras(request)
            refuse_tools_and_parts(request)
        if not self._accepts:
            raise ShuttingDown("The server is shutting down; try another.", retry_after_s=5.0)
        _check_schema(generation)
        if isinstance(request, ChatRequest):
            prompt: Sequence[int] = _conversation(request).encode()
        else:
            prompt = request.prompt.encode() if isinstance(request.prompt, str) else request.prompt
        if len(prompt) >= self.behaviour.context_tokens:
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens; the context holds {self.behaviour.context_tokens}."
                " Shorten it.",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
            )
        if self._in_flight >= self.behaviour.max_running + self.behaviour.queue_limit:
            raise QueueFull(
                f"{self.waiting} requests wait already, which is the bound; try again later.",
                retry_after_s=1.5,
            )
        return prompt

    def _known(self, model: str) -> None:
        if model != self.behaviour.model:
            raise UnknownModel(
                f"The model {model!r} is not served here; {self.behaviour.model!r} is.", param="model"
            )

    def _recall(self, prompt: Sequence[int]) -> dict[CacheTier, int]:
        """Tokens this prompt has in common with an earlier one, all but the last at most."""
        best = max((_common(prompt, other) for other in self._remembered), default=0)
        best = min(best, len(prompt) - 1)
        self._remembered.append(prompt)
        self._cached += best
        self._computed += len(prompt) - best
        return {"context": 0, "ram": best}

    def _prefill(self, tokens: int) -> Iterator[Progress]:
        """The steps of a prefill of so many tokens."""
        steps = self.behaviour.prefill_steps
        return (Progress(tokens * step // steps, tokens) for step in range(1, steps + 1))

    async def _pause(self, seconds: float) -> None:
        """Wait as a model would; an abort cuts it short. Always lets others run."""
        await asyncio.sleep(0)
        if seconds:
            try:
                await asyncio.wait_for(self._abort.wait(), seconds)
            except TimeoutError:
                return


def _conversation(request: ChatRequest) -> str:
    return "".join(f"<{message.role}>{message.content}\n" for message in request.messages)


def _demanded(request: ChatRequest | CompletionRequest) -> Tool | None:
    """The tool that must be called."""
    if isinstance(request, CompletionRequest) or request.tool_choice is None:
        return None
    choice = request.tool_choice
    named = (tool for tool in request.tools if choice.mode == "required" or tool.name == choice.name)
    return next(named, None) if choice.mode in ("required", "named") else None


def _calling(tool: Tool, choice: int) -> Iterator[Delta | Finished]:
    """A call, in the pieces servers tell it in: first whose, then the arguments bit by bit."""
    yield Delta(choice, "", (_token(tool.name),), tool_calls=(ToolCallDelta(0, f"call_{choice}", tool.name),))
    for piece in _ARGUMENTS:
        call = ToolCallDelta(0, arguments=piece)
        yield Delta(choice, "", (_token(piece),), tool_calls=(call,))
    yield Finished(choice, "tool_calls")


def _text_of(tokens: Sequence[int]) -> str:
    return bytes(token % 256 for token in tokens).decode(errors="replace")


def _token(text: str) -> int:
    return zlib.crc32(text.encode()) % _VOCABULARY_SIZE


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def _detail(word: str, top: int) -> TokenDetail:
    """The word with probability near one half, and alternatives each half as likely as the one before."""
    ranked = [TokenLogprob(_token(word), word.encode(), -0.7)]
    ranked += [TokenLogprob(rank, b"w%d" % rank, -0.7 * (rank + 1)) for rank in range(1, top)]
    return TokenDetail(ranked[0], tuple(ranked[:top]))


def _check_schema(generation: Generation) -> None:
    schema: Any = generation.output_format.schema
    if generation.output_format.kind != "json_schema" or schema is None:
        return
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise RequestError(
            f"The schema is not a JSON schema: {error.message}. Correct it.",
            param="response_format.json_schema.schema",
            code="invalid_schema",
        ) from error

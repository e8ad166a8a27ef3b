"""The backend in this process: conversations become tokens here, the engine's events come back here.

The event loop never waits for the engine: commands are queued, a step's events arrive in one call per step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from stockpot.backends.backend import Backend, Health, ModelCard
from stockpot.backends.prompt_encoder import PromptEncoder, TokenIds
from stockpot.clock import Clock, SystemClock
from stockpot.engine.chat_template import ChatTemplate, PromptPart
from stockpot.engine.constraint import ConstraintFactory
from stockpot.engine.control_tokens import control_spellings
from stockpot.engine.core import EngineLimits
from stockpot.engine.driver import Driver
from stockpot.engine.driver_thread import DriverThread
from stockpot.engine.engine import Engine
from stockpot.engine.reports import EngineStats, Observer, RefusalReport
from stockpot.engine.sequence import Task
from stockpot.errors import DeadlineExceeded, RequestError, UnknownModel
from stockpot.events import Completed, Delta, Event, Finished, Started
from stockpot.requests import ChatRequest, CompletionRequest

_ENCODED_TEXT_BYTES = 4 * 2**20
"""For pieces of prompts and their token ids: some 15 prompts of 32,768 tokens, or 5,000 short messages."""

_CONTENT_LIMIT_FACTOR = 64
"""A text of more characters than this per token of context cannot fit (the longest tokens are a few dozen
characters), so it is refused without the cost of tokenising it."""


class EmbeddedBackend(Backend):
    """One model on one engine.

    `thread` is the one the driver was opened on; `close` frees the driver there.
    `served_name` is the model's id in /v1/models; `details` are shown there too.
    """

    def __init__(
        self,
        driver: Driver,
        limits: EngineLimits,
        *,
        served_name: str,
        details: Mapping[str, Any] | None = None,
        observers: Iterable[Observer] = (),
        clock: Clock | None = None,
        thread: DriverThread | None = None,
    ) -> None:
        self._driver = driver
        self._thread = thread or DriverThread()
        self._limits = limits
        self._served_name = served_name
        self._details = dict(details or {})
        self._observers = tuple(observers)
        self._clock = clock or SystemClock()
        vocabulary = driver.vocabulary
        spelling = _speller(driver)
        controls = tuple(control_spellings(vocabulary).values())
        self._template = ChatTemplate(
            driver.facts.chat_template,
            begin=spelling(vocabulary.begin_token),
            end=spelling(vocabulary.end_token),
            clock=self._clock,
            control_spellings=controls,
        )
        written = [control for control in controls if control in self._template.source]
        self._encoder = PromptEncoder(vocabulary, written, capacity_bytes=_ENCODED_TEXT_BYTES)
        self._constraints = ConstraintFactory(vocabulary)
        self._created = int(time.time())
        self._inboxes: dict[Task, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = Engine(
            self._driver,
            self._limits,
            sink=self._sink,
            observers=self._observers,
            clock=self._clock,
            thread=self._thread,
        )
        self._engine.start()

    async def stop(self, *, drain: bool) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, drain=drain)

    def close(self) -> None:
        """Free the model. Only after `stop`."""
        self._thread.call(self._driver.close)
        self._thread.close()

    def models(self) -> tuple[ModelCard, ...]:
        context = self._running_engine.max_request_tokens if self._engine else self._driver.cells
        return (ModelCard(self._served_name, self._created, "stockpot", context, self._details),)

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        engine, wanted = self._running_engine, request.generation
        try:
            task = await self._submit(request)
        except RequestError as error:
            for observer in self._observers:
                observer.observe(RefusalReport(error.code))
            raise
        inbox: asyncio.Queue[Event] = asyncio.Queue()  # bounded by max_tokens: a delta a token
        # Registered in the same turn of the loop as the submission: its events are handed out in later ones.
        self._inboxes[task] = inbox
        answered = completed = False
        try:
            while not completed:
                event = await inbox.get()
                if isinstance(event, Finished) and event.reason == "deadline" and not answered:
                    raise DeadlineExceeded(
                        f"The deadline of {wanted.deadline_s:g} s passed before the first token. "
                        "Allow more time, or try again when the server is less busy."
                    )
                answered = answered or isinstance(event, Delta)
                completed = isinstance(event, Completed)
                yield event
                if isinstance(event, Started) and isinstance(request, CompletionRequest) and request.echo:
                    text = self._prompt_text(request)
                    for choice in range(wanted.choices):
                        yield Delta(choice, text)
        finally:
            del self._inboxes[task]
            if not completed:
                engine.cancel(task)

    async def _submit(self, request: ChatRequest | CompletionRequest) -> Task:
        """Everything that may refuse a request. Does not wait after the engine has it."""
        wanted = request.generation
        self._check_model(wanted.model)
        prompt = await self._encode(request)
        constraint = None
        if wanted.output_format.kind != "text":
            constraint = await asyncio.to_thread(self._constraints.compile, wanted.output_format)
        return self._running_engine.submit(prompt, wanted, constraint)

    async def tokenize(self, model: str, content: str | ChatRequest, *, special: bool) -> list[int]:
        self._check_model(model)
        if isinstance(content, ChatRequest):
            return (await self._encode(content)).tolist()
        return (await self._encode_text(content, special=special)).tolist()

    def health(self) -> Health:
        if self._engine is None:
            return Health(False, "the model is being loaded")
        if self._engine.state == "running":
            return Health(True)
        return Health(False, self._engine.failure or f"the engine is {self._engine.state}")

    def engine_stats(self) -> EngineStats:
        """A snapshot of the engine's counts."""
        return self._running_engine.stats()

    def cache_stats(self) -> Mapping[str, Any]:
        stats = self.engine_stats()
        return {
            **asdict(stats),
            "hit_ratio": stats.hit_ratio,
            "block_tokens": self._limits.block_tokens,
            "cache_enabled": self._limits.cache_enabled,
            "model": self._served_name,
            "kv_bytes_used": stats.cells_used * stats.kv_bytes_per_token,
        }

    @property
    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the backend is used before it was started")
        return self._engine

    def _check_model(self, model: str) -> None:
        if model != self._served_name:
            raise UnknownModel(
                f"The model {model!r} is not served here; this server has {self._served_name!r}.",
                param="model",
            )

    async def _encode(self, request: ChatRequest | CompletionRequest) -> TokenIds:
        """The prompt's token ids."""
        if isinstance(request, ChatRequest):
            self._check_size(sum(len(message.content) for message in request.messages), "messages")
            return await self._encode_parts(
                self._template.render_parts(request.messages, request.template_arguments)
            )
        prompt = request.prompt
        if not isinstance(prompt, str):
            return np.array(self._checked_tokens(prompt), np.int32)
        self._check_size(len(prompt), "prompt")
        return await self._encode_text(prompt, special=True)

    async def _encode_text(self, text: str, *, special: bool) -> TokenIds:
        """A text without a template; `special`: with the begin token, and control tokens are recognised."""
        begin = self._driver.vocabulary.encode("", special=special, add_begin=special)
        tokens = await self._encode_parts([PromptPart(text, literal=not special)])
        return np.concatenate((np.array(begin, np.int32), tokens))

    async def _encode_parts(self, parts: Sequence[PromptPart]) -> TokenIds:
        """At once where that is quick; otherwise in a thread, so that no other request waits."""
        pieces = self._encoder.pieces(parts)
        if self._encoder.is_quick(pieces):
            return self._encoder.encode(pieces)
        return await asyncio.to_thread(self._encoder.encode, pieces)

    def _prompt_text(self, request: CompletionRequest) -> str:
        if isinstance(request.prompt, str):
            return request.prompt
        piece = self._driver.vocabulary.piece
        return b"".join(piece(token, special=True) for token in request.prompt).decode(errors="replace")

    def _check_size(self, characters: int, param: str) -> None:
        limit = self._running_engine.max_request_tokens
        if characters > limit * _CONTENT_LIMIT_FACTOR:
            raise RequestError(
                f"The prompt has {characters} characters, far more than the {limit} tokens of this context "
                "can hold. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )

    def _checked_tokens(self, tokens: Sequence[int]) -> list[int]:
        size = self._driver.vocabulary.size
        for place, token in enumerate(tokens):
            if not 0 <= token < size:
                raise RequestError(
                    f"prompt[{place}] is {token}; this model's token ids are 0 to {size - 1}.",
                    param=f"prompt[{place}]",
                )
        return list(tokens)

    def _sink(self, events: list[tuple[Task, Event]]) -> None:
        """From the engine's thread (or ours, for `Queued`) to the loop, one call a step."""
        if self._loop is None or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: list[tuple[Task, Event]]) -> None:
        for task, event in events:
            inbox = self._inboxes.get(task)
            if inbox is not None:
                inbox.put_nowait(event)


def _speller(driver: Driver) -> Callable[[int | None], str]:
    def spell(token: int | None) -> str:
        return "" if token is None else driver.vocabulary.piece(token, special=True).decode(errors="replace")

    return spell

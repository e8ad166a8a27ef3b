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
from stockpot.backends.cache_admin import CacheAdmin
from stockpot.backends.embedded_cache import EmbeddedCacheAdmin, EngineHost
from stockpot.backends.prompt_boundaries import (
    BoundedPrompt,
    chat_prompt,
    shared_tokens,
    text_prompt,
    token_boundaries,
)
from stockpot.backends.prompt_encoder import PromptEncoder, TokenIds
from stockpot.backends.refusals import refuse_extras, refuse_tools_and_parts
from stockpot.clock import Clock, SystemClock
from stockpot.engine.chat_template import ChatTemplate
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
from stockpot.kv.promises import Labels, Promise
from stockpot.kv.service import CacheService
from stockpot.requests import CacheBoundary, ChatRequest, CompletionRequest, TokenBoundary

BoundedTokens = tuple[TokenIds, tuple[TokenBoundary, ...]]
_ENCODED_TEXT_BYTES = 4 * 2**20
"""For pieces of prompts and their token ids: some 15 prompts of 32,768 tokens, or 5,000 short messages."""

_CONTENT_LIMIT_FACTOR = 64
"""A text of more characters than this per token of context cannot fit (the longest tokens are a few dozen
characters), so it is refused without the cost of tokenising it."""


class EmbeddedBackend(Backend):
    """One model on one engine.

    `thread` is the one the driver was opened on; `close` frees the driver there. `cache` is started and
    closed with the backend; None is RAM alone.
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
        cache: CacheService | None = None,
    ) -> None:
        self._driver = driver
        self._cache = cache
        self._admin: CacheAdmin | None = None
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
            cache=self._cache.cache if self._cache is not None else None,
        )
        self._engine.start()
        if self._cache is not None:
            host = EngineHost(self._engine)
            await asyncio.to_thread(self._cache.start, host)
            self._admin = EmbeddedCacheAdmin(
                self,
                self._engine,
                host,
                self._cache,
                self._driver.vocabulary,
                encode=self._encode_prefix,
                model=self._served_name,
            )

    async def stop(self, *, drain: bool) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, drain=drain)
        if self._cache is not None:
            await asyncio.to_thread(self._cache.close)

    def cache_admin(self) -> CacheAdmin | None:
        return self._admin

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
        refuse_extras(request)
        prompt, boundaries = await self._encode(request)
        constraint = None
        if wanted.output_format.kind != "text":
            constraint = await asyncio.to_thread(self._constraints.compile, wanted.output_format)
        labels = Labels(
            tenant=wanted.tenant,
            request=wanted.request_id,
            shared_tokens=shared_tokens(boundaries),
            promises=tuple(Promise(each.tokens, each.ttl_s, each.tags) for each in boundaries),
        )
        return self._running_engine.submit(prompt, wanted, constraint, labels)

    async def tokenize(
        self, model: str, content: str | ChatRequest, *, special: bool, tenant: str = ""
    ) -> list[int]:
        self._check_model(model)
        if isinstance(content, ChatRequest):
            tokens, _ = await self._encode(content)
        else:
            tokens, _ = await self._encode_text(content, special=special, tenant=tenant)
        return tokens.tolist()

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

    async def _encode(self, request: ChatRequest | CompletionRequest) -> BoundedTokens:
        """The prompt's token ids and its cache boundaries."""
        refuse_tools_and_parts(request)
        tenant = request.generation.tenant
        if isinstance(request, ChatRequest):
            self._check_size(sum(len(message.content) for message in request.messages), "messages")
            return await self._encode_parts(chat_prompt(self._template, self._encoder, request), tenant)
        prompt = request.prompt
        if not isinstance(prompt, str):
            tokens = np.array(self._checked_tokens(prompt), np.int32)
            return tokens, token_boundaries(len(tokens), request.boundaries)
        self._check_size(len(prompt), "prompt")
        return await self._encode_text(prompt, special=True, tenant=tenant, boundaries=request.boundaries)

    async def _encode_text(
        self, text: str, *, special: bool, tenant: str, boundaries: Sequence[CacheBoundary] = ()
    ) -> BoundedTokens:
        """A text without a template; `special`: with the begin token, and control tokens are recognised."""
        begin = self._driver.vocabulary.encode("", special=special, add_begin=special)
        prompt = text_prompt(self._encoder, text, boundaries, literal=not special)
        return await self._encode_parts(prompt, tenant, begin)

    async def _encode_parts(
        self, prompt: BoundedPrompt, tenant: str, begin: Sequence[int] = ()
    ) -> BoundedTokens:
        """At once where that is quick; otherwise in a thread, so that no other request waits."""
        if prompt.is_quick(self._encoder, tenant):
            return prompt.encode(self._encoder, tenant, begin=begin)
        return await asyncio.to_thread(prompt.encode, self._encoder, tenant, begin=begin)

    async def _encode_prefix(self, request: ChatRequest | CompletionRequest) -> TokenIds:
        """The tokens that all prompts have which begin so: of a chat, without what asks for an answer."""
        refuse_tools_and_parts(request)
        if isinstance(request, ChatRequest):
            parts = self._template.render_parts(
                request.messages, request.template_arguments, add_generation_prompt=False
            )
            prompt = BoundedPrompt(self._encoder.pieces(parts))
            return (await self._encode_parts(prompt, request.generation.tenant))[0]
        return (await self._encode(request))[0]

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

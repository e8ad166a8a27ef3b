"""What all backends behind HTTP have in common: models and health, watched; a request from call to events."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import msgspec

from stockpot.backends.backend import Backend, Health, ModelCard
from stockpot.backends.upstream import Exchange, Upstream
from stockpot.clock import Clock
from stockpot.errors import ShuttingDown, StockpotError, UnknownModel, UpstreamError
from stockpot.events import Completed, Delta, Event, Finished, Queued, Started, Timings, Usage
from stockpot.requests import ChatRequest, CompletionRequest, Generation
from stockpot.settings_gateway import BackendSettings

FAILED_PROBES_MAX = 2
"""A backend that was ready is left alone after so many probes in a row that failed: one may be bad luck."""


@dataclass(frozen=True, slots=True)
class Call:
    """What is posted, and what reads the answer."""

    url: str
    body: bytes
    parser: AnswerParser


class AnswerParser(Protocol):
    """Reads one answer of a backend as events, from Started on. Raises UpstreamError for what is no answer.

    `done`: the backend has said that nothing follows. `unfinished` are the choices whose Finished is missing.
    """

    done: bool

    def event(self, payload: bytes) -> Sequence[Event]:
        """One payload of the stream."""
        ...

    def whole(self, body: bytes) -> Sequence[Event]:
        """An answer that came in one piece."""
        ...

    def end(self) -> Sequence[Event]:
        """What is to be told after the last payload. Raises UpstreamError where the answer is cut off."""
        ...

    def unfinished(self) -> Sequence[int]: ...

    def usage(self) -> Usage:
        """What was used up to now."""
        ...


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often a backend is looked at, in seconds: when it is well, when it is not, and how long one look
    may take. Its list of models is read each `models_s`."""

    ready_s: float = 5.0
    failing_s: float = 2.0
    models_s: float = 30.0
    within_s: float = 5.0


class RemoteBackend(Backend):
    """A server at `settings.url`. Subclasses say what is posted and how answers and lists are read."""

    def __init__(
        self,
        name: str,
        settings: BackendSettings,
        *,
        clock: Clock,
        headers: Mapping[str, str],
        cadence: Cadence | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.upstream = Upstream(name, settings, clock=clock, headers=headers)
        self.root = settings.url.removesuffix("/v1")
        self._clock = clock
        self._cadence = cadence or Cadence()
        self._models: dict[str, str] = dict(settings.models)
        self._cards = tuple(self._card(public, {}) for public in settings.models)
        self._health = Health(False, f"The backend {name!r} has not been asked yet.")
        self._failed_probes = 0
        self._accepts = False
        self._aborted = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._watcher: asyncio.Task[None] | None = None

    @abstractmethod
    def call(self, request: ChatRequest | CompletionRequest, model: str) -> Call:
        """What is posted for a request; `model` is the backend's own name. Raises RequestError."""

    @abstractmethod
    def models_url(self) -> str:
        """Where the list of models is."""

    async def start(self) -> None:
        """Returns after the first look at the backend; one that is down is looked at again and again."""
        await self.upstream.open()
        self._accepts = True
        await self._probe(models=True)
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self, *, drain: bool) -> None:
        self._accepts = False
        self._health = Health(False, f"The backend {self.name!r} is stopping.")
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait((self._watcher,))
            self._watcher = None
        if not drain:
            self._aborted = True
            await self.upstream.close()
        await self._idle.wait()
        await self.upstream.close()

    def models(self) -> tuple[ModelCard, ...]:
        return self._cards

    def health(self) -> Health:
        return self._health

    def cache_stats(self) -> Mapping[str, Any]:
        return {
            "requests": self.upstream.requests,
            "running": self._in_flight,
            "failures": dict(self.upstream.failures),
        }

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        generation = request.generation
        call = self.call(request, self.upstream_model(generation.model))
        arrived_s = self._clock.monotonic()
        first_s: float | None = None
        queued = started = False
        self._begin()
        try:
            try:
                async with self.upstream.exchange(call.url, call.body, generation) as exchange:
                    queued = True
                    yield Queued(0)
                    reading = _Reading(exchange, call.parser, stream=generation.stream)
                    while (events := await reading.next()) is not None:
                        for event in events:
                            if isinstance(event, Started):
                                started = True
                            elif first_s is None and isinstance(event, Delta):
                                first_s = self._clock.monotonic()
                            yield event
            except UpstreamError as error:
                if not self._aborted:
                    raise
                if not queued:
                    raise self._stopping() from error
                if not started:
                    yield Started(0, {}, 0.0)
                for choice in call.parser.unfinished():
                    yield Finished(choice, "cancelled")
            ttft_s = None if first_s is None else first_s - arrived_s
            total_s = self._clock.monotonic() - arrived_s
            yield Completed(call.parser.usage(), Timings(0.0, ttft_s, total_s))
        finally:
            self._end()

    def upstream_model(self, public: str) -> str:
        """The backend's own name of a model. Raises UnknownModel, UpstreamError while no model is known, and
        ShuttingDown."""
        if not self._accepts:
            raise self._stopping()
        if (model := self._models.get(public)) is not None:
            return model
        if not self._models:
            raise self.upstream.fail.error(
                "connect", f"has not said which models it has. {self._health.reason}"
            )
        raise UnknownModel(f"The backend {self.name!r} does not serve the model {public!r}.", param="model")

    async def post(self, url: str, body: bytes, generation: Generation | None) -> Any:
        """Post JSON that asks for no text, and read the JSON of the answer."""
        self._begin()
        try:
            answer = await self.upstream.post(url, body, generation)
        finally:
            self._end()
        try:
            return msgspec.json.decode(answer)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self.upstream.fail.error("format", "answered with broken JSON.") from error

    def _stopping(self) -> ShuttingDown:
        return ShuttingDown(f"The backend {self.name!r} is shutting down; try again.", retry_after_s=5.0)

    def _begin(self) -> None:
        self._in_flight += 1
        self._idle.clear()

    def _end(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    # -- watching

    async def _watch(self) -> None:
        """Look at the backend again and again, and read its list of models now and then."""
        read_s = self._clock.monotonic()
        while True:
            await asyncio.sleep(self._cadence.ready_s if self._health.ready else self._cadence.failing_s)
            due = self._clock.monotonic() - read_s >= self._cadence.models_s
            if due or not self._cards:
                read_s = self._clock.monotonic()
            await self._probe(models=due or not self._cards)

    async def _probe(self, *, models: bool) -> None:
        """One look; sets health, and the cards where models are not configured."""
        path = self.settings.health_path
        try:
            if path is not None:
                url = self.root + "/" + path.lstrip("/")
                await self.upstream.get(url, within_s=self._cadence.within_s)
            if path is None or models:
                await self._read_models(needed=path is None or not self.settings.models)
        except UpstreamError as error:
            self._judge(error)
        except StockpotError as error:
            self._failed(str(error))
        else:
            self._failed_probes = 0
            if self._accepts:
                self._health = Health(True)

    async def _read_models(self, *, needed: bool) -> None:
        try:
            self._listed(await self.upstream.get(self.models_url(), within_s=self._cadence.within_s))
        except StockpotError:
            if needed:
                raise

    def _judge(self, error: UpstreamError) -> None:
        """A failed look may still show a server that works: one without a list of models, or a busy one."""
        no_list = error.upstream_status in (404, 405, 501) and self.settings.health_path is None
        if self._cards and self._accepts and (error.upstream_status == 429 or no_list):
            self._failed_probes = 0
            self._health = Health(True)
        elif no_list:
            self._failed(f"The backend {self.name!r} has no list of models; name them in its 'models'.")
        else:
            self._failed(str(error))

    def _failed(self, reason: str) -> None:
        self._failed_probes += 1
        if not self._health.ready or self._failed_probes >= FAILED_PROBES_MAX:
            self._health = Health(False, reason)

    def _listed(self, body: bytes) -> None:
        """Take over what the list of models says."""
        try:
            entries = msgspec.json.decode(body, type=_ModelList).data
        except (msgspec.DecodeError, RecursionError) as error:
            raise self.upstream.fail.error("format", "gave a list of models that cannot be read.") from error
        told = {str(entry["id"]): entry for entry in entries if "id" in entry}
        if not self.settings.models:
            self._models = {name: name for name in told}
        self._cards = tuple(
            self._card(public, told.get(upstream, {})) for public, upstream in self._models.items()
        )

    def _card(self, public: str, told: Mapping[str, Any]) -> ModelCard:
        created = told.get("created")
        return ModelCard(
            public,
            created if isinstance(created, int) else 0,
            str(told.get("owned_by", self.name)),
            self.settings.context_tokens or _context_tokens(told),
            {"backend": self.name},
        )


class _ModelList(msgspec.Struct):
    """`/models` of all APIs read here."""

    data: list[dict[str, Any]]


def _context_tokens(told: Mapping[str, Any]) -> int:
    """As vLLM and SGLang, llama-server, Stockpot and Anthropic say it; 0: not said."""
    meta: Any = told.get("meta")
    places: tuple[Any, ...] = (
        told.get("max_model_len"),
        cast(dict[str, Any], meta).get("n_ctx_train") if isinstance(meta, dict) else None,
        told.get("context_tokens"),
        told.get("max_input_tokens"),
    )
    return next((value for value in places if isinstance(value, int) and value > 0), 0)


class _Reading:
    """An answer's events, as many at a time as came together."""

    def __init__(self, exchange: Exchange, parser: AnswerParser, *, stream: bool) -> None:
        self._exchange = exchange
        self._parser = parser
        self._stream = stream
        self._over = False
        self._failure: UpstreamError | None = None

    async def next(self) -> Sequence[Event] | None:
        """None: there are no more. What came before a failure is given out before it is raised."""
        if self._failure is not None:
            raise self._failure
        if self._over:
            return None
        if not self._stream:
            self._over = True
            return self._parser.whole(await self._exchange.whole())
        parser = self._parser
        events: list[Event] = []
        try:
            for payload in await self._payloads():
                events += parser.event(payload)
                if parser.done:
                    break
        except UpstreamError as error:
            if not events:
                raise
            self._failure = error
            return events
        if parser.done:
            # Of the body at most its end is missing: the connection can be kept.
            self._exchange.complete = self._over = True
        if self._over:
            events += parser.end()
        return events

    async def _payloads(self) -> Sequence[bytes]:
        try:
            payloads = await self._exchange.payloads()
        except UpstreamError as error:
            # An answer that has all its ends is whole, however its connection went.
            if error.cause not in ("truncated", "reset") or self._parser.unfinished():
                raise
            payloads = []
        self._over = not payloads
        return payloads

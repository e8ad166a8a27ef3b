"""One attempt on one backend: its stream, what it used, and that it is over, told to all who count it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from stockpot.backends.prompt_estimate import estimated_prompt_tokens, tokens_of
from stockpot.clock import Clock
from stockpot.errors import DeadlineExceeded, FailureCause, UpstreamError, cause_of
from stockpot.events import Completed, Delta, Event, Finished, Started
from stockpot.gateway.condition import Permit
from stockpot.gateway.given_up import is_billed, output_given_up
from stockpot.gateway.journey import Journey
from stockpot.gateway.spans import RequestSpan
from stockpot.records import Attempt
from stockpot.requests import AnyRequest, Embeddings, GenerationRequest

Item = Event | Embeddings
"""What comes of an attempt: events, or the one answer of an embedding."""

_PROMPT_TOKENS_PER_UNIT = 1000
_OUTPUT_TOKENS_PER_UNIT = 20
"""A unit of work is a thousand tokens of prompt that were not cached, or about as long: twenty of output."""

_WRITTEN_S = 300
"""How long what is written into a cache is kept at its usual price."""

_ENDED_EARLY: dict[str, FailureCause] = {
    "error": "server_error",
    "cancelled": "overloaded",
    "deadline": "deadline",
}


def remaining_s(request: AnyRequest, journey: Journey, clock: Clock) -> float | None:
    """Seconds until the request's deadline; None: it has none."""
    deadline_s = request.generation.deadline_s
    return None if deadline_s is None else deadline_s - (clock.monotonic() - journey.arrived_s)


class AttemptStream:
    """Owns `permit` from its making on: `events` must be iterated or `discard` called.

    `begun` is whether the answer's first token came: from then on nothing may be tried instead.
    """

    def __init__(
        self,
        permit: Permit,
        request: AnyRequest,
        journey: Journey,
        span: RequestSpan,
        clock: Clock,
        *,
        hedge: bool = False,
    ) -> None:
        self.begun = False
        self._asked = False
        self.permit = permit
        self._request = request
        self._journey = journey
        self._clock = clock
        self._hedge = hedge
        self._start_s = clock.monotonic()
        self._span = span.attempt(self.name, permit.model)
        self._started: Started | None = None
        self._completed: Completed | None = None
        self._embeddings: Embeddings | None = None
        self._early: FailureCause | None = None
        self._first_s: float | None = None
        self._tokens = self._deltas = self._characters = 0
        journey.model, journey.backend = permit.model, self.name

    @property
    def name(self) -> str:
        return self.permit.condition.member.name

    async def events(self) -> AsyncGenerator[Item]:
        """Everything the backend says, as it comes. Raises its errors; an end in error before the first token
        is an error too. Closing this closes the backend's stream at once. The attempt is counted before its
        `Completed` is passed on."""
        try:
            async with aclosing(self._open()) as stream:
                self._asked = True
                async for event in stream:
                    yield self._saw(event)
            if self._completed is None and self._embeddings is None:
                cause: FailureCause = "truncated" if self.begun else "format"
                raise self._error(
                    f"The backend {self.name!r} ended its answer before it was complete.", cause
                )
        except BaseException as error:
            # The client's leaving arrives as GeneratorExit or as cancellation of its task.
            self.close(cause_of(error) if isinstance(error, Exception) else "cancelled", error)
            raise
        finally:
            self.close(self._early)

    def discard(self) -> None:
        """It will not be made after all."""
        self.close("cancelled")

    def close(self, cause: FailureCause | None, error: BaseException | None = None) -> None:
        """Count it, once. An `error` that asks to be left alone is heeded for all requests."""
        if self._span is None:
            return
        span, self._span = self._span, None
        condition, model = self.permit.condition, self.permit.model
        attempt = self._attempt(cause, billed=self._asked and is_billed(error))
        self._journey.attempts.append(attempt)
        if cause is None:
            self._teach(attempt)
        if isinstance(error, UpstreamError) and error.retry_after_s:
            condition.rest(model, error.retry_after_s, error.cause)
        span.end(attempt)
        self.permit.close(cause)

    def _open(self) -> AsyncGenerator[Item]:
        left_s = remaining_s(self._request, self._journey, self._clock)
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded(
                f"The deadline of {self._request.generation.deadline_s} s passed before a backend was asked."
            )
        span = self._span
        assert span is not None
        backend = self.permit.condition.member.backend
        generation = replace(
            self._request.generation,
            model=self.permit.model,
            deadline_s=left_s,
            trace_parent=span.trace_parent(),
        )
        if isinstance(self._request, GenerationRequest):
            return backend.generate(replace(self._request, generation=generation))
        request = replace(self._request, generation=generation)

        async def embed() -> AsyncGenerator[Item]:
            yield await backend.embed(request)

        return embed()

    def _saw(self, event: Item) -> Item:
        """The event, to be passed on."""
        if type(event) is Delta:
            if not self.begun:
                self._begin()
            self._deltas += 1
            self._tokens += len(event.token_ids)
            self._characters += len(event.text) + len(event.reasoning)
            for call in event.tool_calls:
                self._characters += len(call.arguments)
        elif type(event) is Finished:
            self._early = self._early or _ENDED_EARLY.get(event.reason)
            if not self.begun and event.reason in ("error", "cancelled"):
                detail = event.detail or f"The backend {self.name!r} ended the answer before it began."
                raise self._error(detail, _ENDED_EARLY[event.reason])
            self.begun = True
        elif type(event) is Started:
            self._started = event
        elif type(event) is Completed:
            self._completed = event
            self.begun = True
            self.close(self._early)
        elif type(event) is Embeddings:
            self._begin()
            self._embeddings = event
            self.close(None)
            if not event.prompt_tokens:
                return replace(event, prompt_tokens=estimated_prompt_tokens(self._request))
        return event

    def _begin(self) -> None:
        self.begun = True
        self._first_s = self._clock.monotonic()
        self.permit.answers()
        journey = self._journey
        journey.model, journey.backend = self.permit.model, self.name
        if journey.first_token_s is None:
            journey.first_token_s = self._first_s - journey.arrived_s

    def _attempt(self, cause: FailureCause | None, *, billed: bool) -> Attempt:
        """`billed`: the backend may have worked on it, whatever came back."""
        settings = self.permit.condition.member.settings
        model = self.permit.model
        attempt = Attempt(
            backend=self.name,
            model=model if settings is None else settings.models.get(model, model),
            start_s=self._start_s - self._journey.arrived_s,
            duration_s=self._clock.monotonic() - self._start_s,
            cause=cause,
            hedge=self._hedge,
        )
        if self._embeddings is not None:
            told = self._embeddings.prompt_tokens
            return replace(
                attempt,
                prompt_tokens=told or estimated_prompt_tokens(self._request),
                estimated=not told,
            )
        if self._completed is not None:
            usage = self._completed.usage
            promised = usage.promised_tokens or {}
            return replace(
                attempt,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_total,
                written_tokens=sum(promised.values()),
                written_1h_tokens=sum(tokens for ttl_s, tokens in promised.items() if ttl_s > _WRITTEN_S),
                completion_tokens=usage.completion_tokens,
                estimated=usage.estimated,
            )
        # It was given up, or lost, while the backend worked on it: that much is billed, as far as can be
        # known from here.
        if self._started is None and not self.begun:
            # An engine in this process says when it begins; of others nothing is heard before the answer.
            if not billed or (settings is None and isinstance(self._request, GenerationRequest)):
                return attempt
            prompt, cached = 0, 0
            output = output_given_up(self._request, settings, attempt.duration_s, cause)
        else:
            started = self._started or Started(0, {}, 0.0)
            prompt, cached = started.prompt_tokens, sum(started.cached_tokens.values())
            output = self._tokens or max(self._deltas, tokens_of(self._characters))
        return replace(
            attempt,
            prompt_tokens=prompt or estimated_prompt_tokens(self._request),
            cached_tokens=cached,
            completion_tokens=output,
            estimated=True,
        )

    def _teach(self, attempt: Attempt) -> None:
        """The condition learns how fast it was, by the work it was."""
        if self._first_s is None:
            return
        streamed = self._request.generation.stream
        units = (attempt.prompt_tokens - attempt.cached_tokens) / _PROMPT_TOKENS_PER_UNIT
        seconds = self._first_s - self._start_s
        if not streamed:
            units += attempt.completion_tokens / _OUTPUT_TOKENS_PER_UNIT
            seconds = self._clock.monotonic() - self._start_s
        # What is short measures the way there and back, not a rate.
        self.permit.condition.answered(self.permit.model, seconds, max(units, 1.0), streamed=streamed)

    def _error(self, message: str, cause: FailureCause) -> UpstreamError:
        return UpstreamError(message, cause=cause, backend=self.name)

"""The account of one request: what the path saw of it, and the record that is left when it is over."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from stockpot.clock import Clock
from stockpot.errors import FailureCause, cause_of
from stockpot.events import Completed, Delta, Event, Finished, Timings
from stockpot.gateway.journey import Journey
from stockpot.records import Attempt, CacheOutcome, Cost, Operation, RequestRecord
from stockpot.requests import AnyRequest, ChatRequest, EmbeddingRequest
from stockpot.routing.member import Member


class Pricing(Protocol):
    """What attempts cost. Takes microseconds: prices are looked up once."""

    def cost(self, attempt: Attempt) -> Cost: ...

    def upper_bound(
        self, member: Member, model: str, prompt_tokens: int, completion_tokens: int, *, held_s: float = 0.0
    ) -> int:
        """Billionths of a dollar that an attempt costs at most on this backend in `held_s` seconds."""
        ...


_ENDED: dict[str, FailureCause] = {"cancelled": "cancelled", "deadline": "deadline", "error": "server_error"}


class Account:
    """Fed with the request's events, as the client gets them."""

    def __init__(self, request: AnyRequest, journey: Journey, clock: Clock) -> None:
        self.request = request
        self.journey = journey
        self._clock = clock
        self._at = clock.wall()
        self._reason = ""
        self._cause: FailureCause | None = None
        self._completed: Completed | None = None
        self._last_token_s: float | None = None
        self._priced = 0

    def saw(self, event: Event) -> None:
        """One event goes out."""
        match event:
            case Delta():
                self._last_token_s = self._clock.monotonic() - self.journey.arrived_s
                if self.journey.first_token_s is None:
                    self.journey.first_token_s = self._last_token_s
            case Finished():
                self._reason = event.reason
                self._cause = self._cause or _ENDED.get(event.reason)
            case Completed():  # with the times of the request (`timings`)
                self._completed = event
            case _:
                pass

    def finished(self, reason: str) -> None:
        """The request is answered, without events."""
        self._reason = reason

    def failed(self, error: BaseException) -> None:
        """The path ended with `error`. Closing a complete answer's stream is no failure of it."""
        if isinstance(error, Exception):
            self._cause = cause_of(error)
        elif self._completed is None:
            self._cause = "cancelled"

    def price(self, pricing: Pricing) -> None:
        """Put costs on the attempts that have none yet."""
        attempts = self.journey.attempts
        for place in range(self._priced, len(attempts)):
            attempts[place] = replace(attempts[place], cost=pricing.cost(attempts[place]))
        self._priced = len(attempts)

    @property
    def cost(self) -> Cost:
        """The sum over all attempts. Its source is `unknown` where one of them has no price, else that of the
        last one that cost something."""
        used = [each.cost for each in self.journey.attempts if each.prompt_tokens or each.completion_tokens]
        sources = [cost.source for cost in used] or ["none"]
        source = "unknown" if "unknown" in sources else sources[-1]
        return Cost(sum(cost.nanousd for cost in used), source)

    def timings(self, answering: Timings) -> Timings:
        """Of the request, from its arrival here; `answering` are those of the attempt that answered, whose
        backend may have let it wait too."""
        journey = self.journey
        total_s = self._clock.monotonic() - journey.arrived_s
        # Who shares an answer may have come when its wait was over.
        queue_s = min(journey.queue_s + answering.queue_s, total_s)
        return Timings(queue_s, journey.first_token_s, total_s)

    def record(self) -> RequestRecord:
        """The request as it is now that it is over."""
        generation, journey = self.request.generation, self.journey
        attempts = journey.attempts
        total_s = self._clock.monotonic() - journey.arrived_s
        usage = self._completed.usage if self._completed else None
        output = usage.completion_tokens if usage else 0
        tpot_s = None
        if journey.first_token_s is not None and self._last_token_s is not None and output > 1:
            tpot_s = (self._last_token_s - journey.first_token_s) / (output - 1)
        queue_s = self._completed.timings.queue_s if self._completed else journey.queue_s
        prompt = sum(each.prompt_tokens for each in attempts)
        cached = sum(each.cached_tokens for each in attempts)
        return RequestRecord(
            request_id=generation.request_id,
            client_request_id=generation.client_request_id,
            at=self._at,
            operation=_operation(self.request),
            caller=generation.caller,
            requested_model=generation.model,
            model=journey.model,
            backend=journey.backend,
            session=generation.session,
            task=generation.task,
            user=generation.user,
            stream=generation.stream,
            attempts=tuple(attempts),
            prompt_tokens=prompt,
            cached_tokens=cached,
            written_tokens=sum(each.written_tokens for each in attempts),
            completion_tokens=sum(each.completion_tokens for each in attempts),
            estimated=any(each.estimated for each in attempts),
            cache=_cache_outcome(prompt, cached),
            queue_s=queue_s,
            ttft_s=journey.first_token_s,
            tpot_s=tpot_s,
            total_s=total_s,
            finish_reason=self._reason,
            cause=self._cause,
            shared=journey.shared,
            notices=tuple(notice.kind for notice in journey.notices),
            cost=self.cost,
            recalled=journey.recalled,
        )


def _operation(request: AnyRequest) -> Operation:
    if isinstance(request, ChatRequest):
        return "chat"
    return "embedding" if isinstance(request, EmbeddingRequest) else "completion"


def _cache_outcome(prompt: int, cached: int) -> CacheOutcome:
    if not prompt:
        return "none"
    if not cached:
        return "miss"
    return "hit" if cached >= prompt - 1 else "partial"

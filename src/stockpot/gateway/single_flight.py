"""Identical requests at one time are made once; each client gets the whole answer at its own pace.

Shared is what must be equal: requests with temperature 0, or with a seed. Two clients that sample expect two
samples. Identical means every field that can make a difference to the answer or to how it comes, the way it
is routed, its priority (who is urgent must not wait where another waits), and the tenant: between tenants
nothing is shared, because the time an answer takes tells that another asked the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

import blake3
import msgspec

from stockpot.caller import NOBODY
from stockpot.clock import Clock
from stockpot.errors import DeadlineExceeded
from stockpot.events import Completed, Delta, Event, Finished
from stockpot.gateway.journey import Journey
from stockpot.gateway.shared_stream import SharedStream
from stockpot.requests import GenerationRequest
from stockpot.routing.plan import RoutePlan

Make = Callable[[Journey], AsyncGenerator[Event]]
"""Makes the request, and writes what happens to it into the journey it is given."""

_TIME_LOST_MAX = 0.1
"""Who joins has the deadline of the first, and so less time than it asked for: by this share at most."""


def is_shareable(request: GenerationRequest) -> bool:
    """Whether the same request gives the same answer."""
    sampling = request.generation.sampling
    return sampling.temperature == 0 or sampling.seed is not None


def identity_of(plan: RoutePlan, request: GenerationRequest) -> bytes | None:
    """A digest of all that two requests must have in common to share an answer; None where there is none,
    because a field that is passed on unread holds what has no binary form (an integer of more than 64 bits).

    Left out is what only names them: ids, session, task, the caller within its tenant, trace. Mappings count
    in the order they came in, since models read schemas in that order.
    """
    generation = replace(
        request.generation,
        request_id="",
        client_request_id="",
        caller=NOBODY,
        session="",
        task="",
        trace_parent="",
    )
    cascade = None if plan.cascade is None else plan.cascade.model_dump(mode="json")
    way = [plan.asked, [[step.model, sorted(step.on)] for step in plan.steps], cascade]
    kind = type(request).__name__
    try:
        text = msgspec.msgpack.encode([kind, way, replace(request, generation=generation)], enc_hook=_plain)
    except (OverflowError, RecursionError, ValueError):
        return None
    return blake3.blake3(text).digest()


def _plain(value: object) -> object:
    """What msgspec has no form for: mappings and sequences of other types."""
    if hasattr(value, "items"):
        return dict(value.items())  # pyright: ignore
    return list(value)  # pyright: ignore


class _Flight:
    """One request that is being made. `payer` is the record its attempts are written to, so that each is in
    exactly one: the first to ask, or, when that one leaves while others stay, the next."""

    def __init__(self, make: Make, leader: Journey) -> None:
        self.journey = Journey(leader.arrived_s, tries=leader.tries)
        self.payer = leader
        self.travellers: list[Journey] = []
        self.settled = False
        self._told = 0
        self.stream = SharedStream(make(self.journey))

    def tell(self, traveller: Journey) -> None:
        """What is new of the way, for the one who pays and for those who share. From here on the payer
        remains who it is."""
        self.settled = True
        own = self.journey
        traveller.model, traveller.backend, traveller.recalled = own.model, own.backend, own.recalled
        traveller.notices.extend(notice for notice in own.notices if notice not in traveller.notices)
        traveller.shared = traveller is not self.payer
        if traveller.shared:
            return
        traveller.tries = own.tries
        # Attempts count from the arrival of the record they are in; those told before may have got a price.
        later_s = traveller.arrived_s - own.arrived_s
        new = own.attempts[self._told :]
        self._told += len(new)
        traveller.attempts.extend(replace(each, start_s=each.start_s - later_s) for each in new)
        traveller.queue_s += own.queue_s
        own.queue_s = 0.0

    def leave(self, traveller: Journey) -> None:
        """One goes; the others go on."""
        self.travellers.remove(traveller)
        if self.settled or self.stream.over or not self.travellers:
            self.tell(traveller)
            return
        traveller.shared = True
        if traveller is self.payer:
            self.payer = self.travellers[0]


class SingleFlight:
    """The requests that are being made, by identity. On the event loop only."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._flights: dict[bytes, _Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def join(
        self, identity: bytes, make: Make, journey: Journey, deadline_s: float | None = None
    ) -> AsyncGenerator[Event]:
        """The answer: of the identical request under way, or else of one made now. It goes on while anybody
        reads it; when the last one leaves it is cancelled. Raises what the request raises, for each reader.

        `deadline_s` counts from the journey's arrival. Who came later than the one whose deadline ended the
        request, and has seen nothing of an answer, has it made anew.
        """
        while True:
            flight = self._flights.get(identity)
            if flight is None or not self._is_joined(flight, journey, deadline_s):
                flight = self._flights[identity] = _Flight(make, journey)
            cut_short = False
            async with aclosing(self._travel(identity, flight, journey)) as events:
                try:
                    async for event in events:
                        if type(event) is Finished and event.reason == "deadline":
                            cut_short = cut_short or self._has_time(flight, journey, deadline_s)
                        if not cut_short:
                            yield event
                except DeadlineExceeded:
                    if not self._has_time(flight, journey, deadline_s):
                        raise
                    cut_short = True
            if not cut_short:
                return

    def _is_joined(self, flight: _Flight, journey: Journey, deadline_s: float | None) -> bool:
        if not flight.stream.can_be_joined:
            return False
        lost_s = journey.arrived_s - flight.journey.arrived_s
        return deadline_s is None or lost_s <= deadline_s * _TIME_LOST_MAX

    def _has_time(self, flight: _Flight, journey: Journey, deadline_s: float | None) -> bool:
        """Whether one whom `flight` gave nothing before its deadline may have more time than that one had."""
        # Who has the same arrival has the same deadline, whatever the clocks say: no one makes it twice.
        if journey.first_token_s is not None or journey.arrived_s <= flight.journey.arrived_s:
            return False
        return deadline_s is not None and self._clock.monotonic() - journey.arrived_s < deadline_s

    async def _travel(self, identity: bytes, flight: _Flight, journey: Journey) -> AsyncGenerator[Event]:
        flight.travellers.append(journey)
        reader = flight.stream.reader()
        try:
            async for event in reader:
                if type(event) is Delta and journey.first_token_s is None:
                    journey.first_token_s = self._clock.monotonic() - journey.arrived_s
                elif type(event) is Completed:
                    flight.tell(journey)
                yield event
        finally:
            if len(flight.travellers) == 1 and self._flights.get(identity) is flight:
                # Nobody can join what is being closed.
                del self._flights[identity]
            try:
                await reader.left()
            finally:
                flight.leave(journey)

"""What routing decides about a request: which models may answer it, in which order, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stockpot.errors import FailureCause
from stockpot.events import Notice
from stockpot.requests import AnyRequest
from stockpot.settings_gateway import CascadeSettings, Policy


@dataclass(frozen=True, slots=True)
class Step:
    """One model to try, by the name under which backends are known to serve it. `on`: the failures of the
    step before after which this one is taken (empty for the first)."""

    model: str
    on: frozenset[FailureCause] = frozenset()


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """The way of one request, decided once. `asked` is the name the client gave; `notices` tell it what was
    chosen for it other than it asked."""

    asked: str
    steps: tuple[Step, ...]
    policy: Policy
    cascade: CascadeSettings | None = None
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that serves the model and may be asked now. `in_flight` counts this gateway's requests there,
    `waiting` is what the backend itself said last (None: it does not)."""

    name: str
    in_flight: int
    waiting: int | None = None


class Placement(Protocol):
    """Orders the candidates for one request, best first. Called on the event loop.

    `order` may wait (it may ask a backend for token ids), within a bound of its own; it never raises and
    never drops a candidate. `placed` tells that the request was sent to `name`: its prompt will be cached
    there.
    """

    async def order(
        self, model: str, request: AnyRequest, candidates: Sequence[Candidate], policy: Policy
    ) -> Sequence[str]: ...

    def placed(self, model: str, request: AnyRequest, name: str) -> None: ...

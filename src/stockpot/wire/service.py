"""What every route is given."""

from __future__ import annotations

from dataclasses import dataclass

from stockpot.backends.backend import Backend
from stockpot.clock import Clock
from stockpot.settings import Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.identity import Identity


@dataclass(frozen=True, slots=True)
class Service:
    """The parts behind the wire; routes own none of them."""

    backend: Backend
    settings: Settings
    metrics: Metrics
    clock: Clock
    identity: Identity

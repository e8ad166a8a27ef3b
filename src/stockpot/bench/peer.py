"""The seam to a server we compare with, and ourselves behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from stockpot.bench.progress import BenchProgress
from stockpot.bench.server import ServerCommand, stockpot_command
from stockpot.settings import DEFAULT_MODEL


@dataclass(frozen=True, slots=True)
class ServedPeer:
    """How to start a peer and what to call its model in requests."""

    command: ServerCommand
    model: str


class Peer(ABC):
    """A server with the OpenAI wire. `prepare` before `serve`."""

    name: str

    @abstractmethod
    def prepare(self, progress: BenchProgress) -> None:
        """Install what is missing; a second call finds everything there. Blocks, for minutes the first time.

        Raises BuildFailed, ModelError.
        """

    @abstractmethod
    def serve(self, *, concurrency: int) -> ServedPeer:
        """How to start it, set up as its own documentation advises for so many requests at a time."""

    @abstractmethod
    def facts(self) -> Mapping[str, object]:
        """Version and options, for the result file; no paths."""


class StockpotPeer(Peer):
    """Ourselves, with the settings of the environment."""

    name = "stockpot"

    def prepare(self, progress: BenchProgress) -> None:
        """Nothing: the first start fetches and encodes the model (warm-up, not measured)."""
        del progress

    def serve(self, *, concurrency: int) -> ServedPeer:
        """The defaults, whatever the concurrency."""
        del concurrency
        return ServedPeer(stockpot_command({"model": {"source": DEFAULT_MODEL}}), DEFAULT_MODEL)

    def facts(self) -> Mapping[str, object]:
        return {"options": "defaults"}

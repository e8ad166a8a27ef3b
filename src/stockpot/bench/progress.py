"""How a benchmark tells whoever started it how far it is."""

from __future__ import annotations

from typing import Protocol


class BenchProgress(Protocol):
    """Called as work goes on. `description` names the piece of work and stays the same for it; `done` of
    `total` units (requests, turns, steps) are over; `total` is None where nobody knows how many there are."""

    def __call__(self, description: str, done: int, total: int | None, /) -> None: ...


def silent(description: str, done: int, total: int | None, /) -> None:
    """The progress nobody watches."""
    del description, done, total

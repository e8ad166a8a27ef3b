"""How long work tells whoever started it how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called again and again while work goes on, from the thread that does it; must be quick.

    `description` names the piece of work and stays the same for it; the unit is bytes, or percent where
    the description says so. `total_bytes` is None while the size is unknown. Done when both are equal.
    """

    def __call__(self, description: str, done_bytes: int, total_bytes: int | None, /) -> None: ...


def silent(description: str, done_bytes: int, total_bytes: int | None, /) -> None:
    """The progress nobody watches."""
    del description, done_bytes, total_bytes

"""The seam to token counts: exact where the model's tokenizer is at hand, estimated elsewhere, and says so."""

from __future__ import annotations

from typing import Protocol


class TokenCounter(Protocol):
    """Counts the tokens of a text. Pure; any thread."""

    @property
    def name(self) -> str:
        """What counts: the tokenizer's name, or `estimate`."""
        ...

    @property
    def exact(self) -> bool:
        """Whether counts are the model's own."""
        ...

    def count(self, text: str) -> int:
        """How many tokens `text` is, control tokens taken as plain text."""
        ...

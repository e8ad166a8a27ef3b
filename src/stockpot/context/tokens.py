"""The seam to token counts: exact where the model's tokenizer is at hand, else estimated, and it says so."""

from __future__ import annotations

from typing import Protocol

from stockpot.backends.prompt_estimate import tokens_of


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


class EstimatedTokens:
    """A `TokenCounter` for where there is no tokenizer: four characters a token, other scripts than Latin one
    (about: OpenAI, "What are tokens and how to count them?"). Never 0 for a text."""

    name = "estimate"
    exact = False

    def count(self, text: str) -> int:
        if text.isascii():
            return tokens_of(len(text))
        wide = sum(ord(character) > _LATIN for character in text)
        return tokens_of(len(text) - wide) + wide


_LATIN = 0x24F
"""The last character of Latin Extended-B."""

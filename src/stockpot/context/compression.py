"""Shorter texts that say about the same: a seam, an extractive default, and LLMLingua where it is
installed."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Protocol

from stockpot.context.tokens import TokenCounter
from stockpot.errors import ConfigurationError

_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s+|\n+")
_WORD = re.compile(r"\w{3,}")
_FIRST_COUNTS = 1.15
"""A text's first sentence says more often than others what it is about."""


class Compressor(Protocol):
    """Makes a text shorter. The same text and bound give the same result: what is cached stays so."""

    def compress(self, text: str, max_tokens: int, counter: TokenCounter) -> str:
        """At most `max_tokens`; "" where nothing of it fits."""
        ...


class ExtractiveCompressor:
    """Keeps whole sentences, in their order: those whose words are the most frequent in the text (SumBasic,
    Nenkova and Vanderwende 2005: a word counts for less each time it was taken)."""

    def compress(self, text: str, max_tokens: int, counter: TokenCounter) -> str:
        if counter.count(text) <= max_tokens:
            return text
        sentences = [each.strip() for each in _SENTENCE.split(text) if each.strip()]
        words = [[word.lower() for word in _WORD.findall(each)] for each in sentences]
        counts = Counter(word for each in words for word in each)
        total = sum(counts.values()) or 1
        weights = {word: count / total for word, count in counts.items()}
        left = set(range(len(sentences)))
        kept: list[int] = []
        while left:
            best = max(left, key=lambda place: (_score(words[place], weights, place), -place))
            left.discard(best)
            # Counted whole: a join is not always the sum of its parts.
            if counter.count(_joined(sentences, sorted([*kept, best]))) <= max_tokens:
                kept.append(best)
                for word in words[best]:
                    weights[word] *= weights[word]
        return _joined(sentences, sorted(kept))


class LinguaCompressor:
    """By LLMLingua-2 (Pan et al. 2024; `pip install llmlingua`): a small model drops tokens that add
    little."""

    def __init__(self, model: str = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank") -> None:
        """Loads it. Raises ConfigurationError where the package is not installed."""
        try:
            import llmlingua  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigurationError(
                "LLMLingua is not installed; run: pip install 'stockpot[llmlingua]', or use the extractive"
                " compressor."
            ) from error
        package: Any = llmlingua
        self._compressor: Any = package.PromptCompressor(model_name=model, use_llmlingua2=True)

    def compress(self, text: str, max_tokens: int, counter: TokenCounter) -> str:
        """Its tokens are another model's: what is still too long is cut to whole sentences."""
        if counter.count(text) <= max_tokens:
            return text
        made: Any = self._compressor.compress_prompt([text], target_token=max_tokens)
        return ExtractiveCompressor().compress(str(made["compressed_prompt"]), max_tokens, counter)


def _score(words: list[str], weights: dict[str, float], place: int) -> float:
    mean = sum(weights[word] for word in words) / len(words) if words else 0.0
    return mean * (_FIRST_COUNTS if place == 0 else 1.0)


def _joined(sentences: list[str], places: list[int]) -> str:
    return " ".join(sentences[place] for place in places)

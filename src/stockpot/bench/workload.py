"""The chat workload of the benchmarks: sessions x turns over one shared system prompt, made from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.resources import files


class WordSource:
    """Endless words from a seed; the same seed gives the same words on every machine and version."""

    def __init__(self, seed: int) -> None:
        # `random()` is the one method whose sequence Python promises to keep between versions.
        self._random = random.Random(seed)
        # Common English words, nearly all of them one token; any list would do, as long as it stays the same.
        self._words = files("stockpot.bench").joinpath("words.txt").read_text(encoding="ascii").split()

    def text(self, words: int) -> str:
        """The next `words` words, separated by spaces."""
        return " ".join(self._words[int(self._random.random() * len(self._words))] for _ in range(words))


@dataclass(frozen=True, slots=True)
class ChatShape:
    """How much chat: `sessions` of `turns` each, `concurrency` requests at a time."""

    sessions: int
    turns: int
    concurrency: int
    system_words: int = 1500
    user_words: int = 30
    answer_tokens: int = 24
    seed: int = 7

    @property
    def name(self) -> str:
        """Short form, as in result tables."""
        return f"S{self.sessions} T{self.turns} C{self.concurrency}"


@dataclass(frozen=True, slots=True)
class ChatScript:
    """All that users say: `user_texts[turn][session]`, after one `system_text`. What the model answers is
    part of later prompts too, and is each server's own."""

    shape: ChatShape
    system_text: str
    user_texts: tuple[tuple[str, ...], ...]


def write_script(shape: ChatShape) -> ChatScript:
    """The script of a shape: drawn beforehand, so that it does not depend on who answers first."""
    source = WordSource(shape.seed)
    system_text = source.text(shape.system_words)
    turns = tuple(
        tuple(source.text(shape.user_words) for _ in range(shape.sessions)) for _ in range(shape.turns)
    )
    return ChatScript(shape, system_text, turns)

"""fow-cache's pairs: two questions or conversations, and whether one answer is right for both."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stockpot.bench.recall.semantic_run import Turn
from stockpot.bench.recall.tally import upper_bound
from stockpot.errors import ConfigurationError

Kind = Literal["questions", "conversations"]
KINDS: tuple[Kind, ...] = ("questions", "conversations")


@dataclass(frozen=True, slots=True)
class Pair:
    """`kept` was answered before, `asked` comes now. `category` is the data set's own."""

    id: str
    kind: Kind
    category: str
    kept: tuple[Turn, ...]
    asked: tuple[Turn, ...]
    same: bool

    def texts(self) -> Iterable[str]:
        """All that is said, and what precedes the last message as one text, as it is compared by meaning."""
        for turns in (self.kept, self.asked):
            yield from (text for _, text in turns)
            if len(turns) > 1:
                yield context_of(turns)


@dataclass(frozen=True, slots=True)
class PairScore:
    """Answers given, of the pairs with one answer (`hits`) and of those without (`errors`)."""

    hits: int
    pairs: int
    errors: int
    traps: int

    @property
    def hit_share(self) -> float:
        return self.hits / max(1, self.pairs)

    @property
    def error_share(self) -> float:
        return self.errors / max(1, self.traps)

    @property
    def error_upper(self) -> float:
        """With 95 % confidence."""
        return upper_bound(self.errors, self.traps)


def score(pairs: Sequence[Pair], given: Callable[[Pair], bool]) -> PairScore:
    """Count."""
    hits = sum(given(pair) for pair in pairs if pair.same)
    errors = sum(given(pair) for pair in pairs if not pair.same)
    same = sum(pair.same for pair in pairs)
    return PairScore(hits, same, errors, len(pairs) - same)


def context_of(turns: Sequence[Turn]) -> str:
    """What precedes the last message, as `recall.semantic` gives it to the embedder."""
    return "\n".join(f"{role}: {text}" for role, text in turns[:-1] if role != "system")


def read_pairs() -> list[Pair]:
    """All pairs of the package fow-cache. Raises ConfigurationError where it is not installed."""
    try:
        data: Any = importlib.import_module("fow_cache.data")
    except ImportError as error:
        raise ConfigurationError(
            "The pairs are in the package fow-cache, which is not installed: pip install fow-cache"
        ) from error
    questions = [
        Pair(
            item["id"],
            "questions",
            item["category"],
            (("user", item["a"]),),
            (("user", item["b"]),),
            _same(item),
        )
        for item in data.load_questions()
    ]
    conversations = [
        Pair(
            item["id"],
            "conversations",
            item["subtype"],
            _turns(item["a"]),
            _turns(item["b"]),
            _same(item),
        )
        for item in data.load_conversations()
    ]
    return questions + conversations


def _same(item: Any) -> bool:
    """Of an ambiguous pair it depends on the business: a trap, as fow-cache counts it by default."""
    return bool(item["same_answer"]) and not item.get("ambiguous")


def _turns(messages: Any) -> tuple[Turn, ...]:
    return tuple((message["role"], message["content"]) for message in messages)


def folds(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Two halves without a text in common, each with about as many of either kind; the same each time."""
    groups = _groups(pairs)
    halves: tuple[list[Pair], list[Pair]] = ([], [])
    # Largest first, each to the half that has fewer like it.
    for group in sorted(groups, key=lambda group: (-len(group), group[0].id)):
        category = group[0].category
        counts = [sum(pair.category == category for pair in half) for half in halves]
        halves[0 if counts[0] <= counts[1] else 1].extend(group)
    return halves


def _groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs that have a last message in common, directly or through others."""
    leader: dict[str, str] = {}

    def find(text: str) -> str:
        while leader.setdefault(text, text) != text:
            text = leader[text]
        return text

    for pair in pairs:
        leader[find(pair.kept[-1][1])] = find(pair.asked[-1][1])
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(find(pair.kept[-1][1]), []).append(pair)
    return list(groups.values())

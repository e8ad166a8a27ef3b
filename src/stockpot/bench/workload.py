"""The chat workload of the benchmarks: sessions x turns over one shared system prompt, made from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Common English words; any list would do, as long as every server is sent the same text.
_WORDS = (
    "garden river market window bridge castle forest harbor island ladder mirror needle orange pencil pepper "
    "planet pocket rabbit ribbon saddle season shadow silver summer tunnel valley velvet winter yellow basket "
    "bottle butter button camera candle carpet circle coffee corner cotton dinner doctor dragon driver engine "
    "family farmer finger flower friend guitar hammer helmet jacket kettle kitchen lantern leather lesson letter "
    "lemon marble meadow memory morning mountain music night ocean oven painter paper path piano picture "
    "plate pond potato rain road roof sailor salt sand school sheep ship shirt shoulder snow song soup spoon "
    "spring square stone storm street sugar table teacher thunder ticket tower train tree village violin voice "
    "wagon wall water weather wheel wind wood world yard answer bring build carry catch choose clean climb "
    "close count cover draw dream drink drive enjoy enter explain fill find finish follow gather give grow hear "
    "hold imagine invite jump keep know laugh learn leave listen look make measure mix move open pack paint plan "
    "play pour promise pull push reach read remember repeat rest return ride sail search send share show sing "
    "sleep smile speak stand start stay study swim talk teach think throw touch travel visit wait walk watch "
    "wear wonder work write bright calm clever cold early empty fair fast gentle green happy heavy kind large "
    "late light little long loud narrow new old quiet ready rich round sharp short simple slow small smooth soft "
    "strong sweet tall thick thin warm wide wise young above across after along around before behind below "
    "beside between beyond during inside near often once outside perhaps quickly rarely seldom soon still "
    "together toward twice under until usually within without"
).split()


class WordSource:
    """Endless words from a seed; the same seed gives the same words on every machine and version."""

    def __init__(self, seed: int) -> None:
        # `random()` is the one method whose sequence Python promises to keep between versions.
        self._random = random.Random(seed)

    def text(self, words: int) -> str:
        """The next `words` words, separated by spaces."""
        return " ".join(_WORDS[int(self._random.random() * len(_WORDS))] for _ in range(words))


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

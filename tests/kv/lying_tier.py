"""A tier that does everything a tier may do wrong, at random, over a sound one.

What no tier may do is hand out a block whose bytes are not those its head stands for: tiers verify, and that
is tested where bytes are corrupted below them.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from stockpot.kv.block import BlockId
from stockpot.kv.tier import Block, BlockHead, Location, Refused, Tier, TierStats, Unkept, Wanted


class LyingTier(Tier):
    """Behaves with probability `honesty`, else raises, hangs, names blocks of other prompts, mixes up order,
    stops half way, or forgets. Keeps what is written to it in memory."""

    name = "redis"

    def __init__(self, seed: int, *, honesty: float = 0.5, hang_s: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._honesty = honesty
        self._hang_s = hang_s
        self._lock = threading.Lock()
        self.blocks: dict[BlockId, Block] = {}
        self.lies = 0

    def locate(self, wanted: Sequence[Wanted]) -> list[Location]:
        with self._lock:
            honest = self._locate(wanted)
            match self._lie("raise", "hang", "others", "longer", "far", "nothing", "shuffle"):
                case "raise":
                    raise OSError("told to fail")
                case "hang":
                    threading.Event().wait(self._hang_s)
                case "others":
                    named = zip(wanted, self._any(len(wanted)), strict=False)
                    return [Location(block, place.start, place.tokens, 100) for place, block in named]
                case "longer":
                    return [replace(each, tokens=each.tokens * 3) for each in honest]
                case "far":
                    return [replace(each, start=each.start + 800) for each in honest]
                case "nothing":
                    return []
                case "shuffle":
                    self._random.shuffle(honest)
                case _:
                    pass
            return honest

    def read(self, ids: Sequence[BlockId]) -> Iterator[Block | Refused]:
        with self._lock:
            lie = self._lie("raise", "hang", "others", "early", "reverse", "refuse", "more")
            named = list(ids)
            if lie == "others":
                named = self._any(len(ids))
            elif lie == "reverse":
                named.reverse()
            elif lie == "more":
                named += self._any(5)
            elif lie == "hang":
                threading.Event().wait(self._hang_s)
            found = [self.blocks.get(each) or Refused(each, "absent") for each in named]
        for place, each in enumerate(found):
            if place == len(found) // 2:
                if lie == "raise":
                    raise OSError("told to fail")
                if lie == "early":
                    return
                if lie == "refuse":
                    yield Refused(named[place], "checksum", "told to")
                    return
            yield each

    def write(self, blocks: Sequence[Block]) -> list[Unkept | None]:
        with self._lock:
            match self._lie("raise", "short", "full"):
                case "raise":
                    raise OSError("told to fail")
                case "short":
                    return []
                case "full":
                    return ["full" for _ in blocks]
                case _:
                    self.blocks.update({each.head.id: each for each in blocks})
                    return [None for _ in blocks]

    def drop(self, ids: Sequence[BlockId]) -> int:
        with self._lock:
            if self._lie("forget"):
                return len(ids)
            return sum(self.blocks.pop(each, None) is not None for each in ids)

    def drop_where(self, unwanted: Callable[[BlockHead], bool], cause: str) -> int:
        del unwanted, cause
        return 0

    def stats(self) -> TierStats:
        return TierStats(self.name, None, 0, len(self.blocks))

    def _locate(self, wanted: Sequence[Wanted]) -> list[Location]:
        run: list[Location] = []
        for place in wanted:
            ways = ((place.tokens, place.id), *place.aliases)
            found = next((way for way in ways if way[1] in self.blocks), None)
            if found is None:
                break
            run.append(Location(found[1], place.start, found[0], len(self.blocks[found[1]].data)))
            if found[1] != place.id:
                break
        return run

    def _any(self, count: int) -> list[BlockId]:
        return self._random.choices(list(self.blocks), k=count) if self.blocks else []

    def _lie(self, *ways: str) -> str:
        if self._random.random() < self._honesty:
            return ""
        self.lies += 1
        return self._random.choice(ways)

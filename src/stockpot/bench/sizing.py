"""Text of a wanted number of tokens, found by asking the server how many a text has."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable

from stockpot.bench.workload import WordSource

_TRIES = 8


async def text_of_tokens(
    tokens: int, count: Callable[[str], Awaitable[int]], *, seed: int, tolerance: int = 0
) -> str:
    """Words that `count` says are `tokens` tokens, give or take `tolerance`; the nearest of a few tries.

    Common words are a token each nearly always, so the second or third try fits.
    """
    words, best = WordSource(seed).text(tokens).split(), ""
    amount, nearest = tokens, sys.maxsize
    reserve = WordSource(seed + 1)
    for _ in range(_TRIES):
        while len(words) < amount:
            words += reserve.text(amount - len(words)).split()
        text = " ".join(words[:amount])
        counted = await count(text)
        if abs(counted - tokens) < nearest:
            best, nearest = text, abs(counted - tokens)
        if nearest <= tolerance:
            break
        fitting = max(1, round(amount * tokens / max(1, counted)))
        # A proportion cannot close the last gap: rounding brings it back to where it was.
        amount = fitting if fitting != amount else max(1, amount + (1 if counted < tokens else -1))
    return best

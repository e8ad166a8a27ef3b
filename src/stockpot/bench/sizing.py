"""Text of a wanted number of tokens, found by asking the server how many a text has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from stockpot.bench.workload import WordSource

_TRIES = 8


async def text_of_tokens(
    tokens: int, count: Callable[[str], Awaitable[int]], *, seed: int, tolerance: int = 0
) -> str:
    """Words that `count` says are `tokens` tokens, give or take `tolerance`; the nearest found in a few tries.

    Common words are a token each nearly always, so the second or third try fits.
    """
    words, best = WordSource(seed).text(tokens).split(), ""
    amount, nearest = tokens, tokens + 1
    reserve = WordSource(seed + 1)
    for _ in range(_TRIES):
        text = " ".join(words[:amount])
        excess = await count(text) - tokens
        if abs(excess) < nearest:
            best, nearest = text, abs(excess)
        if abs(excess) <= tolerance:
            break
        amount = max(1, amount - excess)
        while len(words) < amount:
            words += reserve.text(amount - len(words)).split()
    return best

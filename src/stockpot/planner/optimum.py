"""What no policy can exceed: the hits of a cache that knows the future.

Belady's rule ("A study of replacement algorithms for a virtual-storage computer", 1966): what is used again
latest goes first, or is not taken in at all. It is optimal for pages of one size, so every token is a page
here. A policy that keeps whole blocks, and only behind their parents, chooses among the same pages with less
freedom: the token hit rate is a bound for all of them, also where blocks differ in length. Where they do not,
it is tight but for one cut block: a prompt uses a block after its parents, so what is used again latest is
always a leaf. It is no bound for the cost saved.
"""

from __future__ import annotations

from heapq import heappop, heappush

from stockpot.kv.block import BlockId
from stockpot.planner.trace import Trace


def optimal_token_rate(trace: Trace, capacity_tokens: int) -> float:
    """The share of prompt tokens a clairvoyant cache of `capacity_tokens` finds; 0 for an empty trace."""
    uses = [block for request in trace.requests for block in request.path]
    upcoming = _next_uses(uses)
    sizes = {block: facts.tokens for block, facts in trace.blocks.items()}
    held: dict[BlockId, int] = {}
    """Tokens kept of each block."""
    latest: list[tuple[int, BlockId]] = []
    """(minus the next use, block); what no longer holds is skipped when it comes to the front."""
    free = capacity_tokens
    hits = 0
    for at, block in enumerate(uses):
        kept = held.pop(block, 0)
        hits += kept
        free += kept
        if upcoming[at] == len(uses):
            continue  # never again
        held[block] = sizes[block]
        heappush(latest, (-upcoming[at], block))
        free -= sizes[block]
        while free < 0:
            # A block that was used since has been given a later next use, or is held no more.
            next_use, victim = latest[0]
            if -next_use <= at or victim not in held:
                heappop(latest)
                continue
            gone = min(held[victim], -free)
            free += gone
            held[victim] -= gone
            if not held[victim]:
                del held[victim]
                heappop(latest)
    tokens = sum(sizes[block] for block in uses)
    return hits / max(tokens, 1)


def _next_uses(uses: list[BlockId]) -> list[int]:
    """For each use the index of the same block's next; the number of all uses where there is none."""
    upcoming = [len(uses)] * len(uses)
    seen: dict[BlockId, int] = {}
    for at in range(len(uses) - 1, -1, -1):
        upcoming[at] = seen.get(uses[at], len(uses))
        seen[uses[at]] = at
    return upcoming

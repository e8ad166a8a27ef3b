"""How many different prompt tokens a set of prompts holds, where equal beginnings count once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def distinct_tokens(prompts: Iterable[Sequence[int]]) -> int:
    """The size of the trie of all prompts: what a perfect prefix cache has to compute, once each.

    Sorted prompts share with their neighbour all they share with any earlier one, so no trie is built.
    """
    total = 0
    before: Sequence[int] = ()
    for prompt in sorted(tuple(prompt) for prompt in prompts):
        total += len(prompt) - _common(before, prompt)
        before = prompt
    return total


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared

"""When to compact a log, and when not: what it saves in the turns to come against the cache it burns now.

A prompt that is cached costs little each turn. Compacting makes all turns to come shorter, but what follows
the stable sections is another text then, and computed once more. Prices are shares of the price of an
uncached input token.
"""

from __future__ import annotations

from dataclasses import dataclass

from stockpot.context.provider_facts import CacheRules


@dataclass(frozen=True, slots=True)
class TokenPrices:
    """What a prompt token costs: computed (`fresh`), read from a cache, written to one."""

    fresh: float = 1.0
    read: float = 0.1
    write: float = 1.25

    @classmethod
    def of(cls, rules: CacheRules) -> TokenPrices:
        """A provider's."""
        return cls(1.0, rules.read_price, max(1.0, rules.write_price))


@dataclass(frozen=True, slots=True)
class Decision:
    """Of one compaction. `saved` and `burned` are in prices of an uncached token: over `expected_turns` turns
    to come, and once. `forced`: it had to be, whatever it costs, for the prompt did not fit."""

    compact: bool
    forced: bool
    tokens_before: int
    tokens_after: int
    stable_tokens: int
    expected_turns: float
    saved: float
    burned: float

    def __str__(self) -> str:
        what = "compacted" if self.compact else "not compacted"
        why = (
            "it did not fit"
            if self.forced
            else f"saves {self.saved:,.0f} in {self.expected_turns:g} turns, burns {self.burned:,.0f}"
        )
        return (
            f"{what}: {self.tokens_before:,} tokens -> {self.tokens_after:,}, of which"
            f" {self.stable_tokens:,} stay cached; {why} (in prices of an uncached token)"
        )


def decide_compaction(
    *,
    tokens_before: int,
    tokens_after: int,
    stable_tokens: int,
    expected_turns: float,
    prices: TokenPrices | None = None,
    forced: bool = False,
) -> Decision:
    """Whether (tokens saved x turns to come) beats the cache that is burned. `stable_tokens` of the prompt
    stay as they are, and cached."""
    prices = prices or TokenPrices()
    saved = max(0, tokens_before - tokens_after) * prices.read * expected_turns
    # What follows the stable sections is written anew instead of being read.
    burned = max(0, tokens_after - stable_tokens) * (prices.write - prices.read)
    return Decision(
        compact=forced or saved > burned,
        forced=forced,
        tokens_before=tokens_before,
        tokens_after=tokens_after,
        stable_tokens=stable_tokens,
        expected_turns=expected_turns,
        saved=saved,
        burned=burned,
    )

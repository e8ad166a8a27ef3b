"""What the doctor finds: pairs of requests that could have shared a prefix, and where and why one did not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stockpot.doctor.exchange import Exchange

Cause = Literal[
    "timestamp",  # a time of day that moves on
    "date",  # a date in what should be stable: breaks once a day
    "uuid",  # a random identifier
    "counter",  # a number that goes up
    "key_order",  # the same JSON, keys in another order
    "white_space",
    "unicode_form",  # the same text in another normal form
    "tool_added",
    "tool_removed",
    "tool_reordered",
    "tool_changed",
    "system_changed",  # another text where the system prompt was: none of the causes above
    "history_edited",
    "history_truncated",
    "model_changed",
    "parameters_changed",
    "image_reencoded",
    "ttl_expired",  # the gap was longer than the provider keeps a prefix
    "below_minimum",  # shorter than the provider caches
    "no_boundary",  # a provider that must be told what to cache was not
    "beyond_lookback",  # the last boundary that was written lies too many blocks back
    "routed_elsewhere",  # the prefix was cached on another server
    "evicted",  # the same prefix, soon enough, and yet not found
]
"""Why a prefix was not reused. Exactly one is named for a break: the first place decides."""

Relation = Literal["conversation", "family"]
"""How two requests belong together: a later turn of one conversation, or another conversation of one program
(which should share what comes before the first user turn)."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A request, and the earlier one whose prefix it should have shared. `conversation` numbers them;
    `turn` counts from 1."""

    earlier: Exchange
    later: Exchange
    relation: Relation
    conversation: int
    turn: int


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The text around a break: the same up to it, then what stood there earlier, and later."""

    before: str
    earlier: str
    later: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where prompts part: JSON path of the value in the later body (`messages[0].content[1].text`), the
    character in it, and how many tokens of the prompt precede it (`exact`: by the model's own tokenizer)."""

    path: str
    character: int
    token: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One break. `tokens_lost` could have been read from a cache and were not. `patch` is a unified diff of
    the template, where that could be inferred, else ""; `advice` is one sentence."""

    cause: Cause
    pair: Pair
    place: Place
    tokens_lost: int
    excerpt: Excerpt
    advice: str
    patch: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """A pair that was looked at: its tokens, those that could have been cached had the program been written
    for it, those that were (as recorded, else as predicted from provider rules), and the break, if any."""

    pair: Pair
    prompt_tokens: int
    cacheable_tokens: int
    cached_tokens: int
    predicted: bool
    finding: Finding | None = None

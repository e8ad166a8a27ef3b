"""What comes back up from a backend: a stream of frozen events, one order for every backend.

    Queued+  Started  Progress*  (Delta* Finished) per choice, interleaved  Completed

`Queued` comes as soon as the request is accepted (and again when its place in the queue changes), so errors
in the request itself are raised before any event. `Completed` comes exactly once, last, whatever the
outcome. Observers (metrics, ledger) read the same events; nothing below the backend knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "cancelled", "deadline", "error"]
"""stop: an end-of-generation token, a stop string, or a complete constrained output. length: `max_tokens`
or the context. tool_calls: the model wants tools called. content_filter: the model or its provider refused.
The others end a stream early; `error` carries its reason in `Finished.detail`."""

CacheTier = Literal["context", "ram", "disk", "redis", "upstream", "answer"]
"""Where cached prompt tokens came from: cells another request holds, blocks of a tier of the KV store, the
cache of a backend that is not ours, or, all of them, an answer that was kept."""

RecallOutcome = Literal["exact", "semantic", "miss", "bypass"]
"""A kept answer was given, to the same request or to one that means the same; there was none to give; or none
was looked for."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The request is valid and waits; `position` requests stand before it. The first says what the caches of
    answers have for it (`recalled`), where there are any."""

    position: int
    recalled: Recalled | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The request has its place in the batch. `cached_tokens` by tier were not computed for it;
    the rest of `prompt_tokens` is prefilled."""

    prompt_tokens: int
    cached_tokens: Mapping[CacheTier, int]
    queue_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Of the prompt's tokens that are not cached, `done` of `total` are prefilled."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its bytes (a token may hold part of a character) and its natural-log probability. `token_id`
    is
    -1 where a backend names tokens by their text alone."""

    token_id: int
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """The chosen token and the likeliest alternatives at its place, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call of a tool. `id` and `name` come once, in the first piece of call `index` of the
    choice; `arguments` (JSON text) in pieces that are joined."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """Newly generated text of one choice. `text` may be empty while a character or a possible stop
    string is incomplete. `token_ids` are the tokens generated since the previous delta of this choice;
    `details` has one entry for each where log probabilities were asked for. `reasoning` is text the model
    thinks before it answers, `refusal` text in which it refuses; `signature` completes a piece of reasoning
    of the Anthropic API, which wants it back unchanged."""

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    details: tuple[TokenDetail, ...] = ()
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    signature: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is complete. `stop_sequence` is the stop string that ended it, where that is known."""

    choice: int
    reason: FinishReason
    detail: str | None = None
    stop_sequence: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, counted to the token. `cached_tokens` is by tier and at most `prompt_tokens - 1`:
    the last prompt token is always computed, its logits give the first answer token (unless the whole answer
    was kept: tier `answer`).

    `promised_tokens` is None for a request without cache boundaries; else, by seconds of the promise, the
    prompt tokens before a boundary that were computed now and will be kept at least that long. `estimated`:
    counted here, because the backend did not say. `reasoning_tokens` of the completion tokens were thought
    before the answer; None: not known."""

    prompt_tokens: int
    cached_tokens: Mapping[CacheTier, int]
    completion_tokens: int
    promised_tokens: Mapping[int, int] | None = None
    estimated: bool = False
    reasoning_tokens: int | None = None

    @property
    def cached_total(self) -> int:
        return sum(self.cached_tokens.values())


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, on one monotonic clock, from arrival. `ttft_s` is None where no token came."""

    queue_s: float
    ttft_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that was done to the request or its answer and that its sender must be able to see: a guard
    redacted, a budget chose a cheaper model. `kind` is a word for programs."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Recalled:
    """What the caches of answers did for a request. `reason` is a word for programs that explains a miss or a
    bypass, or what a semantic hit rests on. `would` is what shadow mode would have given.

    Of a hit: the entry's id, its age, and what giving it saved; of a semantic one, and of the nearest
    candidate that was refused, also the cosine and the upper bound of the error. `entry` of a miss is the one
    that was made from its answer, where one was.
    """

    outcome: RecallOutcome
    reason: str = ""
    entry: str = ""
    age_s: float | None = None
    similarity: float | None = None
    error_upper: float | None = None
    would: str = ""
    saved_prompt_tokens: int = 0
    saved_completion_tokens: int = 0
    saved_nanousd: int = 0
    saved_s: float = 0.0

    @property
    def is_hit(self) -> bool:
        return self.outcome in ("exact", "semantic")


@dataclass(frozen=True, slots=True)
class Delivery:
    """Which way a request took through the gateway: the model and backend that answered, how many attempts it
    took, what it cost in billionths of a dollar, and what was changed on the way. `recalled` is None where
    answers are not kept."""

    model: str
    backend: str
    attempts: int
    cost_nanousd: int
    cost_source: str
    shared: bool = False
    notices: tuple[Notice, ...] = ()
    recalled: Recalled | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """The request is over and holds nothing any more. `delivery` is the gateway's; backends leave it out."""

    usage: Usage
    timings: Timings
    delivery: Delivery | None = None


Event = Queued | Started | Progress | Delta | Finished | Completed

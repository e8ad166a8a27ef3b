"""One request in the engine, and its choices: the state that lives from arrival to the last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from stockpot.engine.sampling import Sampler
from stockpot.engine.text_stream import TextStream
from stockpot.events import CacheTier, FinishReason
from stockpot.kv.block import BlockId, Scope, TokenKey, token_key
from stockpot.kv.prefetch import Fetch, TierOutcome
from stockpot.kv.promises import Labels
from stockpot.kv.store import Pin


class Phase(Enum):
    """Where a sequence stands. WAITING: no place in the batch (new, or preempted). RUNNING: it has one and
    is prefilled or decoded. DONE: it holds nothing."""

    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class Join:
    """A waiting sequence lets `leader` finish the prefix both begin with: `tokens` of it."""

    leader: Sequence
    tokens: int


@dataclass(slots=True, eq=False)
class Task:
    """One request: what its choices share. Times are monotonic seconds.

    `labels` and `scope` say who may reuse its KV and how long it is kept; the scope is set when the engine
    takes the request, None without a cache. `shareable` turns false when something was invalidated since.
    `marked_tokens`: no more than these leading tokens are kept and found (None: all are).
    """

    request_id: str
    prompt: NDArray[np.int32]
    arrived_s: float
    deadline_s: float | None
    sequences: list[Sequence] = field(default_factory=list["Sequence"])
    started_s: float | None = None
    first_token_s: float | None = None
    cached_tokens: dict[CacheTier, int] = field(default_factory=dict[CacheTier, int])
    generated: int = 0
    preemptions: int = 0
    labels: Labels = field(default_factory=Labels)
    client_request: str = ""
    scope: Scope | None = None
    shareable: bool = True
    marked_tokens: int | None = None

    @property
    def done(self) -> bool:
        return all(sequence.phase is Phase.DONE for sequence in self.sequences)


class Sequence:
    """One choice of a request.

    `tokens[:length]` are the prompt and what was generated; of them the first `computed` have their KV in
    the context. A running sequence with one token left to compute decodes, with more it prefills. `fetch` is
    what it waits for from tiers behind RAM, `fetched` the blocks that came for it and the tier each came
    from, `outcomes` what each tier was asked, `waited_s` how long that took.
    """

    __slots__ = (
        "admissions", "capacity", "choice", "computed", "fetch", "fetched", "finish_reason", "join",
        "last_token_s", "length", "outcomes", "parked", "phase", "pin", "sampler", "slot", "task", "text",
        "tokens", "waited_s",
    )  # fmt: skip

    def __init__(
        self, task: Task, choice: int, *, max_tokens: int, sampler: Sampler, text: TextStream
    ) -> None:
        self.task = task
        self.choice = choice
        self.capacity = len(task.prompt) + max_tokens
        self.tokens = np.empty(self.capacity, np.int32)
        self.tokens[: len(task.prompt)] = task.prompt
        self.length = len(task.prompt)
        self.computed = 0
        self.admissions = 0
        self.parked = False
        self.sampler = sampler
        self.text = text
        self.phase = Phase.WAITING
        self.slot: int | None = None
        self.pin: Pin | None = None
        self.join: Join | None = None
        self.fetch: Fetch | None = None
        self.fetched: dict[BlockId, CacheTier] = {}
        self.outcomes: list[TierOutcome] = []
        self.waited_s = 0.0
        self.last_token_s: float | None = None
        self.finish_reason: FinishReason | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.task.prompt)

    @property
    def generated(self) -> int:
        return self.length - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen; 1 while decoding."""
        return self.length - self.computed

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        return self.capacity - self.length

    def append(self, token: int) -> None:
        """Take a generated token."""
        self.tokens[self.length] = token
        self.length += 1

    def common_prefix(self, tokens: NDArray[np.int32]) -> int:
        """How many leading tokens of this sequence and `tokens` are the same."""
        shortest = min(self.length, len(tokens))
        differs = self.tokens[:shortest] != tokens[:shortest]
        first = int(np.argmax(differs)) if shortest else 0
        return first if shortest and differs[first] else shortest

    def reusable_key(self) -> TokenKey:
        """The tokens whose KV may come from elsewhere: all but the last, whose logits are wanted."""
        return token_key(self.tokens[: self.reusable_tokens])

    @property
    def reusable_tokens(self) -> int:
        """How many those are."""
        marked = self.task.marked_tokens
        if marked is None or self.parked:  # what it computed before it was preempted is its own
            return self.length - 1
        return min(self.length - 1, marked)

    def computed_key(self) -> TokenKey:
        """The tokens whose KV the context holds."""
        return token_key(self.tokens[: self.computed])

    def kept_key(self) -> TokenKey:
        """Those of them that others may find."""
        marked = self.task.marked_tokens
        return token_key(self.tokens[: self.computed if marked is None else min(self.computed, marked)])

"""Who runs in the next step, and with how many tokens.

Prefill is bound by arithmetic, decode by memory bandwidth, so a step treats them as two kinds of work. Every
decoding stream gets its one token. What is left of the step's token budget goes to prefill: the whole
`max_batch_tokens` while nothing decodes, at most `prefill_tokens_beside_decode` while something does, which
bounds the pause a running stream sees. Of the prefill budget half belongs to the oldest prompt, so that a
long one is never starved; the rest goes to the shortest remainders, so that short ones pass it. Prompts are
finished one after the other: the mean TTFT is lower than when they all end in the same step.

Admission is first come, first served, with two exceptions: a sequence whose prefix another is prefilling
right now waits for it (it "joins") and lets others pass; so does one whose blocks are on their way from a
tier behind RAM, while that is quicker than computing them. A sequence is admitted when a slot is free and the
cells it needs are: what it must hold of its own, and a reserve for what it will generate. When the
context runs out of cells all the same, the sequence that was admitted last is preempted: its KV goes to the
store, it goes to the front of the queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stockpot.engine.residency import Residency, Reuse
from stockpot.engine.sequence import Join, Phase, Sequence
from stockpot.events import CacheTier

JOIN_TOKENS = 32
"""A prefix being prefilled is waited for when it saves this many tokens: a wait costs about a step."""

RESERVE_TOKENS = 64
"""Cells kept for the first tokens an admitted sequence generates. More would leave cells idle, less would
preempt at once."""


TOGETHER_TOKENS = 64
"""Prompts are finished in one step while they have no more tokens than this together. Measured with the
default model behind 2,048 tokens: 16 tokens 36 ms, 40 74, 64 109, 128 199: about 12 ms and 1.5 ms a token."""


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence's share of a step: its next `tokens`; `last` when its logits are wanted behind them."""

    sequence: Sequence
    tokens: int
    last: bool


class Scheduler:
    """The waiting queue and the batch. Decides; `Residency` carries out. Engine thread only.

    `on_admit(sequence, reused tokens by tier)` is called for each admission, `on_preempt(sequence)` for each
    preemption.
    """

    def __init__(
        self,
        residency: Residency,
        *,
        max_batch_tokens: int,
        prefill_tokens_beside_decode: int,
        on_admit: Callable[[Sequence, dict[CacheTier, int]], None],
        on_preempt: Callable[[Sequence], None],
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._residency = residency
        self._max_batch_tokens = max_batch_tokens
        self._prefill_tokens_beside_decode = prefill_tokens_beside_decode
        self._on_admit = on_admit
        self._on_preempt = on_preempt

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def retire(self, sequence: Sequence) -> None:
        """Take a sequence out of queue and batch for good. The caller lets it leave the context."""
        if sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
        elif sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        sequence.join = None
        sequence.phase = Phase.DONE

    def admit(self) -> None:
        """Move waiting sequences into the batch while there is room."""
        for sequence in list(self.waiting):
            if not self._residency.free_slots:
                return
            if self._still_joining(sequence) or self._residency.still_fetching(sequence):
                continue
            reuse = self._residency.find_reuse(sequence, self.running)
            if reuse.leader is not None and reuse.pending >= reuse.tokens + JOIN_TOKENS:
                sequence.join = Join(reuse.leader, reuse.pending)
                continue
            if not self._fits(sequence, reuse):
                return
            self.waiting.remove(sequence)
            reused = self._residency.admit(sequence, reuse)
            self.running.append(sequence)
            sequence.admissions += 1
            self._on_admit(sequence, reused)

    def plan(self) -> list[Work]:
        """The next step's work; preempts until it fits the free cells. Empty when nothing runs."""
        work = self._share_out()
        while sum(each.tokens for each in work) > self._residency.pool.free and len(self.running) > 1:
            self.preempt()
            work = self._share_out()
        return work

    def preempt(self) -> Sequence:
        """Take the sequence admitted last out of the batch, to go on later."""
        sequence = self.running.pop()
        self._residency.park(sequence)
        self.waiting.appendleft(sequence)
        self._on_preempt(sequence)
        return sequence

    def _fits(self, sequence: Sequence, reuse: Reuse) -> bool:
        own = sequence.length - reuse.shared
        if not self.running:
            return True  # alone it fits: a request larger than the context was refused on arrival
        growing = sum(min(RESERVE_TOKENS, each.room) + each.remaining for each in self.running)
        return own + min(RESERVE_TOKENS, sequence.room) + growing <= self._residency.pool.free

    @staticmethod
    def _still_joining(sequence: Sequence) -> bool:
        join = sequence.join
        if join is None:
            return False
        if join.leader.phase is Phase.RUNNING and join.leader.computed < join.tokens:
            return True
        sequence.join = None
        return False

    def _share_out(self) -> list[Work]:
        decoding = [each for each in self.running if each.remaining == 1]
        prefilling = [each for each in self.running if each.remaining > 1]
        budget = self._max_batch_tokens - len(decoding)
        if decoding:
            budget = min(budget, self._prefill_tokens_beside_decode)
        work = [Work(each, 1, last=True) for each in decoding]
        work.extend(
            Work(each, tokens, last=tokens == each.remaining)
            for each, tokens in _share_prefill(prefilling, budget)
        )
        return work


def _share_prefill(prefilling: list[Sequence], budget: int) -> Iterator[tuple[Sequence, int]]:
    """Divide the prefill budget: half of it to the oldest, the rest to the shortest, whole ones only; what
    they leave goes to the oldest again.

    Prompts are finished one after the other, not side by side: prefill time grows with its tokens, so two
    equal prompts in one step both wait for twice the time, and the first gains nothing. Only below
    `TOGETHER_TOKENS` does a step cost about the same with one more.
    """
    if not prefilling or budget <= 0:
        return
    oldest, others = prefilling[0], sorted(prefilling[1:], key=lambda each: each.remaining)
    kept = min(oldest.remaining, -(-budget // 2) if others else budget)
    left = budget - kept
    together = kept if kept == oldest.remaining else 0
    shares: list[tuple[Sequence, int]] = []
    for each in others:
        if each.remaining > left or (together and together + each.remaining > TOGETHER_TOKENS):
            break
        shares.append((each, each.remaining))
        left -= each.remaining
        together += each.remaining
    yield oldest, min(oldest.remaining, kept + left)
    yield from shares

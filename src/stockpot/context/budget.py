"""Fits a prompt into its budget, in big and rare steps, and says what it left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from stockpot.context.compaction import Decision, TokenPrices, decide_compaction
from stockpot.context.prompt import Prompt, document_text
from stockpot.context.summaries import Summaries
from stockpot.context.tokens import TokenCounter
from stockpot.context.turns import MESSAGE_TOKENS, log_tokens, rounds
from stockpot.errors import StockpotError
from stockpot.requests import Message

_SUMMARY_HEAD = "Summary of the conversation so far:\n"


class BudgetExceeded(StockpotError):
    """What must be kept is already more than there is room for."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A prompt may have `max_tokens` less `reserve_tokens` for the answer. A log is compacted when the
    prompt is above `high` of that, down to `low` of it: big steps, rarely, for each burns what was cached.
    The last `keep_rounds` rounds (a user's turn and all up to the next) are kept word for word, and the
    first where `keep_first`. A summary has at most `summary_share` of the room."""

    max_tokens: int
    reserve_tokens: int = 0
    high: float = 0.9
    low: float = 0.5
    keep_rounds: int = 2
    keep_first: bool = False
    summary_share: float = 0.1

    @property
    def room(self) -> int:
        return self.max_tokens - self.reserve_tokens


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What is not in the prompt any more. `what` names it, for people."""

    kind: Literal["turns", "document"]
    what: str
    tokens: int
    why: str


@dataclass(frozen=True, slots=True)
class Fitted:
    """The prompt that fits, its tokens, all that was trimmed, and the decision about the log (None: there was
    nothing to decide)."""

    prompt: Prompt
    tokens: int
    trimmed: tuple[Trimmed, ...] = ()
    decision: Decision | None = None


def prompt_tokens(prompt: Prompt, counter: TokenCounter) -> int:
    """Of all of it. What a template puts around messages is estimated."""
    return stable_tokens(prompt, counter) + log_tokens(prompt.log, counter)


def stable_tokens(prompt: Prompt, counter: TokenCounter) -> int:
    """Of what stands before the log."""
    tokens = sum(counter.count(text) for text in prompt.system) + MESSAGE_TOKENS * bool(prompt.system)
    tokens += sum(counter.count(msgspec.json.encode(tool).decode()) for tool in prompt.tools)
    tokens += log_tokens(prompt.examples, counter)
    return tokens + sum(counter.count(document_text(each)) for each in prompt.documents)


def fit(
    prompt: Prompt,
    budget: Budget,
    counter: TokenCounter,
    *,
    summaries: Summaries | None = None,
    expected_turns: float = 10.0,
    prices: TokenPrices | None = None,
) -> Fitted:
    """The prompt within its budget. System, tools and examples are never cut, nor are rounds torn apart: a
    call stays with its results. `summaries` None: what leaves the log is dropped, else summarised.

    Raises BudgetExceeded where what must be kept does not fit.
    """
    prompt, trimmed = _without_documents(prompt, budget, counter)
    stable, before = stable_tokens(prompt, counter), prompt_tokens(prompt, counter)
    if before <= budget.high * budget.room:
        return Fitted(prompt, before, tuple(trimmed))
    forced = before > budget.room
    made = _compacted(prompt, budget, counter, summaries, stable)
    if made is None:
        if forced:
            raise BudgetExceeded(_too_much(prompt, budget, counter, stable))
        return Fitted(prompt, before, tuple(trimmed))
    log, gone = made
    compacted = replace(prompt, log=log, boundaries=tuple(b for b in prompt.boundaries if b.section != "log"))
    after = prompt_tokens(compacted, counter)
    if after > budget.room:
        raise BudgetExceeded(_too_much(prompt, budget, counter, stable))
    decision = decide_compaction(
        tokens_before=before,
        tokens_after=after,
        stable_tokens=stable,
        expected_turns=expected_turns,
        prices=prices,
        forced=forced,
    )
    if not decision.compact:
        return Fitted(prompt, before, tuple(trimmed), decision)
    why = "summarised" if summaries is not None else "the oldest turns"
    trimmed.append(
        Trimmed("turns", f"{len(gone)} messages of the log", log_tokens(gone, counter), f"{why}: {decision}")
    )
    return Fitted(compacted, after, tuple(trimmed), decision)


def _compacted(
    prompt: Prompt, budget: Budget, counter: TokenCounter, summaries: Summaries | None, stable: int
) -> tuple[tuple[Message, ...], list[Message]] | None:
    """A shorter log, and the messages that are gone; None where there is nothing that may go."""
    parts = rounds(prompt.log)
    first = parts[:1] if budget.keep_first else []
    parts = parts[len(first) :]
    last = max(1, budget.keep_rounds)
    may_go, kept = parts[:-last], parts[-last:]
    if not may_go:
        return None
    summary_tokens = int(budget.summary_share * budget.room) if summaries is not None else 0
    target = int(budget.low * budget.room) - stable - summary_tokens
    kept_tokens = sum(log_tokens(each, counter) for each in (*first, *kept))
    while may_go and kept_tokens + (size := log_tokens(may_go[-1], counter)) <= target:
        kept.insert(0, may_go.pop())
        kept_tokens += size
    gone = [message for each in may_go for message in each]
    if not gone:
        return None
    log = [message for each in first for message in each]
    if summaries is not None:
        text = summaries.of(gone, max(16, summary_tokens - counter.count(_SUMMARY_HEAD) - MESSAGE_TOKENS))
        # Beside what the user says next: some templates refuse two turns of one side in a row.
        head, *rest = kept
        if head[0].role == "user" and not head[0].parts:
            opening = replace(head[0], content=f"{_SUMMARY_HEAD}{text}\n\n{head[0].content}")
            kept = [(opening, *head[1:]), *rest]
        else:
            log.append(Message("user", _SUMMARY_HEAD + text))
    log += [message for each in kept for message in each]
    return tuple(log), gone


def _without_documents(prompt: Prompt, budget: Budget, counter: TokenCounter) -> tuple[Prompt, list[Trimmed]]:
    """Without those that alone are more than there is room for: the last go first."""
    trimmed: list[Trimmed] = []
    documents = list(prompt.documents)
    least = _least_log(prompt.log, budget, counter)
    while (
        documents
        and stable_tokens(replace(prompt, documents=tuple(documents)), counter) + least > budget.room
    ):
        gone = documents.pop()
        tokens = counter.count(document_text(gone))
        trimmed.append(Trimmed("document", gone.name, tokens, f"no room in {budget.room:,} tokens"))
    if not trimmed:
        return prompt, trimmed
    boundaries = tuple(b for b in prompt.boundaries if b.section != "documents" or b.count <= len(documents))
    return replace(prompt, documents=tuple(documents), boundaries=boundaries), trimmed


def _least_log(log: Sequence[Message], budget: Budget, counter: TokenCounter) -> int:
    """Of the rounds that must be kept."""
    parts = rounds(log)
    kept = [*parts[: 1 if budget.keep_first else 0], *parts[-max(1, budget.keep_rounds) :]]
    return sum(log_tokens(each, counter) for each in kept[-len(parts) :])


def _too_much(prompt: Prompt, budget: Budget, counter: TokenCounter, stable: int) -> str:
    least = _least_log(prompt.log, budget, counter)
    return (
        f"The prompt has room for {budget.room:,} tokens ({budget.max_tokens:,} less"
        f" {budget.reserve_tokens:,} for the answer); what must be kept has {stable + least:,}:"
        f" {stable:,} of system, tools, examples and documents, {least:,} of the last"
        f" {budget.keep_rounds} rounds. Keep fewer rounds, shorten those, or choose a model with more room."
    )

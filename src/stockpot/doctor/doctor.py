"""Puts the doctor together: requests in, a report out. Memory does not grow with the number of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from stockpot.context.provider_facts import CacheRules, rules_for
from stockpot.context.tokens import EstimatedTokens, TokenCounter
from stockpot.doctor.conversations import Conversations
from stockpot.doctor.diagnosis import Diagnosis
from stockpot.doctor.exchange import Exchange
from stockpot.doctor.finding import Checked, Pair
from stockpot.doctor.pricing import PrefillRate, Pricing
from stockpot.doctor.readers.files import ReadCounts
from stockpot.doctor.report import Report, Tally

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """`counter` None: tokens are estimated. `provider` is assumed where none was recorded. `tokens_min`: a
    break that lost fewer tokens is none. `prefill_tokens_per_s` of one's own engine, where it is not to be
    inferred from recorded times. `memory_bytes` for conversations that may go on."""

    counter: TokenCounter | None = None
    provider: str = ""
    tokens_min: int = 16
    prefill_tokens_per_s: float | None = None
    memory_bytes: int = 256 * _MIB


def examine(
    exchanges: Iterable[Exchange],
    options: Options | None = None,
    *,
    counts: ReadCounts | None = None,
    told: Callable[[Checked], None] | None = None,
) -> Report:
    """Read them all. `counts` are those of the reader, for the report; `told` is given each pair."""
    options = options or Options()
    counter = options.counter or EstimatedTokens()

    def rules(provider: str, model: str) -> CacheRules:
        return rules_for(provider or options.provider, model)

    conversations = Conversations(memory_bytes=options.memory_bytes)
    diagnosis = Diagnosis(counter, rules=rules, tokens_min=options.tokens_min)
    tally = Tally(Pricing(), PrefillRate(options.prefill_tokens_per_s))
    unread = 0
    for each in conversations.pairs(exchanges):
        try:
            if isinstance(each, Pair):
                checked = diagnosis.check(each)
                tally.checked(checked, is_own=diagnosis.rules(each.later).is_own)
                if told is not None:
                    told(checked)
            else:
                tally.alone(each, diagnosis.prompt_tokens(each))
        except (msgspec.MsgspecError, RecursionError):
            unread += 1
    skipped = dict(counts.skipped) if counts is not None else {}
    if unread:
        skipped["messages that cannot be read"] = unread
    return tally.report(
        conversations.counts.conversations,
        exact=counter.exact,
        skipped=sorted(skipped.items()),
        wrong=counts.wrong if counts is not None else (),
    )

"""What the doctor found, added up: by cause and by place, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from stockpot.doctor.exchange import Exchange
from stockpot.doctor.finding import Cause, Checked, Finding
from stockpot.doctor.pricing import PrefillRate, Pricing

_DAY_S = 86_400.0
_GROUPS_MAX = 200
_EXAMPLES_MAX = 3
_PLACES_MAX = 1_000
_INDEX = re.compile(r"\[\d+\]")


@dataclass(slots=True)
class Group:
    """Breaks of one cause at one kind of place (`messages[].content`). `examples` are those that lost
    most."""

    cause: Cause
    path: str
    count: int = 0
    tokens_lost: int = 0
    usd_lost: float = 0.0
    examples: list[Finding] = field(default_factory=list[Finding])

    def add(self, finding: Finding, usd: float) -> None:
        self.count += 1
        self.tokens_lost += finding.tokens_lost
        self.usd_lost += usd
        self.examples.append(finding)
        if len(self.examples) > _EXAMPLES_MAX:
            # One with a patch says more than one without.
            self.examples.sort(key=lambda one: (bool(one.patch), one.tokens_lost), reverse=True)
            self.examples.pop()


@dataclass(frozen=True, slots=True)
class CauseTotal:
    """One cause: all its groups together. `seconds_lost` where an engine of one's own computed the tokens and
    its rate is known."""

    cause: Cause
    count: int
    tokens_lost: int
    usd_lost: float
    seconds_lost: float | None
    groups: tuple[Group, ...]

    @property
    def advice(self) -> str:
        return self.groups[0].examples[0].advice


@dataclass(frozen=True, slots=True)
class Report:
    """`span_s` is the time from the first request to the last (None: no times were recorded). `hit_ratio` is
    the share of prompt tokens that were read from a cache, `possible_ratio` what it could have been;
    `predicted` of the pairs had no recorded figure, and count as the provider's rules say. `exact`: tokens
    were counted by the model's tokenizer."""

    requests: int
    conversations: int
    pairs: int
    predicted: int
    prompt_tokens: int
    cacheable_tokens: int
    cached_tokens: int
    span_s: float | None
    exact: bool
    causes: tuple[CauseTotal, ...]
    places: tuple[tuple[Cause, str, int, str, int], ...]
    skipped: tuple[tuple[str, int], ...] = ()
    wrong: tuple[str, ...] = ()

    @property
    def hit_ratio(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def possible_ratio(self) -> float:
        return self.cacheable_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def tokens_lost(self) -> int:
        return sum(each.tokens_lost for each in self.causes)

    @property
    def usd_lost(self) -> float:
        return sum(each.usd_lost for each in self.causes)

    @property
    def per_day(self) -> float | None:
        """What figures are multiplied by to be those of a day; None where the time is not known or too short
        to tell (a minute)."""
        return None if self.span_s is None or self.span_s < 60 else _DAY_S / self.span_s


class Tally:
    """Adds up. Bounded: groups beyond the 200th of a file are put with the others of their cause."""

    def __init__(self, pricing: Pricing, rate: PrefillRate) -> None:
        self._pricing = pricing
        self._rate = rate
        self._groups: dict[tuple[Cause, str], Group] = {}
        self._own_tokens: dict[Cause, int] = {}
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._places: list[tuple[Cause, str, int, str, int]] = []
        self.requests = 0
        self.pairs = 0
        self.predicted = 0
        self.prompt_tokens = 0
        self.cacheable_tokens = 0
        self.cached_tokens = 0

    def alone(self, exchange: Exchange, prompt_tokens: int) -> None:
        """A request that had no earlier one to share with."""
        self._seen(exchange)
        cached = exchange.usage.cached_tokens if exchange.usage is not None else None
        self._count(prompt_tokens, cached or 0, cached or 0)

    def checked(self, checked: Checked, *, is_own: bool) -> None:
        """A request that had one."""
        self._seen(checked.pair.later)
        self.pairs += 1
        self.predicted += checked.predicted
        self._count(
            checked.prompt_tokens, max(checked.cacheable_tokens, checked.cached_tokens), checked.cached_tokens
        )
        finding = checked.finding
        if finding is None:
            return
        usd = self._pricing.usd_lost(checked.pair.later, finding.tokens_lost)
        if is_own:
            self._own_tokens[finding.cause] = self._own_tokens.get(finding.cause, 0) + finding.tokens_lost
        key = (finding.cause, _INDEX.sub("[]", finding.place.path))
        if key not in self._groups and len(self._groups) >= _GROUPS_MAX:
            key = (finding.cause, "")
        group = self._groups.setdefault(key, Group(*key))
        group.add(finding, usd)
        if len(self._places) < _PLACES_MAX:
            later = checked.pair.later
            self._places.append(
                (finding.cause, later.file, later.line, finding.place.path, finding.tokens_lost)
            )

    def report(
        self,
        conversations: int,
        *,
        exact: bool,
        skipped: Sequence[tuple[str, int]] = (),
        wrong: Sequence[str] = (),
    ) -> Report:
        """So far."""
        causes: dict[Cause, list[Group]] = {}
        for group in self._groups.values():
            causes.setdefault(group.cause, []).append(group)
        span_s = None
        if self._first_s is not None and self._last_s is not None:
            span_s = self._last_s - self._first_s
        totals = [self._total(cause, groups) for cause, groups in causes.items()]
        return Report(
            requests=self.requests,
            conversations=conversations,
            pairs=self.pairs,
            predicted=self.predicted,
            prompt_tokens=self.prompt_tokens,
            cacheable_tokens=self.cacheable_tokens,
            cached_tokens=self.cached_tokens,
            span_s=span_s,
            exact=exact,
            causes=tuple(sorted(totals, key=lambda one: one.tokens_lost, reverse=True)),
            places=tuple(self._places),
            skipped=tuple(skipped),
            wrong=tuple(wrong),
        )

    def _total(self, cause: Cause, groups: list[Group]) -> CauseTotal:
        own, rate = self._own_tokens.get(cause, 0), self._rate.seconds_per_token
        return CauseTotal(
            cause=cause,
            count=sum(each.count for each in groups),
            tokens_lost=sum(each.tokens_lost for each in groups),
            usd_lost=sum(each.usd_lost for each in groups),
            seconds_lost=own * rate if own and rate is not None else None,
            groups=tuple(sorted(groups, key=lambda one: one.tokens_lost, reverse=True)),
        )

    def _seen(self, exchange: Exchange) -> None:
        self.requests += 1
        self._rate.add(exchange)
        if (at := exchange.at_s) is not None:
            self._first_s = at if self._first_s is None else min(self._first_s, at)
            self._last_s = at if self._last_s is None else max(self._last_s, at)

    def _count(self, prompt: int, cacheable: int, cached: int) -> None:
        self.prompt_tokens += prompt
        self.cacheable_tokens += min(prompt, cacheable)
        self.cached_tokens += min(prompt, cached)

"""Who asks, and what they may use: the result of identity, carried by each request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key or a team may use; None: as much as there is.

    Minutes are sliding; days and months are those of UTC. Tokens are prompt and output together, cached ones
    included. Money is in US dollars, as the ledger reckons it.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    usd_per_day: float | None = None
    usd_per_month: float | None = None

    def __bool__(self) -> bool:
        # Spelt out: it is asked several times for each request.
        return self.requests_per_minute is not None or self.concurrency is not None or self.count_tokens

    @property
    def count_tokens(self) -> bool:
        """Whether one of them is about tokens, or money, which depends on them."""
        return (
            self.tokens_per_minute is not None
            or self.tokens_per_day is not None
            or self.tokens_per_month is not None
            or self.count_money
        )

    @property
    def count_money(self) -> bool:
        """Whether one of them is about money."""
        return self.usd_per_day is not None or self.usd_per_month is not None


@dataclass(frozen=True, slots=True)
class Caller:
    """One caller. `tenant` is the scope of its KV blocks (two callers of one tenant share caches); `key_id`
    names its virtual key ("": none), which is no secret. `models` None: all."""

    tenant: str = ""
    key_id: str = ""
    key_name: str = ""
    team: str = ""
    tags: tuple[str, ...] = ()
    models: frozenset[str] | None = None
    limits: Limits = Limits()
    team_limits: Limits = Limits()


NOBODY = Caller()
"""The caller where no keys are asked for."""

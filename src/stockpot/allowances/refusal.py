"""A refusal in words: which limit, its value, what was used of it, and when to try again."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stockpot.allowances.store import MONEY, NANOUSD, Limit, Order, Refused
from stockpot.errors import AllowanceExceeded

# What may be done, and what was.
_WORDS: Mapping[Limit, tuple[str, str]] = {
    Limit.REQUESTS_PER_MINUTE: ("make {most} requests a minute", "{used} were made"),
    Limit.TOKENS_PER_MINUTE: ("use {most} tokens a minute", "{used} are used or reserved"),
    Limit.CONCURRENCY: ("have {most} requests running at once", "{used} are"),
    Limit.TOKENS_PER_DAY: ("use {most} tokens a day", "{used} are used or reserved"),
    Limit.TOKENS_PER_MONTH: ("use {most} tokens a month", "{used} are used or reserved"),
    Limit.USD_PER_DAY: ("spend {most} a day", "{used} is spent or reserved"),
    Limit.USD_PER_MONTH: ("spend {most} a month", "{used} is spent or reserved"),
}


def refusal(refused: Refused, order: Order, *, without_store: bool = False) -> AllowanceExceeded:
    """The error for the client. `without_store`: the limit is this process's share of the real one."""
    limit, scope = refused.limit, refused.scope
    most = scope.limits[limit] or 0
    may, was = (
        words.format(most=_amount(limit, most), used=_amount(limit, refused.used)) for words in _WORDS[limit]
    )
    message = f"The {scope.kind} {scope.name or scope.id!r} may {may} ({limit.name.lower()}); {was}"
    if without_store:
        message = f"While the gateways cannot share their counts: {message}"
    claim = order.nanousd if limit in MONEY else order.tokens
    if limit not in (Limit.REQUESTS_PER_MINUTE, Limit.CONCURRENCY):
        message += f", and this request may take {_amount(limit, claim)}"
    wait_s = refused.retry_after_s
    if wait_s is not None:
        advice = f"Try again in {_wait(wait_s)}."
    elif most and claim > most:
        advice = "Ask for less: a shorter prompt, or a smaller max_tokens."
    else:
        advice = "Waiting does not help; ask an administrator for more."
    return AllowanceExceeded(f"{message}. {advice}", retry_after_s=wait_s, money=limit in MONEY)


def _amount(limit: Limit, amount: int) -> str:
    if limit not in MONEY:
        return f"{amount:,}"
    usd = amount / NANOUSD
    # A price of a small request is in the digits behind the cents.
    return f"{usd:,.2f} USD" if usd == round(usd, 2) else f"{usd:,.6f} USD"


def _wait(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, math.ceil(seconds))} s"
    if seconds < 2 * 3600:
        return f"{round(seconds / 60)} min"
    hours = round(seconds / 3600)
    return f"{hours} h" if hours < 48 else f"{round(hours / 24)} d"

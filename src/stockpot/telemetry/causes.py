"""Whose fault a failure is: the client's own, or that of what serves it."""

from __future__ import annotations

from stockpot.errors import FailureCause
from stockpot.records import RequestRecord

SERVING_FAILURES: frozenset[FailureCause] = frozenset(
    {
        "rate_limited",
        "overloaded",
        "server_error",
        "connect",
        "reset",
        "timeout",
        "format",
        "truncated",
    }
)
"""A client that asks for the same again may well be answered."""

BACKEND_FAILURES: frozenset[FailureCause] = frozenset(
    {*SERVING_FAILURES, "unauthenticated", "forbidden", "not_found"}
)
"""Of an attempt: these too are not the client's doing, it was let in here. Our key or our list of models is
wrong."""


def backends_failed(record: RequestRecord) -> bool:
    """Whether an operator wants to know, even where another backend gave the answer."""
    return record.cause in SERVING_FAILURES or any(
        attempt.cause in BACKEND_FAILURES for attempt in record.attempts
    )

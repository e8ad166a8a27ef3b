"""Whose tasks are whose: task ids are the clients' own words, and two teams may choose the same one."""

from __future__ import annotations

from stockpot.caller import Caller

TEXT_MAX = 512
"""Characters of a client's own words (session, task, user) that are kept: an index takes no more."""


def scope_of(caller: Caller) -> str:
    """Whom a caller shares its tasks with: its team, else its key alone; "" where there are no keys."""
    if caller.team:
        return f"team:{caller.team}"
    return f"key:{caller.key_id}" if caller.key_id else ""


def kept(text: str) -> str:
    """A client's words as they are stored: bounded, and without NUL, which PostgreSQL has no place for."""
    return text[:TEXT_MAX].replace("\0", "")

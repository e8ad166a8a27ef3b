"""Entries to keep, for tests."""

from __future__ import annotations

from typing import Any

from stockpot.clock import VirtualClock
from stockpot.recall.entry import Entry
from stockpot.recall.evidence.evidence import Observation
from stockpot.recall.questions.question import Likeness

START_S = 1_800_000_000.0
"""Where virtual clocks of these tests begin."""


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little") + b"\1" * 16


def make_entry(number: int, now: float = START_S, **other: Any) -> Entry:
    values: dict[str, Any] = {
        "key": key_of(number),
        "scope": "acme",
        "tenant": "acme",
        "writer": "k1",
        "model": "large",
        "created_at": now,
        "expires_at": now + 3600,
        "answer": b"forty-two",
        "prompt_tokens": 12,
        "completion_tokens": 3,
        "cost_nanousd": 1_500,
        "duration_s": 0.5,
    }
    return Entry(**(values | other))


def make_observation(number: int, clock: VirtualClock, *, writer: str = "k1") -> Observation:
    return Observation(
        at=clock.wall(),
        scope="acme",
        entry=key_of(number),
        question=number.to_bytes(8, "little"),
        likeness=Likeness(similarity=0.9375, conflict="numbers"),
        same=number % 2 == 0,
        source="explored",
        writer=writer,
    )

"""Finished requests as tests need them."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

from stockpot.caller import Caller
from stockpot.events import Recalled
from stockpot.records import Attempt, Cost, RequestRecord

NOON = 1_793_880_000.0
"""A noon of UTC, 2026-11-05."""

RED = Caller(tenant="red", key_id="k1", key_name="ci", team="red", tags=("nightly", "batch"))
BLUE = Caller(tenant="blue", key_id="k2", key_name="app", team="blue")

EXACT = Recalled("exact", "same_request", "e1", 60.0, None, None, "", 100, 10, 1_000, 1.5)
SEMANTIC = Recalled("semantic", "calibrated", "e2", 60.0, 0.97, 0.004, "", 80, 20, 500, 0.5)

_numbers = itertools.count(1)


def finished(caller: Caller = RED, **changes: Any) -> RequestRecord:
    """A request of 100 prompt tokens (60 cached) and 10 output tokens that cost 1,000 nanodollars."""
    plain: dict[str, Any] = {
        "request_id": f"{next(_numbers)}-{uuid.uuid4().hex}",
        "client_request_id": "theirs",
        "at": NOON,
        "operation": "chat",
        "caller": caller,
        "requested_model": "small",
        "model": "small",
        "backend": "here",
        "attempts": (Attempt("here", "small", 0.0, 1.5, prompt_tokens=100, cost=Cost(1_000, "configured")),),
        "prompt_tokens": 100,
        "cached_tokens": 60,
        "written_tokens": 5,
        "completion_tokens": 10,
        "cache": "partial",
        "ttft_s": 0.25,
        "tpot_s": 0.01,
        "total_s": 1.5,
        "finish_reason": "stop",
        "cost": Cost(1_000, "configured"),
    }
    return RequestRecord(**(plain | changes))


def kept(recalled: Recalled, caller: Caller = RED, **changes: Any) -> RequestRecord:
    """A request that was given a kept answer: nothing was tried, and it cost nothing."""
    plain: dict[str, Any] = {
        "backend": "kept",
        "attempts": (),
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "written_tokens": 0,
        "completion_tokens": 0,
        "cache": "none",
        "ttft_s": 0.001,
        "total_s": 0.002,
        "cost": Cost(0, "none"),
        "recalled": recalled,
    }
    return finished(caller, **(plain | changes))

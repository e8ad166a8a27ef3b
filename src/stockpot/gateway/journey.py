"""What happens to one request on its way, gathered while it happens."""

from __future__ import annotations

from dataclasses import dataclass, field

from stockpot.events import Notice, Recalled
from stockpot.records import Attempt


@dataclass(slots=True)
class Journey:
    """Written by the parts of the path in turn, read when the request is over. One for each request.

    `arrived_s` is monotonic; all other times count from it. `first_token_s` is when the first delta of the
    answer that was delivered came. `model` and `backend` are those that answer (or were tried last);
    `shared`: the answer is another request's. `tries` counts the attempts that were begun; `attempts` holds
    those that are over. `recalled` is what the caches of answers did.
    """

    arrived_s: float
    attempts: list[Attempt] = field(default_factory=list[Attempt])
    notices: list[Notice] = field(default_factory=list[Notice])
    queue_s: float = 0.0
    first_token_s: float | None = None
    model: str = ""
    backend: str = ""
    shared: bool = False
    tries: int = 0
    recalled: Recalled | None = None

"""What is known of a request when it is over: one frozen record for ledger, metrics, traces and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from stockpot.caller import Caller
from stockpot.errors import FailureCause
from stockpot.events import Recalled

Operation = Literal["chat", "completion", "embedding"]

CacheOutcome = Literal["none", "miss", "partial", "hit"]
"""Of the prompt's tokens: none were looked for (no answer came), none were cached, some, all but the last."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Money for tokens, in billionths of a US dollar (whole numbers add up exactly).

    `source` says whose price it is: `provider:NAME` (genai-prices), `configured`, `hardware`, or `unknown`,
    in which case the amount is 0 and reports say so.
    """

    nanousd: int = 0
    source: str = "unknown"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try on one backend. `model` is the backend's own name of it; `start_s` and `duration_s` count from
    the request's arrival. `cause` None: it succeeded. Tokens are what was billed, as far as that is known
    (`estimated`: counted here, because the backend did not say). `written_1h_tokens` of the written ones are
    kept for more than five minutes, which providers price apart."""

    backend: str
    model: str
    start_s: float
    duration_s: float
    cause: FailureCause | None = None
    hedge: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    written_1h_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    cost: Cost = Cost()


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, from arrival (`at`, wall time in seconds since 1970) to its end.

    Tokens and cost are sums over all attempts: what a failed or abandoned attempt used is paid for too.
    `fresh_tokens` of a prompt were computed, `cached_tokens` read from a cache, `written_tokens` (part of the
    fresh ones) put there under a promise. `tpot_s` is the mean time between output tokens after the first.
    `cause` None: a complete answer was delivered. `shared`: the answer of another, identical request was
    given. `recalled` is what the caches of answers did, None where there are none; an answer that was kept
    costs nothing, and no tokens: what it saved stands there.
    """

    request_id: str
    client_request_id: str
    at: float
    operation: Operation
    caller: Caller
    requested_model: str
    model: str = ""
    backend: str = ""
    session: str = ""
    task: str = ""
    user: str = ""
    stream: bool = False
    attempts: tuple[Attempt, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    cache: CacheOutcome = "none"
    queue_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    total_s: float = 0.0
    finish_reason: str = ""
    cause: FailureCause | None = None
    shared: bool = False
    notices: tuple[str, ...] = ()
    cost: Cost = Cost()
    recalled: Recalled | None = None

    @property
    def fresh_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


class RecordObserver(Protocol):
    """Told of each request when it is over, on the event loop; must not block or raise."""

    def observe_request(self, record: RequestRecord) -> None: ...

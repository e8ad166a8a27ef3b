"""What every route is given."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from stockpot.accounts.accounts import Accounts
from stockpot.backends.backend import Backend
from stockpot.clock import Clock
from stockpot.identity.key_admin import KeyAdmin
from stockpot.recall.administration import RecallAdministration
from stockpot.settings import Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.telemetry.recording import BodyShape, Recording
from stockpot.wire.body import body_of
from stockpot.wire.identity import Identity


@dataclass(slots=True)
class Service:
    """The parts behind the wire; routes own none of them. A reload of the configuration replaces `identity`;
    `accounts` and `keys` are None where there are no accounts, `recall` where no answers are kept,
    `recording` where requests are not recorded."""

    backend: Backend
    settings: Settings
    metrics: Metrics
    clock: Clock
    identity: Identity
    accounts: Accounts | None = None
    keys: KeyAdmin | None = None
    recall: RecallAdministration | None = None
    recording: Recording | None = None

    def asked(self, request: Request, request_id: str, shape: BodyShape) -> None:
        """A request whose body was read and understood: it is kept, where requests are recorded."""
        if self.recording is not None:
            self.recording.asked(request_id, shape, body_of(request))

    async def audit(self, actor: str, action: str, target: str, **detail: Any) -> None:
        """Write down what an administrator is about to do, where there is an audit log. Before it is done: no
        change is unseen, and one that then fails is in the log all the same."""
        if self.accounts is not None:
            await asyncio.to_thread(self.accounts.audit.append, actor, action, target, detail)

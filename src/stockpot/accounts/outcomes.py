"""How tasks ended: what makes a cost per successful task out of the cost of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import func, insert, select

from stockpot.accounts.database import Database
from stockpot.accounts.scope import kept, scope_of
from stockpot.caller import Caller
from stockpot.clock import Clock, SystemClock

OutcomeWord = Literal["success", "failure"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`requests` are those of the task the ledger knew when this was said; `value` is the client's own
    measure, in a unit of its own."""

    task: str
    outcome: OutcomeWord
    at: float
    note: str = ""
    value: float | None = None
    requests: int = 0


class Outcomes:
    """What callers say of their own tasks. The last word counts, earlier ones are kept. Calls may block."""

    def __init__(self, database: Database, *, clock: Clock | None = None) -> None:
        self._database = database
        self._clock = clock or SystemClock()

    def say(
        self, caller: Caller, task: str, outcome: OutcomeWord, *, note: str = "", value: float | None = None
    ) -> Outcome | None:
        """Keep an outcome; None, and nothing is kept, where the ledger has no request of the caller (or its
        team) with this task."""
        tables = self._database.tables
        task, scope = kept(task), scope_of(caller)
        ledger = tables.requests.c
        count = select(func.count()).where(ledger.scope == scope, ledger.task == task, ledger.task != "")
        with self._database.writing() as connection:
            requests = connection.execute(count).scalar_one()
            if not requests:
                return None
            said = Outcome(task, outcome, self._clock.wall(), kept(note), value, requests)
            connection.execute(
                insert(tables.outcomes).values(
                    scope=scope,
                    task=task,
                    at=said.at,
                    key_id=caller.key_id,
                    outcome=outcome,
                    value=value,
                    note=said.note,
                )
            )
        return said

    def of(self, caller: Caller, task: str) -> list[Outcome]:
        """All that was said of a task, in order."""
        said = self._database.tables.outcomes
        wanted = (
            select(said.c.task, said.c.outcome, said.c.at, said.c.note, said.c.value)
            .where(said.c.scope == scope_of(caller), said.c.task == kept(task))
            .order_by(said.c.id)
        )
        with self._database.reading() as connection:
            return [Outcome(*row) for row in connection.execute(wanted)]

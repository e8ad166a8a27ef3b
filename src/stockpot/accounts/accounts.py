"""Everything about accounts that a server holds: one database, and what is kept in it."""

from __future__ import annotations

from dataclasses import dataclass

from stockpot.accounts.audit import ANCHOR_NAME, AuditLog
from stockpot.accounts.database import Database, database_url, open_database
from stockpot.accounts.ledger import Ledger
from stockpot.accounts.outcomes import Outcomes
from stockpot.accounts.prices import PriceBook
from stockpot.accounts.usage import TaskRow, UsageQuery, UsageRow, tasks, usage
from stockpot.clock import Clock
from stockpot.settings import Settings


@dataclass(frozen=True, slots=True)
class Accounts:
    """Opened by `open_accounts`; `close` once, when the last request is over."""

    database: Database
    ledger: Ledger
    audit: AuditLog
    outcomes: Outcomes
    prices: PriceBook

    def usage(self, query: UsageQuery) -> list[UsageRow]:
        """See `usage.usage`; what this process has observed is included. May block."""
        self.ledger.flush()
        return usage(self.database, query)

    def tasks(self, query: UsageQuery) -> list[TaskRow]:
        """See `usage.tasks`; what this process has observed is included. May block."""
        self.ledger.flush()
        return tasks(self.database, query)

    def close(self) -> None:
        """Write what waits, then let go of the database. May block, half a minute at most."""
        self.ledger.close()
        self.database.close()


def open_accounts(settings: Settings, *, clock: Clock) -> Accounts:
    """Accounts as these settings have them. Raises ConfigurationError and DatabaseUnavailable."""
    prices = PriceBook(settings.backends, embedded=settings.engine.hardware, clock=clock)
    database = open_database(database_url(settings))
    return Accounts(
        database=database,
        ledger=Ledger(
            database,
            journal_folder=settings.data_dir.expanduser(),
            queue_limit=settings.accounts.queue_limit,
            keep_days=settings.accounts.keep_days,
            clock=clock,
        ),
        audit=open_audit(database, settings, clock=clock),
        outcomes=Outcomes(database, clock=clock),
        prices=prices,
    )


def open_audit(database: Database, settings: Settings, *, clock: Clock) -> AuditLog:
    """The audit log of a database, its anchor in these settings' `data_dir`."""
    return AuditLog(database, anchor=settings.data_dir.expanduser() / ANCHOR_NAME, clock=clock)

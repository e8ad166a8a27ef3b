"""What was used, what it cost, who did what: ledger, prices, usage, outcomes, audit log."""

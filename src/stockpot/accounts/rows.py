"""A finished request as a row of the ledger: plain values in the order of its columns."""

from __future__ import annotations

from typing import Any

import msgspec

from stockpot.accounts.scope import kept, scope_of
from stockpot.records import RequestRecord

DAY_S = 86_400

COLUMNS = (
    *("request_id", "client_request_id", "at", "day", "operation", "scope", "tenant", "key_id", "key_name"),
    *("team", "tags", "session", "task", "end_user", "requested_model", "model", "backend", "stream"),
    *("attempts", "prompt_tokens", "fresh_tokens", "cached_tokens", "written_tokens", "output_tokens"),
    *("estimated", "cache", "queue_s", "ttft_s", "tpot_s", "total_s", "finish_reason", "cause", "shared"),
    *("notices", "cost_nanousd", "cost_source"),
)
"""Of table `requests`, all but the row's number."""

Row = tuple[Any, ...]
AT, TAGS = COLUMNS.index("at"), COLUMNS.index("tags")


def row_of(record: RequestRecord) -> Row:
    """The row, JSON columns as text; in the order of COLUMNS."""
    caller, cost = record.caller, record.cost
    return (
        record.request_id,
        kept(record.client_request_id),
        record.at,
        int(record.at // DAY_S),
        record.operation,
        scope_of(caller),
        caller.tenant,
        caller.key_id,
        caller.key_name,
        caller.team,
        _json(caller.tags),
        kept(record.session),
        kept(record.task),
        kept(record.user),
        kept(record.requested_model),
        kept(record.model),
        record.backend,
        record.stream,
        _json(record.attempts),
        record.prompt_tokens,
        record.fresh_tokens,
        record.cached_tokens,
        record.written_tokens,
        record.completion_tokens,
        record.estimated,
        record.cache,
        record.queue_s,
        record.ttft_s,
        record.tpot_s,
        record.total_s,
        record.finish_reason,
        record.cause,
        record.shared,
        _json(record.notices),
        cost.nanousd,
        cost.source,
    )


def tag_rows(row: Row) -> list[Row]:
    """The rows of `request_tags` that belong to a row: (request, tag, time)."""
    tags = row[TAGS]
    if tags == "[]":
        return []
    return [(row[0], tag, row[AT]) for tag in dict.fromkeys(msgspec.json.decode(tags, type=list[str]))]


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode() if value else "[]"

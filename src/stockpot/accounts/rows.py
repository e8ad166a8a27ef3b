"""A finished request as a row of the ledger: plain values in the order of its columns.

A row has a value for each of COLUMNS; one of a request in which caches of answers had a part goes on with
those of RECALL_COLUMNS. They are left out of the others, rather than NULL: SQLite's driver takes longer over
None than over a value.
"""

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
"""Of table `requests`, all but the row's number and what follows."""

RECALL_COLUMNS = (
    *("recall_outcome", "recall_reason", "recall_entry", "recall_similarity", "recall_error_upper"),
    *("saved_prompt_tokens", "saved_output_tokens", "saved_nanousd", "saved_s"),
)

LAYOUTS = (COLUMNS, COLUMNS + RECALL_COLUMNS)
"""The columns a row may have, each of another number."""

Row = tuple[Any, ...]
AT, TAGS = COLUMNS.index("at"), COLUMNS.index("tags")


def row_of(record: RequestRecord) -> Row:
    """The row, JSON columns as text; its columns are one of LAYOUTS."""
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
        *_recall_of(record),
    )


def is_whole(row: Row) -> bool:
    """Whether a row that was read back lacks nothing."""
    return any(len(row) == len(columns) for columns in LAYOUTS)


def tag_rows(row: Row) -> list[Row]:
    """The rows of `request_tags` that belong to a row: (request, tag, time)."""
    tags = row[TAGS]
    if tags == "[]":
        return []
    return [(row[0], tag, row[AT]) for tag in dict.fromkeys(msgspec.json.decode(tags, type=list[str]))]


def _recall_of(record: RequestRecord) -> Row:
    """What the caches of answers did. Nothing where the answer is another request's: one of them looked, and
    what that saved would add up to too much."""
    recalled = record.recalled
    if recalled is None or record.shared:
        return ()
    return (
        recalled.outcome,
        recalled.reason,
        recalled.entry,
        recalled.similarity,
        recalled.error_upper,
        recalled.saved_prompt_tokens,
        recalled.saved_completion_tokens,
        recalled.saved_nanousd,
        recalled.saved_s,
    )


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode() if value else "[]"

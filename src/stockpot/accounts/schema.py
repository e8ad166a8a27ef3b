"""The tables: what a line of the ledger, a key, an outcome and an entry of the audit log hold.

Changes go through `migrations`; what this file says and what they make are compared by a test. Text columns
are "" where there is nothing to say, times are seconds since 1970, money is billionths of a US dollar.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Column, Index, MetaData, Table

LATEST_REVISION = "0002"
"""The newest migration."""


@dataclass(frozen=True, slots=True)
class Tables:
    """All tables, of one MetaData.

    `requests` is the ledger, one row for a `records.RequestRecord`; `day` counts days since 1970 (UTC),
    `scope` is whose tasks they are (see `outcomes.scope_of`), `attempts`, `tags` and `notices` are JSON.
    What caches of answers did (`recall_...`), and what a kept answer saved (`saved_...`), is NULL where there
    were no caches, or the answer is another request's.
    `request_tags` has a row for each tag of a request. `outcomes` only grows; of a task's the last counts.
    `keys` are virtual keys, by their digests. `audit` only grows, chained by hashes.
    """

    requests: Table
    request_tags: Table
    outcomes: Table
    keys: Table
    audit: Table


def tables() -> Tables:
    """The tables. Each call makes them anew; a class that uses them keeps them."""
    return _declared(MetaData())


def metadata() -> MetaData:
    """What `tables` describes, for comparisons."""
    declared = MetaData()
    _declared(declared)
    return declared


def _declared(into: MetaData) -> Tables:
    return Tables(
        requests=_requests(into),
        request_tags=Table(
            "request_tags",
            into,
            Column("request_id", sa.Text, primary_key=True),
            Column("tag", sa.Text, primary_key=True),
            Column("at", sa.Double, nullable=False),
            Index("request_tags_at", "at"),
        ),
        outcomes=Table(
            "outcomes",
            into,
            _row_id(),
            _text("scope"),
            _text("task"),
            Column("at", sa.Double, nullable=False),
            _text("key_id"),
            _text("outcome"),
            Column("value", sa.Double),
            _text("note"),
            Index("outcomes_scope_task", "scope", "task", "id"),
        ),
        keys=Table(
            "keys",
            into,
            Column("id", sa.Text, primary_key=True),
            _text("digest"),
            _text("name"),
            _text("team"),
            Column("tags", sa.JSON, nullable=False),
            _text("tenant"),
            Column("models", sa.JSON(none_as_null=True)),
            Column("limits", sa.JSON, nullable=False),
            _text("kind"),
            Column("created_at", sa.Double, nullable=False),
            Column("expires_at", sa.Double),
            Column("revoked_at", sa.Double),
            Column("replaced_by", sa.Text),
            Column("grace_until", sa.Double),
        ),
        audit=Table(
            "audit",
            into,
            Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
            Column("at", sa.Double, nullable=False),
            _text("actor"),
            _text("action"),
            _text("target"),
            _text("detail"),
            _text("previous"),
            _text("hash"),
        ),
    )


def _requests(into: MetaData) -> Table:
    return Table(
        "requests",
        into,
        _row_id(),
        Column("request_id", sa.Text, nullable=False, unique=True),
        _text("client_request_id"),
        Column("at", sa.Double, nullable=False),
        Column("day", sa.Integer, nullable=False),
        _text("operation"),
        _text("scope"),
        _text("tenant"),
        _text("key_id"),
        _text("key_name"),
        _text("team"),
        Column("tags", sa.JSON, nullable=False),
        _text("session"),
        _text("task"),
        _text("end_user"),
        _text("requested_model"),
        _text("model"),
        _text("backend"),
        Column("stream", sa.Boolean, nullable=False),
        Column("attempts", sa.JSON, nullable=False),
        *(
            Column(f"{kind}_tokens", sa.BigInteger, nullable=False)
            for kind in ("prompt", "fresh", "cached", "written", "output")
        ),
        Column("estimated", sa.Boolean, nullable=False),
        _text("cache"),
        Column("queue_s", sa.Double, nullable=False),
        Column("ttft_s", sa.Double),
        Column("tpot_s", sa.Double),
        Column("total_s", sa.Double, nullable=False),
        _text("finish_reason"),
        Column("cause", sa.Text),
        Column("shared", sa.Boolean, nullable=False),
        Column("notices", sa.JSON, nullable=False),
        Column("cost_nanousd", sa.BigInteger, nullable=False),
        _text("cost_source"),
        Column("recall_outcome", sa.Text),
        Column("recall_reason", sa.Text),
        Column("recall_entry", sa.Text),
        Column("recall_similarity", sa.Double),
        Column("recall_error_upper", sa.Double),
        Column("saved_prompt_tokens", sa.BigInteger),
        Column("saved_output_tokens", sa.BigInteger),
        Column("saved_nanousd", sa.BigInteger),
        Column("saved_s", sa.Double),
        Index("requests_at", "at"),
        Index("requests_key_at", "key_id", "at"),
        Index("requests_team_at", "team", "at"),
        Index(
            "requests_scope_task",
            "scope",
            "task",
            sqlite_where=sa.text("task != ''"),
            postgresql_where=sa.text("task != ''"),
        ),
    )


def _row_id() -> Column[int]:
    return Column(
        "id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True
    )


def _text(name: str) -> Column[str]:
    return Column(name, sa.Text, nullable=False)

"""What the ledger adds up to: requests, tokens, cost and waiting, by whatever they are asked by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, FromClause, Integer, Select, and_, case, cast, func, literal, select
from sqlalchemy.sql.elements import KeyedColumnElement

from stockpot.accounts.database import Database
from stockpot.accounts.rows import DAY_S

DIMENSIONS: Mapping[str, str] = {
    "team": "team",
    "model": "model",
    "requested_model": "requested_model",
    "backend": "backend",
    "key": "key_id",
    "tag": "tag",
    "task": "task",
    "session": "session",
    "user": "end_user",
    "day": "day",
    "operation": "operation",
    "cause": "cause",
    "recall": "recall_outcome",
}
"""What usage can be asked by, and the column it is. `model` is what answered, `requested_model` what was
asked for, `cause` why it failed ("": it did not), `day` a day of UTC, `recall` what the caches of answers did
(exact, semantic, miss, bypass; "": there were none, or the answer is another request's)."""

_MAY_BE_NULL = frozenset({"cause", "recall"})

MOST_GROUPS = 10_000
_EPOCH = date(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Requests that arrived from `since` on and before `until` (seconds since 1970), and have these values of
    dimensions (`only`), grouped `by` dimensions."""

    by: tuple[str, ...] = ()
    since: float = 0.0
    until: float = math.inf
    only: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums of one group; `group` has a value for each dimension asked by.

    `failures` have a cause. `hit_share` is the part of prompt tokens that were cached, None without any.
    `unpriced` requests used tokens whose price is not known: their cost counts as 0. Of the times to the
    first token, `ttft_mean_s` and the 95th percentile (nearest rank).

    `exact_hits` and `semantic_hits` were given an answer that was kept, which costs nothing; `recall_share`
    is their part of those for which one was looked for, None without any. What making them took the first
    time is saved: tokens, money, and seconds of waiting.
    """

    group: Mapping[str, str]
    requests: int
    failures: int
    fresh_tokens: int
    cached_tokens: int
    written_tokens: int
    output_tokens: int
    hit_share: float | None
    cost_nanousd: int
    unpriced: int
    ttft_mean_s: float | None
    ttft_p95_s: float | None
    exact_hits: int
    semantic_hits: int
    recall_share: float | None
    saved_prompt_tokens: int
    saved_output_tokens: int
    saved_nanousd: int
    saved_s: float


@dataclass(frozen=True, slots=True)
class TaskRow:
    """Tasks of one group, by what was said of them last, and what they cost.

    A task with requests in several groups (two models, say) counts in each, with what it cost there.
    `nanousd_per_success` is the cost of all of them, failed ones too, over those that succeeded.
    """

    group: Mapping[str, str]
    tasks: int
    succeeded: int
    failed: int
    requests: int
    cost_nanousd: int
    unpriced: int
    nanousd_per_success: int | None


def usage(database: Database, query: UsageQuery) -> list[UsageRow]:
    """The groups, dearest first; at most MOST_GROUPS. A request with several tags counts under each, so that
    groups by tag may add up to more than there was. May block; raises DatabaseUnavailable."""
    source, keys = _source(database, query)
    ledger = database.tables.requests.c
    prompt = func.sum(ledger.prompt_tokens)
    figures: list[ColumnElement[Any]] = [
        func.count().label("requests"),
        func.sum(_if(ledger.cause.is_not(None))).label("failures"),
        func.sum(ledger.fresh_tokens).label("fresh"),
        func.sum(ledger.cached_tokens).label("cached"),
        func.sum(ledger.written_tokens).label("written"),
        func.sum(ledger.output_tokens).label("output"),
        prompt.label("prompt"),
        func.sum(ledger.cost_nanousd).label("nanousd"),
        func.sum(_unpriced(database)).label("unpriced"),
        func.avg(ledger.ttft_s).label("ttft"),
        *(func.sum(_if(ledger.recall_outcome == word)).label(word) for word in ("exact", "semantic", "miss")),
        func.sum(ledger.saved_prompt_tokens).label("saved_prompt"),
        func.sum(ledger.saved_output_tokens).label("saved_output"),
        func.sum(ledger.saved_nanousd).label("saved_nanousd"),
        func.sum(ledger.saved_s).label("saved_s"),
    ]
    groups = _grouped(select(*keys, *figures).select_from(source), database, query, keys)
    groups = groups.order_by(func.sum(ledger.cost_nanousd).desc(), func.count().desc(), *keys).limit(
        MOST_GROUPS
    )
    with database.reading() as connection:
        found = connection.execute(groups).all()
        tails = {tuple(row[:-1]): row[-1] for row in connection.execute(_tails(database, query))}
    rows: list[UsageRow] = []
    for row in found:
        if not row.requests:
            continue  # without dimensions there is a group even of nothing
        key = tuple(row[: len(keys)])
        hits = int(row.exact) + int(row.semantic)
        looked = hits + int(row.miss)
        rows.append(
            UsageRow(
                group=_named(query.by, key),
                requests=row.requests,
                failures=int(row.failures),
                fresh_tokens=int(row.fresh),
                cached_tokens=int(row.cached),
                written_tokens=int(row.written),
                output_tokens=int(row.output),
                hit_share=int(row.cached) / int(row.prompt) if row.prompt else None,
                cost_nanousd=int(row.nanousd),
                unpriced=int(row.unpriced),
                ttft_mean_s=row.ttft,
                ttft_p95_s=tails.get(key),
                exact_hits=int(row.exact),
                semantic_hits=int(row.semantic),
                recall_share=hits / looked if looked else None,
                saved_prompt_tokens=int(row.saved_prompt or 0),
                saved_output_tokens=int(row.saved_output or 0),
                saved_nanousd=int(row.saved_nanousd or 0),
                saved_s=row.saved_s or 0.0,
            )
        )
    return rows


def tasks(database: Database, query: UsageQuery) -> list[TaskRow]:
    """Tasks of the requests that fit, and their outcomes; dearest first. May block."""
    tables = database.tables
    ledger, said = tables.requests.c, tables.outcomes
    source, keys = _source(database, query)
    each = _grouped(
        select(
            ledger.scope.label("scope"),
            ledger.task.label("task_id"),
            *keys,
            func.count().label("requests"),
            func.sum(ledger.cost_nanousd).label("nanousd"),
            func.sum(_unpriced(database)).label("unpriced"),
        )
        .select_from(source)
        .where(ledger.task != ""),
        database,
        query,
        [ledger.scope, ledger.task, *keys],
    ).subquery()
    latest = select(func.max(said.c.id)).group_by(said.c.scope, said.c.task)
    outcome = select(said.c.scope, said.c.task, said.c.outcome).where(said.c.id.in_(latest)).subquery()
    joined = each.outerjoin(outcome, and_(outcome.c.scope == each.c.scope, outcome.c.task == each.c.task_id))
    outer_keys = [each.c[key.key] for key in keys]
    wanted = (
        select(
            *outer_keys,
            func.count().label("tasks"),
            func.sum(_if(outcome.c.outcome == "success")).label("succeeded"),
            func.sum(_if(outcome.c.outcome == "failure")).label("failed"),
            func.sum(each.c.requests).label("requests"),
            func.sum(each.c.nanousd).label("nanousd"),
            func.sum(each.c.unpriced).label("unpriced"),
        )
        .select_from(joined)
        .order_by(func.sum(each.c.nanousd).desc(), *outer_keys)
        .limit(MOST_GROUPS)
    )
    if outer_keys:
        wanted = wanted.group_by(*outer_keys)
    with database.reading() as connection:
        found = connection.execute(wanted).all()
    rows: list[TaskRow] = []
    for row in found:
        if not row.tasks:
            continue
        succeeded, nanousd = int(row.succeeded), int(row.nanousd)
        rows.append(
            TaskRow(
                group=_named(query.by, tuple(row[: len(keys)])),
                tasks=row.tasks,
                succeeded=succeeded,
                failed=int(row.failed),
                requests=int(row.requests),
                cost_nanousd=nanousd,
                unpriced=int(row.unpriced),
                nanousd_per_success=round(nanousd / succeeded) if succeeded else None,
            )
        )
    return rows


def moment(text: str, now: float) -> float:
    """Seconds since 1970 of `7d` (ago; also s, min or m, h, w), a day or a time in ISO 8601; of UTC where it
    names no zone. Raises ValueError."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit_s = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": DAY_S, "w": 7 * DAY_S}.get(text[len(number) :])
    if unit_s is not None and number.isascii() and number.isdigit() and len(number) <= 9:
        return now - int(number) * unit_s
    try:
        given = datetime.fromisoformat(text)
        return (given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:40]!r} is no time; write 7d, 24h, 2026-11-01 or 2026-11-01T12:00") from None


def dimensions_of(text: str) -> tuple[str, ...]:
    """Dimensions from `team,model`. Raises ValueError for what is none, or there twice."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in DIMENSIONS:
            raise ValueError(f"{name[:40]!r} is nothing to group by; there are {', '.join(DIMENSIONS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{text[:80]!r} names something twice")
    return names


def checked_only(only: Mapping[str, str]) -> Mapping[str, str]:
    """`only` of a UsageQuery. Raises ValueError for names that are no dimensions, and days that are none."""
    for name in only:
        dimensions_of(name)
    if "day" in only:
        date.fromisoformat(only["day"])
    return only


def plain(row: UsageRow | TaskRow) -> Mapping[str, Any]:
    """A row for JSON and CSV: the group's values first; money in US dollars."""
    figures: dict[str, Any] = dict(row.group)
    for each in fields(row)[1:]:
        value = getattr(row, each.name)
        if "nanousd" in each.name and value is not None:
            value /= 1e9
        figures[each.name.replace("nanousd", "usd")] = value
    return figures


def names_of(kind: type[UsageRow | TaskRow], by: Sequence[str]) -> list[str]:
    """The names of `plain`'s values, in order."""
    return [*by, *(each.name.replace("nanousd", "usd") for each in fields(kind)[1:])]


def _source(database: Database, query: UsageQuery) -> tuple[FromClause, list[KeyedColumnElement[Any]]]:
    """Where rows come from, and the columns that group them, each named as its dimension."""
    tables = database.tables
    ledger, tags = tables.requests, tables.request_tags
    source: FromClause = ledger
    if "tag" in query.by or "tag" in query.only:
        source = ledger.outerjoin(tags, tags.c.request_id == ledger.c.request_id)
    return source, [_dimension(database, name).label(name) for name in query.by]


def _dimension(database: Database, name: str) -> ColumnElement[Any]:
    tables = database.tables
    if name == "tag":
        return func.coalesce(tables.request_tags.c.tag, literal(""))
    column = tables.requests.c[DIMENSIONS[name]]
    return func.coalesce(column, literal("")) if name in _MAY_BE_NULL else column


def _grouped(
    wanted: Select[Any],
    database: Database,
    query: UsageQuery,
    keys: list[Any] | list[KeyedColumnElement[Any]],
) -> Select[Any]:
    """With the query's conditions, grouped."""
    wanted = wanted.where(*_conditions(database, query))
    return wanted.group_by(*keys) if keys else wanted


def _conditions(database: Database, query: UsageQuery) -> list[ColumnElement[bool]]:
    at = database.tables.requests.c.at
    conditions = [at >= query.since]
    if query.until < math.inf:
        conditions.append(at < query.until)
    for name, value in query.only.items():
        wanted: str | int = value
        if name == "day":
            wanted = (date.fromisoformat(value) - _EPOCH).days
        conditions.append(_dimension(database, name) == wanted)
    return conditions


def _tails(database: Database, query: UsageQuery) -> Select[*tuple[Any, ...]]:
    """The 95th percentile of `ttft_s` for each group: the value whose rank is 0.95 of the count, rounded up.
    Window functions rather than percentile_cont, which SQLite lacks."""
    ttft = database.tables.requests.c.ttft_s
    source, keys = _source(database, query)
    rank = func.row_number().over(partition_by=keys or None, order_by=ttft).label("rank")
    count = func.count().over(partition_by=keys or None).label("count")
    ranked = (
        select(*keys, ttft.label("ttft"), rank, count)
        .select_from(source)
        .where(ttft.is_not(None), *_conditions(database, query))
        .subquery()
    )
    # In whole numbers, so that both databases round alike: ceil(0.95 n) = (95 n + 99) div 100.
    nearest = (ranked.c.count * 95 + 99) // 100
    columns = [ranked.c[key.key] for key in keys]
    return select(*columns, ranked.c.ttft).where(ranked.c.rank == cast(nearest, Integer))


def _unpriced(database: Database) -> ColumnElement[int]:
    """1 for a request that used tokens of unknown price; another's answer (`shared`) used none."""
    ledger = database.tables.requests.c
    used = ledger.prompt_tokens + ledger.output_tokens > 0
    return _if(and_(ledger.cost_source == "unknown", ledger.shared.is_(False), used))


def _if(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return case((condition, 1), else_=0)


def _named(by: tuple[str, ...], values: tuple[Any, ...]) -> dict[str, str]:
    named = dict(zip(by, values, strict=True))
    if "day" in named:
        named["day"] = (_EPOCH + timedelta(days=named["day"])).isoformat()
    return named

"""Log lines: text or JSON on standard error, one line each, times in UTC; and one for each request.

A log record may carry `extra={"fields": {...}}`: facts that stand behind the message, as `name=value` in
text, as members of the object in JSON; and `extra={"request_id": ...}` where the message names the request
already.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Literal

from stockpot.records import RequestRecord
from stockpot.settings_telemetry import LogFormat
from stockpot.telemetry.causes import backends_failed

LogLevel = Literal["debug", "info", "warning", "error"]

Field = str | int | float | bool

_LOG = logging.getLogger(__name__)
_TIME = "%Y-%m-%dT%H:%M:%S"
_PLAIN = re.compile(r"[\w./:@+-]+", re.ASCII)


def configure_logging(level: LogLevel, log_format: LogFormat = "text") -> None:
    """Send the process's logs to standard error. For programs, never for the library: it changes the root."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Of libraries' own lines only trouble is news; the life cycle is told by `stockpot serve` itself.
    for library in ("uvicorn", "asyncio", "urllib3", "opentelemetry", "alembic"):
        logging.getLogger(library).setLevel(max(root.level, logging.WARNING))


class TextFormatter(logging.Formatter):
    """For people: time, level, logger, message, then `name=value` for each field."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", _TIME)
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the standard library's name
        """The line, before a traceback that may follow it."""
        facts = "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + facts


class JsonFormatter(logging.Formatter):
    """For programs: an object a line; tracebacks are in `exception`."""

    def __init__(self) -> None:
        super().__init__(datefmt=_TIME)
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": f"{self.formatTime(record, _TIME)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", None)
        if request_id:
            line["request_id"] = request_id
        line = {**line, **_fields(record), **line}  # what the line itself says stands, and stands first
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str)


class RequestLog:
    """A `records.RecordObserver`: a line for each request that is over. At `info` where a backend failed,
    even if another one answered; at `debug` the rest. What was asked and answered is in none of them."""

    def observe_request(self, record: RequestRecord) -> None:
        level = logging.INFO if backends_failed(record) else logging.DEBUG
        if _LOG.isEnabledFor(level):
            _LOG.log(level, "request", extra={"fields": _facts(record)})


def _facts(record: RequestRecord) -> dict[str, Field]:
    facts: dict[str, Field | None] = {
        "request_id": record.request_id,
        "client_request_id": record.client_request_id,
        "operation": record.operation,
        "key_id": record.caller.key_id,
        "team": record.caller.team,
        "requested_model": record.requested_model,
        "model": record.model,
        "backend": record.backend,
        "cause": record.cause,
        "finish_reason": record.finish_reason,
        "attempts": _attempts(record),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "cache": record.cache,
        "shared": record.shared or None,
        "notices": ",".join(record.notices),
        "queue_s": round(record.queue_s, 6),
        "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 6),
        "total_s": round(record.total_s, 6),
        "cost_usd": record.cost.nanousd / 1e9,
        "cost_source": record.cost.source,
        **_recall(record),
    }
    return {name: value for name, value in facts.items() if value is not None and value != ""}


def _recall(record: RequestRecord) -> dict[str, Field | None]:
    """What the caches of answers did; what it saved in the line of one request of those that shared it."""
    recalled = record.recalled
    if recalled is None:
        return {}
    facts: dict[str, Field | None] = {
        "recall": recalled.outcome,
        "recall_reason": recalled.reason,
        "recall_entry": recalled.entry,
        "recall_similarity": recalled.similarity,
        "recall_error_upper": recalled.error_upper,
        "recall_would": recalled.would,
    }
    if recalled.is_hit and not record.shared:
        facts["saved_tokens"] = recalled.saved_prompt_tokens + recalled.saved_completion_tokens
        facts["saved_usd"] = recalled.saved_nanousd / 1e9
        facts["saved_s"] = round(recalled.saved_s, 6)
    return facts


def _attempts(record: RequestRecord) -> str:
    """`backend:outcome` of each, in the order in which they ended."""
    return ",".join(f"{each.backend}:{each.cause or 'ok'}" for each in record.attempts)


def _fields(record: logging.LogRecord) -> Mapping[str, Field]:
    return getattr(record, "fields", {})


def _word(value: Field) -> str:
    """A value that cannot be taken for anything else: what clients send is in JSON's quotes, on one line."""
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else json.dumps(value)
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return str(value).lower()

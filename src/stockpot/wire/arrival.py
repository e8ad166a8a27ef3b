"""What is known of a request besides its body: who asks, and what its headers say about it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from stockpot.caller import NOBODY, Caller
from stockpot.errors import Forbidden, RequestError
from stockpot.requests import AS_ALLOWED, Priority, RecallControl
from stockpot.wire.edge import request_id_of
from stockpot.wire.recall_control import recall_control
from stockpot.wire.service import Service

_LABEL_LENGTH_MAX = 128
_TAGS_MAX = 16
_READ_TOO = (b"traceparent", b"cache-control")
_PRIORITIES: dict[str, Priority] = {"high": "high", "normal": "normal", "low": "low"}
_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Arrival:
    """See `requests.Generation` for what these are. `longest_s` is the server's own deadline; `wants_events`:
    a waiting client is told its progress in events of its own, not in comments (`x-stockpot-events: 1`)."""

    request_id: str
    longest_s: float
    tenant: str = ""
    client_request_id: str = ""
    caller: Caller = NOBODY
    session: str = ""
    task: str = ""
    priority: Priority = "normal"
    trace_parent: str = ""
    wants_events: bool = False
    recall: RecallControl = AS_ALLOWED


async def arrival_of(service: Service, request: Request, answer_id: str) -> Arrival:
    """Of a request of a route for callers. Raises Unauthenticated for a caller that is not known, and
    RequestError for headers that do not say what they are for."""
    caller = await service.identity.caller(request)
    headers = _headers_of(request)
    tags = _tags(headers)
    return Arrival(
        request_id=answer_id,
        longest_s=service.settings.engine.request_timeout_s,
        tenant=caller.tenant,
        client_request_id=request_id_of(request),
        caller=replace(caller, tags=tuple(dict.fromkeys((*caller.tags, *tags)))) if tags else caller,
        session=_label(headers, "x-stockpot-session"),
        task=_label(headers, "x-stockpot-task"),
        priority=_priority(headers),
        trace_parent=_trace_parent(headers),
        wants_events=_flag(headers, "x-stockpot-events"),
        recall=recall_control(headers),
    )


def check_model(caller: Caller, model: str) -> None:
    """Raises Forbidden for a model the caller's key may not use (what generates is checked by its route)."""
    if caller.models is not None and model not in caller.models:
        raise Forbidden(f"This key may not use the model {model[:100]!r}.", param="model")


def session_of(arrival: Arrival, *others: Any) -> str:
    """The header's session, else the first of `others` (values of the body) that is a text."""
    if arrival.session:
        return arrival.session
    return next((label for label in map(label_of, others) if label), "")


def label_of(value: Any) -> str:
    """A text of the body as a label; what a label cannot hold is known by its digest, what is no text by
    nothing."""
    if not isinstance(value, str) or not value:
        return ""
    return value if _is_label(value) else f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"


def _is_label(value: str) -> bool:
    return 0 < len(value) <= _LABEL_LENGTH_MAX and value.isascii() and value.isprintable()


def _headers_of(request: Request) -> Mapping[str, str]:
    """The headers that are read here, found in one pass: most requests have none of them. Lines of one name
    are one list (RFC 9110, 5.3): a `no-store` must hold whatever else a proxy adds."""
    found: dict[str, str] = {}
    for name, value in request.scope["headers"]:
        if name.startswith(b"x-stockpot-") or name in _READ_TOO:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def _label(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if value is None or not (value := value.strip()):
        return ""
    if not _is_label(value):
        raise RequestError(
            f"The header '{name}' has {len(value)} characters; send at most {_LABEL_LENGTH_MAX}, of printable"
            " ASCII.",
            param=name,
            code="invalid_header",
        )
    return value


def _tags(headers: Mapping[str, str]) -> list[str]:
    value = headers.get("x-stockpot-tags")
    if value is None:
        return []
    tags = [tag for tag in map(str.strip, value.split(",")) if tag]
    if len(tags) > _TAGS_MAX or not all(map(_is_label, tags)):
        raise RequestError(
            f"The header 'x-stockpot-tags' has {len(tags)} tags; send at most {_TAGS_MAX}, separated by"
            f" commas, each of at most {_LABEL_LENGTH_MAX} characters of printable ASCII.",
            param="x-stockpot-tags",
            code="invalid_header",
        )
    return tags


def _priority(headers: Mapping[str, str]) -> Priority:
    value = headers.get("x-stockpot-priority")
    if value is None:
        return "normal"
    priority = _PRIORITIES.get(value.strip().lower())
    if priority is None:
        raise RequestError(
            f"The header 'x-stockpot-priority' is {value[:40]!r}; send high, normal or low.",
            param="x-stockpot-priority",
            code="invalid_header",
        )
    return priority


def _trace_parent(headers: Mapping[str, str]) -> str:
    """One that is malformed is left out: the trace begins anew then (W3C Trace Context, 4.3)."""
    value = headers.get("traceparent")
    return value if value is not None and _TRACE_PARENT.fullmatch(value) else ""


def _flag(headers: Mapping[str, str], name: str) -> bool:
    value = headers.get(name)
    if value is None or value in ("0", "1"):
        return value == "1"
    raise RequestError(
        f"The header '{name}' is {value[:40]!r}; send 1 or 0.", param=name, code="invalid_header"
    )

"""The seam to tracing: what the path tells, so that nothing in it knows a tracing library."""

from __future__ import annotations

from typing import Protocol

from stockpot.records import Attempt, RequestRecord
from stockpot.requests import AnyRequest


class AttemptSpan(Protocol):
    """One attempt on one backend."""

    def trace_parent(self) -> str:
        """What the backend is sent as `traceparent` so that its spans join this one; "": nothing."""
        ...

    def end(self, attempt: Attempt, /) -> None: ...


class RequestSpan(Protocol):
    """One request."""

    def attempt(self, backend: str, model: str) -> AttemptSpan: ...

    def end(self, record: RequestRecord, /) -> None: ...


class Spans(Protocol):
    """Begins the span of each request; on the event loop, never blocks or raises."""

    def request(self, request: AnyRequest) -> RequestSpan: ...


class _Silent:
    """No tracing."""

    def request(self, request: AnyRequest) -> RequestSpan:
        del request
        return self

    def attempt(self, backend: str, model: str) -> AttemptSpan:
        del backend, model
        return self

    def trace_parent(self) -> str:
        return ""

    def end(self, outcome: object, /) -> None:
        del outcome


def no_spans() -> Spans:
    """Where tracing is not configured."""
    return _Silent()

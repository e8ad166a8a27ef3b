"""All operations of the server, one entry each, for the OpenAPI document: what they take and give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from stockpot.requests import Dialect
from stockpot.wire.anthropic_answer import AnthropicMessage
from stockpot.wire.chat_answer import ChatCompletion
from stockpot.wire.completion_answer import Completion
from stockpot.wire.responses_answer import ResponseBody
from stockpot.wire.routes_accounts import OutcomeShape
from stockpot.wire.routes_anthropic import TokenCount
from stockpot.wire.routes_embeddings import EmbeddingList
from stockpot.wire.routes_keys import NewKeyShape, RotateShape
from stockpot.wire.routes_models import ModelBody, ModelList, Tokens
from stockpot.wire.routes_requests import REQUESTS_MAX, RecordedRequests
from stockpot.wire.shapes_anthropic import MessagesShape, PromptShape
from stockpot.wire.shapes_cache import ExportShape, InvalidateShape, NoFields, PinShape, WarmShape
from stockpot.wire.shapes_chat import ChatShape
from stockpot.wire.shapes_completion import CompletionShape, TokenizeShape
from stockpot.wire.shapes_embeddings import EmbeddingsShape
from stockpot.wire.shapes_recall import FeedbackShape, InvalidateAnswersShape
from stockpot.wire.shapes_responses import ResponsesShape

Method = Literal["get", "head", "post", "delete"]
Access = Literal["caller", "admin", "anybody"]

_KNOWN = (400, 401, 403, 429)  # of every route that asks who calls
_BODY = (408, 413)
_GENERATES = (*_KNOWN, *_BODY, 402, 404, 502, 503, 504)
_ADMIN = (400, 401, 403, 429)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answer` is a type msgspec encodes, or the names of the fields an object always
    has; `text`: what it gives instead of JSON, or, where there is an answer too, when streaming. `refusals`
    are the statuses of errors, beside 500; `success` None: there is no other."""

    method: Method
    path: str
    summary: str
    tag: str
    answer: Any = ()
    body: type[BaseModel] | None = None
    body_required: bool = True
    text: str = ""
    query: tuple[tuple[str, dict[str, Any]], ...] = ()
    refusals: tuple[int, ...] = ()
    access: Access = "caller"
    dialect: Dialect = "openai"
    success: int | None = 200
    describes: bool = False
    """Whether requests carry the headers that describe them (`x-stockpot-session`, ...)."""


def operations() -> Iterator[Operation]:
    """All of them, in the order of the document."""
    yield from _generation()
    yield from _models()
    yield from _accounts()
    yield from _operation()
    yield from _cache()
    yield from _recall()
    yield from _requests()
    yield from _keys()


def _generation() -> Iterator[Operation]:
    def generates(
        path: str, summary: str, body: type[BaseModel], answer: Any, text: str = "", **more: Any
    ) -> Operation:
        return Operation(
            "post",
            path,
            summary,
            "generation",
            answer,
            body,
            text=text,
            refusals=_GENERATES,
            describes=True,
            **more,
        )

    stream = "text/event-stream"
    yield generates("/v1/chat/completions", "Continue a conversation", ChatShape, ChatCompletion, stream)
    yield generates("/v1/completions", "Continue a text", CompletionShape, Completion, stream)
    yield generates(
        "/v1/responses", "Continue a conversation; nothing is stored", ResponsesShape, ResponseBody, stream
    )
    stored: tuple[tuple[Method, str], ...] = (
        ("get", "/v1/responses/{response_id}"),
        ("delete", "/v1/responses/{response_id}"),
        ("post", "/v1/responses/{response_id}/cancel"),
        ("get", "/v1/responses/{response_id}/input_items"),
    )
    for method, path in stored:
        yield Operation(
            method,
            path,
            "Always 404: nothing is stored",
            "generation",
            refusals=(*_KNOWN, 404),
            success=None,
        )
    yield generates("/v1/embeddings", "Embed texts", EmbeddingsShape, EmbeddingList)
    yield generates(
        "/v1/messages",
        "Continue a conversation (Anthropic)",
        MessagesShape,
        AnthropicMessage,
        stream,
        dialect="anthropic",
    )
    yield generates(
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation (Anthropic)",
        PromptShape,
        TokenCount,
        dialect="anthropic",
    )


def _models() -> Iterator[Operation]:
    yield Operation("get", "/v1/models", "All models served here", "models", ModelList, refusals=_KNOWN)
    yield Operation("get", "/v1/models/{model_id}", "One model", "models", ModelBody, refusals=(*_KNOWN, 404))
    yield Operation(
        "post",
        "/tokenize",
        "Token ids of a text or conversation",
        "models",
        Tokens,
        TokenizeShape,
        refusals=_GENERATES,
    )


def _accounts() -> Iterator[Operation]:
    text = {"type": "string"}
    when = tuple((name, text) for name in ("by", "since", "until"))
    tasks = (("tasks", {"enum": ["true", "false"]}),)
    path = "/v1/tasks/{task}/outcome"
    yield Operation(
        "post",
        path,
        "Say how a task ended",
        "accounts",
        (),
        OutcomeShape,
        refusals=(*_KNOWN, *_BODY, 404, 501),
    )
    yield Operation(
        "get",
        path,
        "What was said of a task",
        "accounts",
        ("task", "outcomes"),
        refusals=(*_KNOWN, 404, 501),
    )
    usage: tuple[tuple[str, str, Access, tuple[int, ...]], ...] = (
        ("/v1/usage", "What the caller used", "caller", _KNOWN),
        ("/admin/usage", "What everybody used", "admin", _ADMIN),
    )
    for route, summary, access, statuses in usage:
        yield Operation(
            "get",
            route,
            summary,
            "accounts",
            ("now_s", "since", "until", "rows"),
            query=(*when, *tasks),
            refusals=(*statuses, 501),
            access=access,
        )


def _operation() -> Iterator[Operation]:
    for path, summary, statuses in (
        ("/health", "The process is alive", ()),
        ("/ready", "Requests can be served", (503,)),
    ):
        yield Operation("get", path, summary, "operation", ("status",), refusals=statuses, access="anybody")
        yield Operation("head", path, summary, "operation", None, refusals=statuses, access="anybody")
    yield Operation(
        "get", "/metrics", "Prometheus metrics", "operation", None, text="text/plain", access="anybody"
    )


def _cache() -> Iterator[Operation]:
    def administers(
        method: Method,
        path: str,
        summary: str,
        answer: tuple[str, ...] = (),
        body: type[BaseModel] | None = None,
        *,
        statuses: tuple[int, ...] = (501,),
        **more: Any,
    ) -> Operation:
        refusals = (*_ADMIN, *(_BODY if body else ()), *statuses)
        return Operation(
            method,
            f"/admin/cache{path}",
            summary,
            "cache",
            answer,
            body,
            refusals=refusals,
            access="admin",
            **more,
        )

    def count(most: int) -> dict[str, Any]:
        return {"type": "integer", "minimum": 1, "maximum": most}

    tenant = {"type": "string", "pattern": "^([a-z0-9][a-z0-9_-]{0,63})?$"}
    yield administers("get", "/stats", "Figures of the cache", statuses=())
    yield administers(
        "get",
        "/entries",
        "What the cache holds",
        ("now_s", "entries"),
        query=(("limit", count(10_000)), ("tenant", tenant)),
    )
    yield administers(
        "get",
        "/explain",
        "The last requests, and what was found for them",
        ("now_s", "requests"),
        query=(("count", count(2_048)),),
    )
    yield administers(
        "get",
        "/explain/{request_id}",
        "Why a request found what it found",
        ("now_s",),
        statuses=(404, 501),
    )
    yield administers("get", "/pins", "Prefixes that are kept", ("now_s", "pins"))
    yield administers("post", "/pins", "Keep a prefix", ("now_s",), PinShape, statuses=(404, 501, 503))
    yield administers("delete", "/pins/{pin}", "Keep it no longer", ("pin", "unpinned"), statuses=(404, 501))
    yield administers("post", "/invalidate", "Serve blocks no more", (), InvalidateShape, statuses=(404, 501))
    yield administers("post", "/warm", "Prefill a prompt", (), WarmShape, statuses=(404, 408, 501, 503))
    yield administers("post", "/verify", "Check what the cache holds", (), NoFields, body_required=False)
    yield administers("post", "/export", "Write the cache's blocks to a folder", (), ExportShape)


def _requests() -> Iterator[Operation]:
    limit = {"type": "integer", "minimum": 1, "maximum": REQUESTS_MAX}
    tenant = {"type": "string", "pattern": "^([a-z0-9][a-z0-9_-]{0,63})?$"}
    yield Operation(
        "get",
        "/admin/requests",
        "The last requests as they were sent, and what came of them",
        "operation",
        RecordedRequests,
        query=(("limit", limit), ("tenant", tenant)),
        refusals=(*_ADMIN, 501),
        access="admin",
    )


def _recall() -> Iterator[Operation]:
    yield Operation(
        "post",
        "/v1/feedback",
        "Say that a kept answer was right or wrong",
        "recall",
        ("entry", "removed", "learnt"),
        FeedbackShape,
        refusals=(*_KNOWN, *_BODY, 404, 501, 503),
    )
    limit = {"type": "integer", "minimum": 1, "maximum": 10_000}
    tenant = {"type": "string", "pattern": "^([a-z0-9][a-z0-9_-]{0,63})?$"}
    reads: tuple[tuple[str, str, tuple[str, ...], tuple[tuple[str, dict[str, Any]], ...]], ...] = (
        ("", "What kept answers gave, and how often they were wrong", ("now_s", "hits"), ()),
        ("/entries", "The answers that are kept", ("entries",), (("limit", limit), ("tenant", tenant))),
        ("/entries/{entry_id}", "One of them", ("id", "answer"), ()),
    )
    for path, summary, answer, query in reads:
        yield Operation(
            "get",
            f"/admin/recall{path}",
            summary,
            "recall",
            answer,
            query=query,
            refusals=(*_ADMIN, 404, 501),
            access="admin",
        )
    yield Operation(
        "post",
        "/admin/recall/invalidate",
        "Give some of them no more",
        "recall",
        ("removed",),
        InvalidateAnswersShape,
        refusals=(*_ADMIN, *_BODY, 501, 503),
        access="admin",
    )


def _keys() -> Iterator[Operation]:
    def administers(
        method: Method, path: str, summary: str, answer: tuple[str, ...], **more: Any
    ) -> Operation:
        refusals = (*_ADMIN, 404, 501, *(_BODY if "body" in more else ()))
        return Operation(
            method,
            f"/admin/keys{path}",
            summary,
            "keys",
            answer,
            refusals=refusals,
            access="admin",
            **more,
        )

    yield administers("get", "", "All virtual keys", ("now_s", "keys"))
    yield administers("post", "", "A new key, told once", ("key", "id"), body=NewKeyShape, success=201)
    yield administers("delete", "/{key_id}", "Revoke a key", ("id",))
    yield administers("post", "/{key_id}/rotate", "A new secret for a key", ("key", "id"), body=RotateShape)

"""The OpenAPI document: whole, true to the routes, and what it says of bodies is what is taken."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import httpx2
import jsonschema
import pytest
from fastapi import APIRouter
from jsonschema import Draft202012Validator
from starlette.routing import BaseRoute, Route

from stockpot.backends.fake import FakeBackend
from stockpot.settings import Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import create_app
from stockpot.wire.openapi import build_document

DOCUMENT = build_document()
SCHEMAS = DOCUMENT["components"]["schemas"]


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All objects of a document."""
    if isinstance(node, dict):
        yield cast(dict[str, Any], node)
        for value in cast(dict[str, Any], node).values():
            yield from nodes(value)
    elif isinstance(node, list):
        for value in cast(list[Any], node):
            yield from nodes(value)


def plain(routes: Sequence[BaseRoute]) -> Iterator[Route]:
    """Routes, also those that FastAPI keeps in the routers they came in."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if isinstance(included, APIRouter):
            yield from plain(included.routes)
        else:
            assert isinstance(route, Route)
            yield route


def validator(name: str) -> Any:
    """Of a schema of the document; `Any`, for the library's own types are not whole."""
    return Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    )


def test_every_reference_leads_somewhere() -> None:
    references = {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node.get("$ref"), str)}
    assert len(references) > 50
    for reference in references:
        target: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


def test_every_schema_is_one_and_is_used() -> None:
    references = {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node.get("$ref"), str)}
    for name, schema in SCHEMAS.items():
        Draft202012Validator.check_schema(schema)
        assert f"#/components/schemas/{name}" in references, name


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names)


def test_every_route_is_documented() -> None:
    backend = FakeBackend()
    app = create_app(backend, Settings(), Metrics(backend.engine_stats))
    for route in plain(app.routes):
        path = re.sub(r"{(\w+):path}", r"{\1}", route.path)
        if path == "/openapi.json":
            continue
        assert path in DOCUMENT["paths"], path
        methods = {method.lower() for method in route.methods or ()}
        # Starlette gives every route for GET one for HEAD, which needs no word.
        assert methods - {"head"} <= DOCUMENT["paths"][path].keys(), path


def test_it_is_served(client: httpx2.Client) -> None:
    response = client.get("/openapi.json")
    assert response.json() == DOCUMENT
    assert response.json()["openapi"] == "3.1.0"


CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "fake", "prompt": "hi"}
RESPONSE: dict[str, Any] = {"model": "fake", "input": "hi"}
BODIES: list[tuple[str, str, dict[str, Any], bool]] = [
    ("/v1/chat/completions", "ChatShape", CHAT, True),
    ("/v1/chat/completions", "ChatShape", {**CHAT, "stop": "x"}, True),
    ("/v1/chat/completions", "ChatShape", {**CHAT, "stop": ["x", "y"]}, True),
    ("/v1/chat/completions", "ChatShape", {**CHAT, "stop": ""}, False),
    ("/v1/chat/completions", "ChatShape", {**CHAT, "logit_bias": {"7": -100}}, True),
    ("/v1/chat/completions", "ChatShape", {**CHAT, "logit_bias": {"x": 1}}, False),
    ("/v1/chat/completions", "ChatShape", {**CHAT, "temperature": 3}, False),
    ("/v1/chat/completions", "ChatShape", {**CHAT, "service_tier": "auto"}, True),
    ("/v1/completions", "CompletionShape", TEXT, True),
    ("/v1/completions", "CompletionShape", {**TEXT, "prompt": [1, 2]}, True),
    ("/v1/completions", "CompletionShape", {**TEXT, "prompt": [[1, 2]]}, True),
    ("/v1/completions", "CompletionShape", {**TEXT, "prompt": ["a", "b"]}, False),
    ("/v1/completions", "CompletionShape", {**TEXT, "prompt": ""}, False),
    ("/v1/responses", "ResponsesShape", RESPONSE, True),
    ("/v1/responses", "ResponsesShape", {**RESPONSE, "input": [{"role": "user", "content": "hi"}]}, True),
    ("/v1/responses", "ResponsesShape", {**RESPONSE, "input": [{"type": "item_reference"}]}, False),
    ("/v1/responses", "ResponsesShape", {**RESPONSE, "store": False, "conversation": None}, True),
    ("/v1/responses", "ResponsesShape", {**RESPONSE, "store": True}, False),
    ("/v1/responses", "ResponsesShape", {**RESPONSE, "previous_response_id": "resp_1"}, False),
    ("/v1/responses", "ResponsesShape", {**RESPONSE, "surprise": 1}, False),
]


@pytest.mark.parametrize(("path", "shape", "body", "good"), BODIES)
def test_bodies_are_taken_as_documented(
    client: httpx2.Client, path: str, shape: str, body: dict[str, Any], good: bool
) -> None:
    assert validator(f"request.{shape}").is_valid(body) is good
    assert (client.post(path, json=body).status_code == 200) is good


@pytest.mark.parametrize(
    ("given", "good"),
    [("a", True), (["a"], True), ([1], True), ([[1], [2]], True), ([], False), ("", False), ([-1], False)],
)
def test_inputs_of_embeddings_as_documented(given: Any, good: bool) -> None:
    body = {"model": "m", "input": given}
    assert validator("request.EmbeddingsShape").is_valid(body) is good


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/v1/chat/completions", CHAT, "ChatCompletion"),
        ("/v1/completions", TEXT, "Completion"),
        ("/v1/responses", RESPONSE, "ResponseBody"),
        ("/v1/messages", {**CHAT, "max_tokens": 9}, "AnthropicMessage"),
    ],
)
def test_answers_are_as_documented(
    client: httpx2.Client, path: str, body: dict[str, Any], answer: str
) -> None:
    validator(f"answer.{answer}").validate(client.post(path, json=body).json())
    refused = client.post(path, json={**body, "model": ""})
    error = "AnthropicErrorBody" if path == "/v1/messages" else "ErrorBody"
    validator(f"answer.{error}").validate(refused.json())
    with pytest.raises(jsonschema.ValidationError):
        validator(f"answer.{answer}").validate(refused.json())

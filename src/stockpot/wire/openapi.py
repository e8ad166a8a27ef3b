"""The OpenAPI 3.1 document of the server, GET /openapi.json: written by hand over the shapes themselves.

Schemas of requests are those of the shapes that check them, schemas of answers those of the structs that are
sent; what a shape checks by a function of its own is said here. What is declared only to be refused is left
out.
"""

from __future__ import annotations

import http
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec
from fastapi import APIRouter
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from stockpot import __version__
from stockpot.wire.anthropic_errors import AnthropicErrorBody
from stockpot.wire.errors import ErrorBody, json_response
from stockpot.wire.openapi_operations import Operation, operations
from stockpot.wire.service import Service

Json = dict[str, Any]

_SCHEMAS = "#/components/schemas/"
_LONG_NAME = re.compile(r"stockpot__wire__shapes_(\w+?)__(\w+)")
_PATH_PARAMETER = re.compile(r"{(\w+)}")
_RETRYABLE = frozenset({429, 503})
_ONLY_TO_REFUSE = frozenset({f"{_SCHEMAS}request.OtherItem", f"{_SCHEMAS}request.OtherPart"})


def router(service: Service) -> APIRouter:
    """The route of the document. It is made when it is first asked for."""
    del service
    routes = APIRouter()
    made: list[Json] = []

    async def document(request: Request) -> Response:
        del request
        if not made:
            made.append(build_document())
        return json_response(made[0])

    routes.add_route("/openapi.json", document, methods=["GET"])
    return routes


def build_document() -> Json:
    """The whole document, JSON-ready."""
    table = list(operations())
    schemas = _schemas(table)
    paths: dict[str, Json] = {}
    for operation in table:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stockpot",
            "version": __version__,
            "description": "A cache-first runtime for large language models, with the APIs of OpenAI and"
            " Anthropic.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _label(name: str, description: str, *, characters_max: int) -> Json:
    label = {"type": "string", "maxLength": characters_max, "pattern": "^[ -~]*$"}
    return {"name": name, "in": "header", "description": description, "schema": label}


_PARAMETERS: Mapping[str, Json] = {
    "session": _label(
        "x-stockpot-session", "Requests of one session have beginnings in common.", characters_max=128
    ),
    "task": _label(
        "x-stockpot-task", "What the request serves; its outcome can be told later.", characters_max=128
    ),
    "tags": _label(
        "x-stockpot-tags", "Labels for the accounts, separated by commas; 16 at most.", characters_max=4096
    ),
    "priority": {
        "name": "x-stockpot-priority",
        "in": "header",
        "description": "Who waits when not all can be served.",
        "schema": {"enum": ["high", "normal", "low"]},
    },
    "events": {
        "name": "x-stockpot-events",
        "in": "header",
        "description": "1: while a stream waits, events say why, not comments.",
        "schema": {"enum": ["0", "1"]},
    },
    "cache": {
        "name": "cache-control",
        "in": "header",
        "description": "Of answers that are kept (RFC 9111): no-cache, no-store, only-if-cached, max-age=N.",
        "schema": {"type": "string", "maxLength": 512, "pattern": "^[ -~]*$"},
        "examples": {"fresh": {"value": "no-cache"}, "recent": {"value": "only-if-cached, max-age=60"}},
    },
    "recall": {
        "name": "x-stockpot-recall",
        "in": "header",
        "description": "exact: no kept answer to another question, however alike.",
        "schema": {"enum": ["exact", "semantic"]},
    },
    "max_error": {
        "name": "x-stockpot-max-error",
        "in": "header",
        "description": "The share of wrong answers accepted, where that is less than the operator's.",
        "schema": {"type": "string", "pattern": r"^(0(\.[0-9]{1,9})?|1(\.0{1,9})?)$"},
    },
    "recall_tags": _label(
        "x-stockpot-recall-tags", "Labels by which the answer can be taken out again.", characters_max=512
    ),
}


_RECALLED: Mapping[str, Json] = {
    "x-stockpot-recall": {
        "description": "Where answers are kept: whether one was given, to the same request or by meaning.",
        "schema": {"enum": ["exact", "semantic", "miss", "bypass"]},
    },
    "x-stockpot-recall-reason": {
        "description": "Why it was given or not, a word for programs.",
        "schema": {"type": "string"},
    },
    "x-stockpot-recall-entry": {
        "description": "The id of the kept answer: the one given, or made of this one.",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    },
    "x-stockpot-recall-similarity": {
        "description": "The cosine between this question and the nearest that was considered.",
        "schema": {"type": "string", "pattern": r"^-?[01]\.[0-9]{4}$"},
    },
    "age": {
        "description": "Seconds since the given answer was made (RFC 9111, 5.1).",
        "schema": {"type": "integer", "minimum": 0},
    },
}
"""What the answers of operations that generate say besides."""

_HEADERS: Mapping[str, Json] = {
    "x-request-id": {
        "description": "The id the request is logged under: the client's own, or a new one.",
        "schema": {"type": "string"},
    },
    "retry-after": {
        "description": "Seconds until it is worth while to try again.",
        "schema": {"type": "integer", "minimum": 1},
    },
    **_RECALLED,
}


def _operation(operation: Operation) -> Json:
    names = _PATH_PARAMETER.findall(operation.path)
    parameters: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in names
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query]
    if operation.describes:
        parameters += [{"$ref": f"#/components/parameters/{name}"} for name in _PARAMETERS]
    words = re.findall(r"\w+", operation.path)
    described: Json = {
        "operationId": "_".join((operation.method, *words)),
        "summary": operation.summary,
        "tags": [operation.tag],
        "parameters": parameters,
        "responses": _responses(operation),
    }
    if operation.access != "anybody":
        # The empty one: a server without keys asks for none.
        described["security"] = [{"bearer": []}, {"key": []}, {}]
    if operation.body is not None:
        schema = {"$ref": f"{_SCHEMAS}request.{operation.body.__name__}"}
        described["requestBody"] = {
            "required": operation.body_required,
            "content": {"application/json": {"schema": schema}},
        }
    return described


def _responses(operation: Operation) -> Json:
    responses: Json = {}
    if operation.success is not None:
        content: Json = {}
        if operation.answer is not None:
            content["application/json"] = {"schema": _answer(operation.answer)}
        if operation.text:
            # Of a stream some take the schema to be an event's, others the text's: none holds for both.
            is_stream = operation.text == "text/event-stream"
            content[operation.text] = {"schema": {} if is_stream else {"type": "string"}}
        generates = operation.text == "text/event-stream"
        responses[str(operation.success)] = _response(
            operation.success, content, _RECALLED if generates else ()
        )
    for status in sorted({*operation.refusals, 500}):
        body = "AnthropicErrorBody" if operation.dialect == "anthropic" else "ErrorBody"
        schema = {"$ref": f"{_SCHEMAS}answer.{body}"}
        if operation.path == "/ready" and status == 503:
            schema = _answer(("status", "reason"))
        content = {} if operation.method == "head" else {"application/json": {"schema": schema}}
        responses[str(status)] = _response(status, content)
    return responses


def _response(status: int, content: Json, more_headers: Iterable[str] = ()) -> Json:
    names = ["x-request-id", *more_headers]
    if status in _RETRYABLE:
        names.append("retry-after")
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    response: Json = {"description": http.HTTPStatus(status).phrase, "headers": headers}
    if content:
        response["content"] = content
    return response


def _answer(answer: Any) -> Json:
    if isinstance(answer, tuple):
        return {"type": "object", "required": list(cast(tuple[str, ...], answer))}
    return {"$ref": f"{_SCHEMAS}answer.{answer.__name__}"}


def _schemas(table: list[Operation]) -> Json:
    shapes = {operation.body for operation in table if operation.body is not None}
    structs = {each.answer for each in table if isinstance(each.answer, type)}
    ordered = sorted(shapes, key=lambda shape: shape.__name__)
    _, requests = models_json_schema(
        [(shape, "validation") for shape in ordered], ref_template=f"{_SCHEMAS}request.{{model}}"
    )
    answers = msgspec.json.schema_components(
        [*sorted(structs, key=lambda struct: struct.__name__), ErrorBody, AnthropicErrorBody],
        ref_template=f"{_SCHEMAS}answer.{{name}}",
    )[1]
    schemas: Json = {}
    for name, schema in requests["$defs"].items():
        schemas[f"request.{_LONG_NAME.sub(_short, name)}"] = _tidied(schema)
    for name, schema in answers.items():
        schemas[f"answer.{name}"] = _tidied(schema)
    for shape, change in _CHANGES.items():
        for field, value in change.items():
            described = schemas[f"request.{shape}"]["properties"][field].get("description")
            schemas[f"request.{shape}"]["properties"][field] = (
                {**value, "description": described} if described else value
            )
    for shape in _EXTENSIBLE:
        schemas[f"request.{shape}"]["additionalProperties"] = True
    for name in _ONLY_TO_REFUSE:
        schemas.pop(name.removeprefix(_SCHEMAS), None)
    return schemas


def _tidied(node: Any) -> Any:
    """A schema without what says nothing: titles, defaults of null, alternatives that are always refused."""
    if isinstance(node, list):
        return [_tidied(each) for each in cast(list[Any], node) if not _is_only_to_refuse(each)]
    if not isinstance(node, dict):
        return node
    tidy: Json = {}
    for name, value in cast(Json, node).items():
        match name:
            case "title" | "discriminator":
                pass
            case "default" if value is None:
                pass
            case "$ref":
                tidy[name] = _LONG_NAME.sub(_short, value)
            case "properties":
                tidy[name] = {field: _tidied(schema) for field, schema in cast(Json, value).items()}
            case "oneOf":  # the alternatives of a union do not always exclude each other
                tidy["anyOf"] = _tidied(value)
            case _:
                tidy[name] = _tidied(value)
    return tidy


def _is_only_to_refuse(schema: Any) -> bool:
    return isinstance(schema, dict) and cast(Json, schema).get("$ref") in _ONLY_TO_REFUSE


def _short(match: re.Match[str]) -> str:
    return f"{match[1]}.{match[2]}"


def _or_null(*schemas: Json) -> Json:
    return {"anyOf": [*schemas, {"type": "null"}]}


_TOKENS: Json = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "minItems": 1,
}
_TEXT: Json = {"type": "string", "minLength": 1}
_STOP: Json = {"type": "string", "minLength": 1, "maxLength": 1024}
_GENERATION: Mapping[str, Json] = {
    "stop": _or_null(_STOP, {"type": "array", "items": _STOP, "maxItems": 16}),
    "logit_bias": _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": 4096,
        }
    ),
}
_CHANGES: Mapping[str, Mapping[str, Json]] = {
    "ChatShape": _GENERATION,
    "CompletionShape": {
        **_GENERATION,
        "prompt": {
            "anyOf": [
                _TEXT,
                _TOKENS,
                {"type": "array", "items": {"anyOf": [_TEXT, _TOKENS]}, "minItems": 1, "maxItems": 1},
            ]
        },
    },
    "EmbeddingsShape": {
        "input": {
            "anyOf": [
                _TEXT,
                _TOKENS,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2048},
                {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": 2048},
            ]
        }
    },
}
"""Fields that their shape checks by a function, of which pydantic cannot say what it takes."""

_EXTENSIBLE = ("ChatShape", "CompletionShape", "EmbeddingsShape")
"""Their other fields go on to the backend, which knows them or refuses them."""

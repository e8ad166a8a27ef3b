"""Requests as the JSON of OpenAI-compatible servers: what each of them understands, the rest refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import msgspec

from stockpot.backends.marked_parts import boundaries_of, marked_parts
from stockpot.backends.refused_extras import refuse_extras_of
from stockpot.errors import UnsupportedField
from stockpot.requests import (
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    Part,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)

Server = Literal["generic", "vllm", "llama-server", "stockpot", "sglang"]

Json = dict[str, Any]

_HOUR_S = 3600
_DOCUMENT = "document:"
_THINKING = ("thinking", "redacted_thinking")

_EFFORTS = ("low", "medium", "high")

_ANTHROPIC_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "standard_only"),
    "thinking": ({"type": "disabled"},),
}
"""Extra fields of the Anthropic API, and the values at which they ask for nothing special."""


def render_chat(request: ChatRequest, model: str, server: Server, allowed: Collection[str] = ()) -> bytes:
    """The body of /chat/completions, with the `allowed` extras (see `refused_extras`). Raises
    UnsupportedField."""
    generation = request.generation
    body = _generation(generation, model, server, allowed)
    body["messages"] = [
        _message(message, index, request.boundaries if server == "stockpot" else (), server)
        for index, message in enumerate(request.messages)
    ]
    if generation.max_tokens is not None:
        body["max_completion_tokens" if server == "generic" else "max_tokens"] = generation.max_tokens
    if generation.logprobs is not None:
        body["logprobs"] = True
        if generation.logprobs:
            body["top_logprobs"] = generation.logprobs
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_choice is not None:
            body["tool_choice"] = _tool_choice(request.tool_choice)
        if request.parallel_tool_calls is not None:
            body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.template_arguments:
        if server == "generic":
            raise _unsupported("chat_template_kwargs")
        body["chat_template_kwargs"] = request.template_arguments
    return msgspec.json.encode(body)


def render_completion(
    request: CompletionRequest, model: str, server: Server, allowed: Collection[str] = ()
) -> bytes:
    """The body of /completions, likewise. Raises UnsupportedField."""
    generation = request.generation
    body = _generation(generation, model, server, allowed)
    body["prompt"] = request.prompt
    if generation.max_tokens is not None:
        body["max_tokens"] = generation.max_tokens
    if generation.logprobs is not None:
        body["logprobs"] = generation.logprobs
    if request.echo:
        body["echo"] = True
    if request.boundaries and server == "stockpot":
        body["cache_control"] = _cache_control(request.boundaries[-1])
    return msgspec.json.encode(body)


def render_embedding(
    request: EmbeddingRequest, model: str, server: Server, allowed: Collection[str] = ()
) -> bytes:
    """The body of /embeddings, likewise. Raises UnsupportedField."""
    generation = request.generation
    refuse_extras_of(server, generation.extras, allowed)
    body: Json = {**generation.extras, "model": model, "input": request.inputs}
    if request.encoding_format != "float":
        body["encoding_format"] = request.encoding_format
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    if generation.user:
        body["user"] = generation.user
    return msgspec.json.encode(body)


def render_prompt(request: ChatRequest, model: str, server: Server) -> Json:
    """What decides the prompt of a chat and nothing else, for servers that count or render it."""
    body: Json = {
        "model": model,
        "messages": [_message(message, index, (), server) for index, message in enumerate(request.messages)],
    }
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if request.template_arguments:
        body["chat_template_kwargs"] = request.template_arguments
    return body


def _generation(generation: Generation, model: str, server: Server, allowed: Collection[str]) -> Json:
    """What chats and plain completions have in common; what the client's extras say never overrides it."""
    if generation.dialect == "openai":
        refuse_extras_of(server, generation.extras, allowed)
        body: Json = dict(generation.extras)
    else:
        body = _from_anthropic(generation)
    body["model"] = model
    if generation.stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    _sampling(generation.sampling, body, server)
    if generation.stop:
        body["stop"] = generation.stop
    if generation.choices != 1:
        body["n"] = generation.choices
    if generation.ignore_eos:
        if server == "generic":
            raise _unsupported("ignore_eos")
        body["ignore_eos"] = True
    if generation.user:
        body["user"] = generation.user
    wanted = generation.output_format
    if wanted.kind == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif wanted.kind == "json_schema":
        schema: Json = {"name": wanted.name or "answer", "schema": wanted.schema}
        if wanted.strict is not None:
            schema["strict"] = wanted.strict
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


_COMMON: tuple[tuple[str, Callable[[Sampling], Any], Any], ...] = (
    ("temperature", lambda s: s.temperature, 1.0),
    ("top_p", lambda s: s.top_p, 1.0),
    ("presence_penalty", lambda s: s.presence_penalty, 0.0),
    ("frequency_penalty", lambda s: s.frequency_penalty, 0.0),
)
_EXTENDED: tuple[tuple[str, Callable[[Sampling], Any], Any], ...] = (
    ("top_k", lambda s: s.top_k, 0),
    ("min_p", lambda s: s.min_p, 0.0),
    ("repetition_penalty", lambda s: s.repetition_penalty, 1.0),
)
_NO_SAMPLING = Sampling()


def _sampling(sampling: Sampling, body: Json, server: Server) -> None:
    if sampling == _NO_SAMPLING:
        return
    for name, value_of, default in _COMMON:
        if (value := value_of(sampling)) != default:
            body[name] = value
    for name, value_of, default in _EXTENDED:
        if (value := value_of(sampling)) == default:
            continue
        if server == "generic":
            raise _unsupported(name)
        if name == "repetition_penalty" and server == "llama-server":
            name = "repeat_penalty"
        body[name] = value
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if (seed := sampling.seed) is not None:
        # Seeds are signed on this wire.
        body["seed"] = seed - 2**64 if seed >= 2**63 else seed


def _from_anthropic(generation: Generation) -> Json:
    """The extra fields of a request of the Anthropic API, as far as they can be said here."""
    said: Json = {}
    for name, value in generation.extras.items():
        if name == "metadata":  # holds the user's id, which stands in `user`
            continue
        if name == "output_config" and value.keys() == {"effort"} and value["effort"] in _EFFORTS:
            said["reasoning_effort"] = value["effort"]
        elif value not in _ANTHROPIC_WITHOUT_EFFECT.get(name, ()):
            raise _unsupported(name)
    return said


def _message(message: Message, index: int, boundaries: tuple[CacheBoundary, ...], server: Server) -> Json:
    role = message.role
    if role == "developer" and server not in ("generic", "stockpot"):
        role = "system"  # what templates of open models call it
    body: Json = {"role": role}
    marks = boundaries_of(boundaries, index)
    content = message.content
    if message.tool_failed:  # there is no field that says it
        content = "Error: " + content
    if not message.parts and not any(place is not None for place in marks):
        body["content"] = content if content or not message.tool_calls else None
    else:
        body["content"] = [
            {
                **_part(part, f"messages[{index}].content"),
                **({"cache_control": _cache_control(mark)} if mark else {}),
            }
            for part, mark in marked_parts(message, marks)
            if not _is_thinking(part)
        ] or None
    if None in marks:
        body["cache_control"] = _cache_control(marks[None])
    if message.name is not None:
        body["name"] = message.name
    if message.tool_calls:
        body["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    return body


def _is_thinking(part: Part) -> bool:
    """Signed reasoning of the Anthropic API: for the model that signed it; others are asked without it."""
    return (
        isinstance(part, OpaquePart) and part.dialect == "anthropic" and part.value.get("type") in _THINKING
    )


def _part(part: Part, path: str) -> Json:
    match part:
        case TextPart(text):
            return {"type": "text", "text": text}
        case ImagePart():
            url = part.url if part.url is not None else f"data:{part.media_type};base64,{part.data}"
            image: Json = {"url": url}
            if part.detail is not None:
                image["detail"] = part.detail
            return {"type": "image_url", "image_url": image}
        case OpaquePart("openai", value):
            return dict(value)
        case OpaquePart():
            raise UnsupportedField(
                f"'{path}' has a part of the type {str(part.value.get('type'))[:40]!r}, which this model's"
                " backend cannot be given; remove it.",
                param=path,
            )


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool(tool: Tool) -> Json:
    function: Json = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> str | Json:
    if choice.mode == "named":
        return {"type": "function", "function": {"name": choice.name}}
    return choice.mode


def _cache_control(boundary: CacheBoundary) -> Json:
    control: Json = {"type": "ephemeral", "ttl": "1h" if boundary.ttl_s >= _HOUR_S else "5m"}
    if boundary.shared:
        control["scope"] = "shared"
    if tags := sorted(tag for tag in boundary.tags if not tag.startswith(_DOCUMENT)):
        control["tags"] = tags
    for tag in boundary.tags:
        if tag.startswith(_DOCUMENT):
            control["document"] = tag.removeprefix(_DOCUMENT)
    return control


def _unsupported(name: str) -> UnsupportedField:
    return UnsupportedField(
        f"The field {name!r} cannot be passed to this model's backend as it is; remove it.", param=name
    )

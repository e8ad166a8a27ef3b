"""Requests as the JSON of the Anthropic Messages API, cache boundaries too; what it lacks is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stockpot.backends.marked_parts import boundaries_of, marked_parts
from stockpot.errors import RequestError, UnsupportedField
from stockpot.requests import (
    TOOLS,
    CacheBoundary,
    ChatRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    Part,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
)

Json = dict[str, Any]

MAX_TOKENS = 4096
"""What is asked for where the client set no bound: the API demands one. An answer that reaches it ends with
the reason `length`, so it is never cut in silence."""

_HOUR_S = 3600
_NO_SAMPLING = Sampling()
_THINKING = ("thinking", "redacted_thinking")

_EFFORTS = ("low", "medium", "high", "xhigh", "max")

_OPENAI_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "store": (False, None),
    "service_tier": ("auto", "default", None),
    "modalities": (["text"], None),
    "verbosity": ("medium", None),
    "reasoning_effort": ("none", None),
}
"""Extra fields of the OpenAI API, and the values at which they ask for nothing special."""

_OPENAI_ANNOTATIONS = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Those that ask for nothing: labels, and hints where a prefix may be cached (boundaries say it here)."""


def render_messages(request: ChatRequest, model: str) -> bytes:
    """The body of /messages. Raises UnsupportedField; RequestError for arguments of a call that are no JSON
    object."""
    generation = request.generation
    _refuse_unsayable(generation)
    body = _extras(generation)
    system, turns = _turns(request)
    body["model"] = model
    body["max_tokens"] = generation.max_tokens or MAX_TOKENS
    if system:
        body["system"] = system
    body["messages"] = turns
    if generation.stream:
        body["stream"] = True
    sampling = generation.sampling
    if sampling.temperature != 1.0:
        body["temperature"] = sampling.temperature
    if sampling.top_p != 1.0:
        body["top_p"] = sampling.top_p
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if generation.stop:
        body["stop_sequences"] = generation.stop
    if request.tools:
        marks = boundaries_of(request.boundaries, TOOLS)
        body["tools"] = [_tool(tool, marks.get(index)) for index, tool in enumerate(request.tools)]
        if (choice := _tool_choice(request)) is not None:
            body["tool_choice"] = choice
    if generation.user and "metadata" not in body:
        body["metadata"] = {"user_id": generation.user}
    return msgspec.json.encode(body)


def _refuse_unsayable(generation: Generation) -> None:
    sampling = generation.sampling
    refused = {
        "n": generation.choices != 1,
        "logprobs": generation.logprobs is not None,
        "ignore_eos": generation.ignore_eos,
        "response_format": generation.output_format.kind == "json_object",
    }
    if sampling != _NO_SAMPLING:
        refused |= {
            "temperature": sampling.temperature > 1,
            "min_p": sampling.min_p != 0,
            "presence_penalty": sampling.presence_penalty != 0,
            "frequency_penalty": sampling.frequency_penalty != 0,
            "repetition_penalty": sampling.repetition_penalty != 1,
            "logit_bias": bool(sampling.logit_bias),
            "seed": sampling.seed is not None,
        }
    for name, is_set in refused.items():
        if is_set:
            hint = "; it takes 0 to 1" if name == "temperature" else ""
            raise UnsupportedField(
                f"The field {name!r} cannot be passed to this model's backend, which speaks the Anthropic"
                f" API{hint}; change or remove it.",
                param=name,
            )


def _extras(generation: Generation) -> Json:
    """The extra fields, as they are or as far as they can be said here, and the form of the output."""
    said: Json = {}
    if generation.dialect == "anthropic":
        said.update(generation.extras)
    else:
        for name, value in generation.extras.items():
            if name == "reasoning_effort" and value in _EFFORTS:
                said["output_config"] = {"effort": value}
            elif name not in _OPENAI_ANNOTATIONS and not _is_one_of(
                value, _OPENAI_WITHOUT_EFFECT.get(name, ())
            ):
                raise UnsupportedField(
                    f"The field {name[:80]!r} cannot be passed to this model's backend, which speaks the"
                    " Anthropic API; remove it.",
                    param=name[:200],
                )
    wanted = generation.output_format
    if wanted.kind == "json_schema":
        form = {"type": "json_schema", "schema": wanted.schema}
        said["output_config"] = {**said.get("output_config", {}), "format": form}
    return said


def _is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Equality as JSON has it: false is not 0."""
    return any(type(value) is type(one) and value == one for one in allowed)


def _turns(request: ChatRequest) -> tuple[list[Json], list[Json]]:
    """The system blocks, and the turns. Consecutive messages of one side are one turn: the results of all
    calls of a turn must stand together in the next."""
    system: list[Json] = []
    turns: list[Json] = []
    own = request.generation.dialect == "anthropic"
    for index, message in enumerate(request.messages):
        if message.name is not None:
            raise UnsupportedField(
                f"The field 'messages[{index}].name' cannot be passed to this model's backend; remove it.",
                param=f"messages[{index}].name",
            )
        blocks = _blocks(message, index, request.boundaries)
        if message.role in ("system", "developer"):
            if not (own and turns):
                # Anthropic's own translation of the OpenAI API also moves all of these to the front.
                system += blocks
                continue
            role = "system"
        else:
            role = "assistant" if message.role == "assistant" else "user"
        if not blocks:
            continue  # empty blocks are refused there
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return system, turns


def _blocks(message: Message, index: int, boundaries: Sequence[CacheBoundary]) -> list[Json]:
    """The content of a message, and the boundaries in it."""
    marks = boundaries_of(boundaries, index)
    blocks: list[Json] = []
    for part, mark in marked_parts(message, marks):
        block = _part(part, f"messages[{index}].content")
        if mark is not None and block["type"] not in _THINKING:
            block["cache_control"] = _cache_control(mark)
        blocks.append(block)
    if message.role == "tool":
        result: Json = {"type": "tool_result", "tool_use_id": message.tool_call_id or "", "content": blocks}
        if message.tool_failed:
            result["is_error"] = True
        blocks = [result]
    blocks += [
        _call(call, f"messages[{index}].tool_calls[{place}]") for place, call in enumerate(message.tool_calls)
    ]
    if (whole := marks.get(None)) is not None:
        for block in reversed(blocks):
            if block["type"] not in _THINKING:  # which take no boundary
                block["cache_control"] = _cache_control(whole)
                break
    return blocks


def _part(part: Part, path: str) -> Json:
    match part:
        case TextPart(text):
            return {"type": "text", "text": text}
        case ImagePart(detail="low" | "high"):
            raise UnsupportedField(
                f"'{path}' has an image with a 'detail', which cannot be passed to this model's backend;"
                " leave it out.",
                param=path,
            )
        case ImagePart(url=str(url)):
            return {"type": "image", "source": {"type": "url", "url": url}}
        case ImagePart():
            source = {"type": "base64", "media_type": part.media_type, "data": part.data}
            return {"type": "image", "source": source}
        case OpaquePart("anthropic", value):
            return dict(value)
        case OpaquePart():
            raise UnsupportedField(
                f"'{path}' has a part of the type {str(part.value.get('type'))[:40]!r}, which this model's"
                " backend cannot be given; remove it.",
                param=path,
            )


def _call(call: ToolCall, path: str) -> Json:
    try:
        arguments = msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(
            f"'{path}.function.arguments' is no JSON object; correct it.", param=f"{path}.function.arguments"
        ) from error
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _tool(tool: Tool, mark: CacheBoundary | None) -> Json:
    rendered: Json = {
        "name": tool.name,
        "input_schema": tool.parameters or {"type": "object"},
    }
    if tool.description is not None:
        rendered["description"] = tool.description
    if tool.strict:
        rendered["strict"] = True
    if mark is not None:
        rendered["cache_control"] = _cache_control(mark)
    return rendered


def _tool_choice(request: ChatRequest) -> Json | None:
    choice = request.tool_choice
    one_at_a_time = request.parallel_tool_calls is False
    if choice is None:
        return {"type": "auto", "disable_parallel_tool_use": True} if one_at_a_time else None
    kinds = {"auto": "auto", "none": "none", "required": "any", "named": "tool"}
    rendered: Json = {"type": kinds[choice.mode]}
    if choice.mode == "named":
        rendered["name"] = choice.name
    if one_at_a_time and choice.mode != "none":
        rendered["disable_parallel_tool_use"] = True
    return rendered


def _cache_control(boundary: CacheBoundary) -> Json:
    return {"type": "ephemeral", "ttl": "1h" if boundary.ttl_s >= _HOUR_S else "5m"}

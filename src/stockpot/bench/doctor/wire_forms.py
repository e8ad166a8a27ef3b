"""Conversations as they stand in files: bodies of three APIs, alone, wrapped, recorded, and as a
transcript."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

from stockpot.bench.doctor.conversation import Conversation, Turn
from stockpot.bench.doctor.provider import AutomaticCache, Counted, MarkedCache

Json = dict[str, Any]
Form = Literal["plain", "wrapped", "recorded", "transcript"]

_OWN_TTL_S = 1e9
_DONE: Json = {"role": "assistant", "content": "Done."}


@dataclass(frozen=True, slots=True)
class Written:
    """A line of a file: when, of which conversation, and what."""

    at_s: float
    conversation: str
    text: str


def lines_of(
    conversation: Conversation, form: Form, chance: random.Random, *, counted: bool
) -> Iterator[Written]:
    """`counted`: with the provider's figures of usage."""
    if form == "transcript":
        yield from _transcript(conversation, chance)
        return
    own = any(turn.backend for turn in conversation.turns)
    automatic = AutomaticCache(minimum=16, step=16, ttl_s=_OWN_TTL_S) if own else AutomaticCache()
    marked = MarkedCache()
    for number, turn in enumerate(conversation.turns):
        body = wire_body(conversation, turn)
        if conversation.api == "anthropic":
            usage = marked.ask(body, turn.at_s)
        else:
            usage = automatic.ask(body, turn.at_s, turn.backend, forget=turn.forget)
        line = _line(conversation, turn, body, form, f"{conversation.name}-{number}")
        if counted or own:
            _tell(line, usage, form, conversation.api == "anthropic")
        yield Written(turn.at_s, conversation.name, json.dumps(line, ensure_ascii=chance.random() < 0.5))


def requests_of(conversation: Conversation) -> list[Json]:
    """For tools that are given one conversation: when, whose API, the body, the same in OpenAI's chat shape,
    and the answer with its usage."""
    automatic, marked = AutomaticCache(), MarkedCache()
    made: list[Json] = []
    for turn in conversation.turns:
        body, is_anthropic = wire_body(conversation, turn), conversation.api == "anthropic"
        usage = marked.ask(body, turn.at_s) if is_anthropic else automatic.ask(body, turn.at_s, turn.backend)
        line: Json = {"response": {"id": "x"}}
        _tell(line, usage, "wrapped", is_anthropic)
        provider = {"openai": "openai", "anthropic": "anthropic"}.get(conversation.api, "openai")
        made.append(
            {
                "at": turn.at_s,
                "provider": provider,
                "body": body,
                "chat": turn.body,
                "response": line["response"],
            }
        )
    return made


def _line(conversation: Conversation, turn: Turn, body: Json, form: Form, id: str) -> Json:
    shape = {"openai": "openai-chat", "anthropic": "anthropic", "responses": "openai-responses"}[
        conversation.api
    ]
    when = datetime.fromtimestamp(turn.at_s, UTC).isoformat()
    extra: Json = {"session_id": conversation.session} if conversation.session else {}
    if form == "plain":
        return {**body, "timestamp": when, **extra}
    if form == "wrapped":
        return {"timestamp": when, "request": body, "response": {"id": id}, **extra}
    provider = "vllm" if turn.backend else {"anthropic": "anthropic"}.get(conversation.api, "openai")
    return {
        "at": turn.at_s,
        "request_id": id,
        "shape": shape,
        "body": body,
        "model": body["model"],
        "provider": provider,
        "backend": turn.backend,
        "session": conversation.session,
        "tenant": conversation.tenant,
    }


def _tell(line: Json, usage: Counted, form: Form, is_anthropic: bool) -> None:
    if form == "recorded":
        line |= {
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "written_tokens": usage.written,
        }
        return
    if is_anthropic:
        told: Json = {
            "input_tokens": usage.prompt - usage.cached - usage.written,
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": usage.written,
            "output_tokens": 40,
        }
    else:
        told = {
            "prompt_tokens": usage.prompt,
            "completion_tokens": 40,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
        }
    if form == "plain":
        line["usage"] = told
    else:
        line["response"]["usage"] = told


def wire_body(conversation: Conversation, turn: Turn) -> Json:
    """A request in the words of its API."""
    if conversation.api == "anthropic":
        return _anthropic(conversation, turn.body)
    if conversation.api == "responses":
        return _responses(turn.body)
    return turn.body


def _anthropic(conversation: Conversation, body: Json) -> Json:
    system, *messages = body["messages"]
    made: Json = {name: value for name, value in body.items() if name not in ("messages", "tools")}
    made["max_tokens"] = 1024
    if "tools" in body:
        made["tools"] = [
            {
                "name": tool["function"]["name"],
                "description": tool["function"]["description"],
                "input_schema": tool["function"]["parameters"],
            }
            for tool in body["tools"]
        ]
    made["system"] = [{"type": "text", "text": system["content"]}]
    turns: list[Json] = []
    for message in messages:
        role, blocks = _blocks(message)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    made["messages"] = turns
    if conversation.marks:
        if "end_mark_only" not in conversation.notes:
            made["system"][0]["cache_control"] = {"type": "ephemeral"}
        turns[-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}
    return made


def _blocks(message: Json) -> tuple[str, list[Json]]:
    if message["role"] == "tool":
        return "user", [
            {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
        ]
    blocks: list[Json] = []
    content = message["content"]
    given = cast("list[Json]", content) if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in given:
        if part.get("type") == "image_url":
            image = cast("Json", part["image_url"])
            data = str(image["url"]).partition(",")[2]
            source = {"type": "base64", "media_type": "image/jpeg", "data": data}
            blocks.append({"type": "image", "source": source})
        elif part.get("text"):
            blocks.append(dict(part))
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = json.loads(function["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return message["role"], blocks


def _responses(body: Json) -> Json:
    system, *messages = body["messages"]
    made: Json = {name: value for name, value in body.items() if name not in ("messages", "tools")}
    if "tools" in body:
        made["tools"] = [{"type": "function", **tool["function"]} for tool in body["tools"]]
    items: list[Json] = []
    for message in messages:
        if message["role"] == "tool":
            call_id = message["tool_call_id"]
            items.append({"type": "function_call_output", "call_id": call_id, "output": message["content"]})
            continue
        if message["content"]:
            items.append({"role": message["role"], "content": message["content"]})
        for call in message.get("tool_calls", ()):
            items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    return {**made, "instructions": system["content"], "input": items}


def _transcript(conversation: Conversation, chance: random.Random) -> Iterator[Written]:
    """As Claude Code writes one: a line for each message, with the usage on those of the model."""
    cache = MarkedCache()
    done = 1
    session = f"{chance.getrandbits(64):016x}"
    for number, turn in enumerate(conversation.turns):
        for message in turn.body["messages"][done:]:
            role, blocks = _blocks(message)
            line: Json = {
                "type": role,
                "sessionId": session,
                "timestamp": datetime.fromtimestamp(turn.at_s - 0.5, UTC).isoformat(),
                "message": {"role": role, "content": blocks},
            }
            if role != "assistant":
                yield Written(turn.at_s - 0.5, conversation.name, json.dumps(line))
        done = len(turn.body["messages"])
        usage = cache.ask(_anthropic(conversation, turn.body), turn.at_s)
        following = (
            conversation.turns[number + 1].body["messages"] if number + 1 < len(conversation.turns) else None
        )
        answer = following[done] if following and len(following) > done else _DONE
        line = {
            "type": "assistant",
            "sessionId": session,
            "timestamp": datetime.fromtimestamp(turn.at_s, UTC).isoformat(),
            "message": {
                "id": f"msg_{conversation.name}_{number}",
                "role": "assistant",
                "model": "claude-sonnet-4-5",
                "content": _blocks(answer)[1],
                "usage": {
                    "input_tokens": usage.prompt - usage.cached - usage.written,
                    "cache_read_input_tokens": usage.cached,
                    "cache_creation_input_tokens": usage.written,
                    "output_tokens": 30,
                },
            },
        }
        yield Written(turn.at_s, conversation.name, json.dumps(line))

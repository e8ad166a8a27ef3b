"""One conversation of a program, request by request, healthy: what the causes then break."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from typing import Any, Literal

from stockpot.bench.doctor.templates import Template, result, said, system_prompt, tools_of

Json = dict[str, Any]
Api = Literal["openai", "anthropic", "responses"]


@dataclass(slots=True)
class Turn:
    """A request: its body in OpenAI's shape, when it comes, to which server, and whether the cache had lost
    what it could have found."""

    body: Json
    at_s: float
    backend: str = ""
    forget: bool = False


@dataclass(slots=True)
class Conversation:
    """`label` is the cause it was broken by ("" is healthy), `path` where."""

    name: str
    template: str
    turns: list[Turn]
    api: Api
    tenant: str = ""
    session: str = ""
    marks: bool = True
    label: str = ""
    path: str = ""
    minimum_met: bool = True
    notes: list[str] = field(default_factory=list[str])


MODELS: dict[Api, str] = {"openai": "gpt-5", "anthropic": "claude-sonnet-4-5", "responses": "gpt-5"}


def healthy(
    name: str,
    template: Template,
    api: Api,
    chance: random.Random,
    at_s: float,
    *,
    turns: int = 6,
    characters: int = 7_000,
    system_seed: int = 0,
) -> Conversation:
    """Append-only, with tools where the program has some; each request a little later than the one before."""
    system = system_prompt(template, random.Random(system_seed), characters)
    messages: list[Json] = [{"role": "system", "content": system}]
    made: list[Turn] = []
    calls = 0
    for _ in range(turns):
        messages.append({"role": "user", "content": said(template.questions, chance)})
        made.append(_turn(template, api, messages, at_s))
        at_s += chance.uniform(4, 60)
        if template.tools and chance.random() < 0.5:
            calls += 1
            call = {
                "id": f"call_{chance.getrandbits(40):010x}",
                "type": "function",
                "function": {
                    "name": chance.choice(template.tools),
                    "arguments": json.dumps({"what": said(template.questions, chance)[:40], "limit": calls}),
                },
            }
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            content = json.dumps(result(chance), ensure_ascii=False)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
            made.append(_turn(template, api, messages, at_s))
            at_s += chance.uniform(2, 20)
        messages.append({"role": "assistant", "content": said(template.answers, chance)})
    return Conversation(name, template.name, made, api, session=f"s-{name}" if chance.random() < 0.3 else "")


def _turn(template: Template, api: Api, messages: list[Json], at_s: float) -> Turn:
    body: Json = {"model": MODELS[api], "messages": copy.deepcopy(messages)}
    if template.tools:
        body["tools"] = tools_of(template)
    return Turn(body, at_s)


def system_of(turn: Turn) -> str:
    return turn.body["messages"][0]["content"]


def with_system(turn: Turn, text: str) -> None:
    """Another system prompt in this request."""
    turn.body["messages"][0] = {"role": "system", "content": text}

"""Breaks a healthy conversation in one way, as programs do it by mistake."""

from __future__ import annotations

import base64
import copy
import json
import random
import unicodedata
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import MappingProxyType
from typing import Any, cast

from stockpot.bench.doctor.conversation import Conversation, Turn, system_of, with_system

Json = dict[str, Any]
Break = Callable[[Conversation, random.Random], str]
"""Changes the requests of a conversation; where they differ then, as a path with [] for indices."""

_SYSTEM = "messages[].content"


def _early(turn: Turn, line: str, chance: random.Random) -> None:
    """Somewhere in the first third of the system prompt."""
    lines = system_of(turn).split("\n")
    place = chance.randrange(0, max(1, len(lines) // 3))
    with_system(turn, "\n".join([*lines[:place], line, *lines[place:]]))


def _each(conversation: Conversation, chance: random.Random, line: Callable[[int, Turn], str]) -> str:
    seed = chance.random()
    for number, turn in enumerate(conversation.turns):
        _early(turn, line(number, turn), random.Random(seed))
    return _SYSTEM


def timestamp(conversation: Conversation, chance: random.Random) -> str:
    forms: tuple[Callable[[datetime], str], ...] = (
        lambda at: f"Current time: {at.isoformat()}",
        lambda at: f"Now: {at:%A, %d %B %Y %H:%M:%S} UTC",
        lambda at: f'<env time="{at:%Y-%m-%d %H:%M:%S}" />',
        lambda at: f"Server time is {int(at.timestamp())}.",
        lambda at: f"It is {at:%I:%M:%S %p}.",
    )
    form = chance.choice(forms)
    return _each(conversation, chance, lambda _, turn: form(datetime.fromtimestamp(turn.at_s, UTC)))


def date(conversation: Conversation, chance: random.Random) -> str:
    form = chance.choice(("Today is %A, %B %d, %Y.", "Date: %Y-%m-%d", "Heute ist der %d.%m.%Y."))
    # Around midnight: the day changes while people talk.
    middle = conversation.turns[len(conversation.turns) // 2].at_s
    midnight = datetime.fromtimestamp(middle, UTC).replace(hour=0, minute=0, second=0) + timedelta(days=1)
    shift = midnight.timestamp() - middle
    for turn in conversation.turns:
        turn.at_s += shift
    return _each(conversation, chance, lambda _, turn: datetime.fromtimestamp(turn.at_s, UTC).strftime(form))


def random_id(conversation: Conversation, chance: random.Random) -> str:
    forms = (
        lambda: f"Request id: {uuid.UUID(int=chance.getrandbits(128))}",
        lambda: f"trace_id={chance.getrandbits(128):032x}",
        lambda: f"Correlation: req_{base64.b32encode(chance.randbytes(10)).decode().lower()}",
        lambda: f"Session token {base64.b64encode(chance.randbytes(12), altchars=b'ab').decode()} is valid.",
    )
    form = chance.choice(forms)
    return _each(conversation, chance, lambda _n, _t: form())


def counter(conversation: Conversation, chance: random.Random) -> str:
    start = chance.randrange(1, 500)
    form = chance.choice(("This is message number {n} of this session.", "Turn {n}.", "Requests served: {n}"))
    return _each(conversation, chance, lambda number, _: form.format(n=start + number))


def key_order(conversation: Conversation, chance: random.Random) -> str:
    state = {"customer": "K-17", "plan": "basic", "open": ["a", "b"], "limits": {"day": 5, "month": 90}}
    if chance.random() < 0.5 and conversation.turns[0].body.get("tools"):
        for turn in conversation.turns:
            for tool in turn.body["tools"]:
                tool["function"]["parameters"] = _shuffled(tool["function"]["parameters"], chance)
        _unlike(conversation, chance)
        return "tools[].function.parameters"
    return _each(conversation, chance, lambda number, _: "State: " + json.dumps(_rotated(state, number)))


def _shuffled(value: Any, chance: random.Random) -> Any:
    if not isinstance(value, dict):
        return value
    items = list(cast("Json", value).items())
    chance.shuffle(items)
    return {name: _shuffled(each, chance) for name, each in items}


def _rotated(value: Json, by: int) -> Json:
    items = list(value.items())
    by %= len(items)
    return dict(items[by:] + items[:by])


def _unlike(conversation: Conversation, chance: random.Random) -> None:
    """A shuffle may leave all as it was."""
    turns = conversation.turns
    while all(json.dumps(a.body["tools"]) == json.dumps(b.body["tools"]) for a, b in pairwise(turns)):
        for turn in turns:
            for tool in turn.body["tools"]:
                tool["function"]["parameters"] = _shuffled(tool["function"]["parameters"], chance)


def white_space(conversation: Conversation, chance: random.Random) -> str:
    way = chance.randrange(3)
    for number, turn in enumerate(conversation.turns):
        text, late = system_of(turn), number >= _from(conversation)
        if way == 0 and late:
            with_system(turn, text.replace("\n- ", "\n\n- ", 3))
        elif way == 1 and late:
            with_system(turn, text.replace(" and ", "  and ").replace(" und ", "  und ").replace(". ", ".  "))
        elif way == 2:
            facts = {"shop": "north", "stock": [1, 2, 3], "open": True}
            line = json.dumps(facts, indent=2 if late else None)
            with_system(turn, line + "\n" + text)
    return _SYSTEM


def unicode_form(conversation: Conversation, chance: random.Random) -> str:
    way = chance.randrange(2)
    for number, turn in enumerate(conversation.turns):
        text = "Die Größe der Räder: don't guess, ask the café's owner.\n" + system_of(turn)
        if number >= _from(conversation):
            text = unicodedata.normalize("NFD", text) if way else text.replace("'", "\u2019")
        with_system(turn, text)
    return _SYSTEM


def _from(conversation: Conversation) -> int:
    """From this request on."""
    return max(1, len(conversation.turns) // 2)


def _tool(name: str) -> Json:
    parameters = {"type": "object", "properties": {"x": {"type": "string"}}}
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name} for you.", "parameters": parameters},
    }


def tool_added(conversation: Conversation, chance: random.Random) -> str:
    for turn in conversation.turns[_from(conversation) :]:
        tools: list[Json] = turn.body["tools"]
        tools.insert(0 if chance.random() < 2 else 1, _tool("escalate"))
    return "tools[]"


def tool_removed(conversation: Conversation, chance: random.Random) -> str:
    del chance
    for turn in conversation.turns[_from(conversation) :]:
        del turn.body["tools"][0]
    return "tools[]"


def tool_reordered(conversation: Conversation, chance: random.Random) -> str:
    del chance
    for turn in conversation.turns[_from(conversation) :]:
        turn.body["tools"].reverse()
    return "tools[]"


def tool_changed(conversation: Conversation, chance: random.Random) -> str:
    way = chance.randrange(2)
    for turn in conversation.turns[_from(conversation) :]:
        function: Json = turn.body["tools"][0]["function"]
        if way:
            function["description"] += " Use it sparingly, and never twice for one question."
        else:
            function["parameters"]["properties"]["limit"]["maximum"] = 20
    return "tools[]"


def system_changed(conversation: Conversation, chance: random.Random) -> str:
    modes = chance.choice((("planning", "executing"), ("polite", "brief"), ("German", "English")))
    for turn in conversation.turns:
        late = turn in conversation.turns[_from(conversation) :]
        with_system(turn, f"Mode of this conversation: {modes[late]}.\n" + system_of(turn))
    return _SYSTEM


def history_edited(conversation: Conversation, chance: random.Random) -> str:
    last = conversation.turns[-1].body["messages"]
    way = chance.randrange(2) if any(each["role"] == "tool" for each in last[:-4]) else 0
    for turn in conversation.turns:
        messages: list[Json] = turn.body["messages"]
        for place, message in enumerate(messages[:-3]):
            if way and message["role"] == "tool":
                messages[place] = {**message, "content": "[old tool result cleared]"}
            elif not way and message["role"] == "assistant" and message.get("content"):
                text = message["content"]
                if place < len(messages) - 4:
                    messages[place] = {**message, "content": "Answer (short): " + text[len(text) // 2 :]}
    return "messages[].content"


def history_truncated(conversation: Conversation, chance: random.Random) -> str:
    way = chance.randrange(2)
    for turn in conversation.turns:
        messages: list[Json] = turn.body["messages"]
        while len(messages) > 6:
            drop = 1 if not way else 2  # with the first question kept as the task, or without
            del messages[drop]
            while len(messages) > drop and messages[drop]["role"] == "tool":
                del messages[drop]
    return "messages[]"


def model_changed(conversation: Conversation, chance: random.Random) -> str:
    other = "claude-sonnet-5" if conversation.api == "anthropic" else "gpt-5-mini"
    del chance
    for turn in conversation.turns[_from(conversation) :]:
        turn.body["model"] = other
    return "model"


def parameters_changed(conversation: Conversation, chance: random.Random) -> str:
    del chance
    for turn in conversation.turns[_from(conversation) :]:
        if conversation.api == "anthropic":
            turn.body["thinking"] = {"type": "enabled", "budget_tokens": 2048}
        elif conversation.api == "responses":
            turn.body["text"] = {"format": {"type": "json_object"}}
        else:
            turn.body["response_format"] = {"type": "json_object"}
    return {"anthropic": "thinking", "responses": "text"}.get(conversation.api, "response_format")


def image_reencoded(conversation: Conversation, chance: random.Random) -> str:
    pixels = chance.randbytes(900)
    for turn in conversation.turns:
        fresh = bytearray(pixels)
        for _ in range(40):
            fresh[chance.randrange(20, len(fresh))] = chance.randrange(256)
        url = "data:image/jpeg;base64," + base64.b64encode(bytes(fresh)).decode()
        message: Json = turn.body["messages"][1]
        turn.body["messages"][1] = {
            "role": "user",
            "content": [
                {"type": "text", "text": message["content"]},
                {"type": "image_url", "image_url": {"url": url}},
            ],
        }
    return "messages[].content[].image_url.url"


def ttl_expired(conversation: Conversation, chance: random.Random) -> str:
    pause_s = chance.uniform(400, 900) if conversation.api == "anthropic" else chance.uniform(3_700, 9_000)
    for turn in conversation.turns[_from(conversation) :]:
        turn.at_s += pause_s
    return ""


def below_minimum(conversation: Conversation, chance: random.Random) -> str:
    del chance
    conversation.minimum_met = False
    return ""


def no_boundary(conversation: Conversation, chance: random.Random) -> str:
    del chance
    conversation.marks = False
    return ""


def beyond_lookback(conversation: Conversation, chance: random.Random) -> str:
    """Many calls between two requests, and one boundary at the end."""
    middle = _from(conversation)
    calls: list[Json] = []
    results: list[Json] = []
    for number in range(14):
        id = f"call_{number:03d}{chance.getrandbits(20):05x}"
        calls.append(
            {"id": id, "type": "function", "function": {"name": "read", "arguments": '{"what":"x"}'}}
        )
        results.append({"role": "tool", "tool_call_id": id, "content": f"row {number}: " + "value " * 10})
    many = [{"role": "assistant", "content": None, "tool_calls": calls}, *results]
    at = len(conversation.turns[middle - 1].body["messages"])
    for turn in conversation.turns[middle:]:
        turn.body["messages"] = [
            *turn.body["messages"][:at],
            *copy.deepcopy(many),
            *turn.body["messages"][at:],
        ]
    conversation.notes.append("end_mark_only")
    return ""


def routed_elsewhere(conversation: Conversation, chance: random.Random) -> str:
    del chance
    for number, turn in enumerate(conversation.turns):
        turn.backend = f"gpu-{number % 3}"
    return ""


def evicted(conversation: Conversation, chance: random.Random) -> str:
    del chance
    for turn in conversation.turns:
        turn.backend = "gpu-0"
        turn.forget = True
    return ""


BREAKS: Mapping[str, Break] = MappingProxyType(
    {
        "timestamp": timestamp,
        "date": date,
        "uuid": random_id,
        "counter": counter,
        "key_order": key_order,
        "white_space": white_space,
        "unicode_form": unicode_form,
        "tool_added": tool_added,
        "tool_removed": tool_removed,
        "tool_reordered": tool_reordered,
        "tool_changed": tool_changed,
        "system_changed": system_changed,
        "history_edited": history_edited,
        "history_truncated": history_truncated,
        "model_changed": model_changed,
        "parameters_changed": parameters_changed,
        "image_reencoded": image_reencoded,
        "ttl_expired": ttl_expired,
        "below_minimum": below_minimum,
        "no_boundary": no_boundary,
        "beyond_lookback": beyond_lookback,
        "routed_elsewhere": routed_elsewhere,
        "evicted": evicted,
    }
)

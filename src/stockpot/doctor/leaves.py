"""The texts in a piece that a model reads, in order, each with its path: compared where raw JSON differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import msgspec

from stockpot.doctor.exchange import Piece

LeafKind = Literal["text", "json", "label", "image"]

_IMAGES = ("image", "image_url", "input_image", "document", "file", "input_file", "input_audio")
_NOT_READ = frozenset({"cache_control", "type", "id", "status", "signature", "index", "phase"})
"""Fields that are no part of what a model reads, or are known by where they stand."""


class Leaf(msgspec.Struct, frozen=True, gc=False):
    """`label`: a name or a role. `json`: JSON that is rendered into the prompt, keys in the order in which
    they stood. `image`: the bytes of a medium, or its address."""

    path: str
    text: str
    kind: LeafKind


def leaves(piece: Piece) -> tuple[Leaf, ...]:
    """Raises msgspec.MsgspecError for what is no JSON."""
    value: Any = msgspec.json.decode(piece.raw)
    if piece.kind == "tool":
        return tuple(_tool(value, piece.path))
    if isinstance(value, str):
        return (Leaf(piece.path, value, "text"),)
    return tuple(_message(value, piece.path))


def text_of(piece: Piece) -> str:
    """All of them, for counting."""
    return "\n".join(leaf.text for leaf in leaves(piece))


def in_order(value: object) -> str:
    """JSON as it is, without white space: the keys as they stood."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _tool(value: Any, path: str) -> Iterator[Leaf]:
    if not isinstance(value, dict):
        yield Leaf(path, in_order(value), "json")
        return
    tool = cast("dict[str, Any]", value)
    if isinstance(tool.get("function"), dict):
        tool, path = cast("dict[str, Any]", tool["function"]), f"{path}.function"
    for name, each in tool.items():
        if name in _NOT_READ and not (name == "type" and "name" not in tool):
            continue
        if isinstance(each, str):
            yield Leaf(f"{path}.{name}", each, "label" if name == "name" else "text")
        else:
            yield Leaf(f"{path}.{name}", in_order(each), "json")


def _message(value: Any, path: str) -> Iterator[Leaf]:
    if not isinstance(value, dict):
        yield Leaf(path, in_order(value), "json")
        return
    message = cast("dict[str, Any]", value)
    if isinstance(role := message.get("role"), str):
        yield Leaf(f"{path}.role", role, "label")
    for name in ("name", "tool_call_id", "call_id", "tool_use_id"):
        if isinstance(label := message.get(name), str):
            yield Leaf(f"{path}.{name}", label, "label")
    for name in ("text", "thinking", "summary", "content", "output", "input", "arguments", "refusal"):
        if name in message:
            yield from _content(message[name], f"{path}.{name}")
    calls = message.get("tool_calls")
    for place, call in enumerate(cast("list[Any]", calls) if isinstance(calls, list) else ()):
        yield from _call(call, f"{path}.tool_calls[{place}]")


def _content(value: Any, path: str) -> Iterator[Leaf]:
    if value is None:
        return
    if isinstance(value, str):
        yield Leaf(path, value, "json" if path.endswith(".arguments") else "text")
        return
    if not isinstance(value, list):
        yield Leaf(path, in_order(value), "json")
        return
    for place, part in enumerate(cast("list[Any]", value)):
        here = f"{path}[{place}]"
        if isinstance(part, str):
            yield Leaf(here, part, "text")
        elif not isinstance(part, dict):
            yield Leaf(here, in_order(part), "json")
        else:
            yield from _part(cast("dict[str, Any]", part), here)


def _part(part: Mapping[str, Any], path: str) -> Iterator[Leaf]:
    kind = part.get("type")
    if isinstance(text := part.get("text"), str):
        yield Leaf(f"{path}.text", text, "text")
    elif kind in _IMAGES:
        name = next((each for each in part if each not in _NOT_READ), "")
        value: Any = part.get(name)
        while isinstance(value, dict):
            inner = cast("dict[str, Any]", value)
            key = next((k for k in ("url", "data", "file_data", "file_id") if k in inner), None)
            if key is None:
                break
            name = f"{name}.{key}"
            value = inner[key]
        text = value if isinstance(value, str) else in_order(cast("Any", value))
        yield Leaf(f"{path}.{name}", text, "image")
    elif kind == "tool_use":
        yield Leaf(f"{path}.name", str(part.get("name")), "label")
        yield Leaf(f"{path}.input", in_order(part.get("input")), "json")
    elif kind == "tool_result":
        yield Leaf(f"{path}.tool_use_id", str(part.get("tool_use_id")), "label")
        yield from _content(part.get("content"), f"{path}.content")
    else:
        yield Leaf(path, in_order({k: v for k, v in part.items() if k != "cache_control"}), "json")


def _call(call: Any, path: str) -> Iterator[Leaf]:
    if not isinstance(call, dict):
        yield Leaf(path, in_order(call), "json")
        return
    given = cast("dict[str, Any]", call)
    function: Any = given.get("function", given)
    if isinstance(label := given.get("id"), str):
        yield Leaf(f"{path}.id", label, "label")
    if isinstance(function, dict):
        known = cast("dict[str, Any]", function)
        yield Leaf(f"{path}.function.name", str(known.get("name")), "label")
        arguments = known.get("arguments")
        text = arguments if isinstance(arguments, str) else in_order(arguments)
        yield Leaf(f"{path}.function.arguments", text, "json")

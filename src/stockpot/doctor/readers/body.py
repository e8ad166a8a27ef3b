"""The body of a request in the shapes of the OpenAI and Anthropic APIs, cut into pieces and not decoded."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import msgspec
from msgspec import UNSET, Raw, UnsetType

from stockpot.doctor.exchange import Piece, Shape
from stockpot.doctor.leaves import leaves

_PARAMETERS = (
    "tool_choice",
    "parallel_tool_calls",
    "thinking",
    "reasoning",
    "reasoning_effort",
    "response_format",
    "text",
    "output_config",
    "chat_template_kwargs",
    "cache_control",
    "prompt_cache_retention",
    "prompt_cache_key",
)
"""Fields that are rendered into the prompt, or that the cache is keyed by (Anthropic: "What invalidates the
cache")."""
_LOOKS_AHEAD = 16
_KEYS_MAX = 100_000


class Body(msgspec.Struct, rename=None):
    """What is read of a body; the rest is left alone."""

    model: str = ""
    messages: list[Raw] | UnsetType = UNSET
    system: Raw | UnsetType = UNSET
    tools: list[Raw] | UnsetType | None = UNSET
    input: Raw | UnsetType = UNSET
    instructions: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    cache_control: Raw | UnsetType = UNSET
    user: Raw | UnsetType = UNSET
    tool_choice: Raw | UnsetType = UNSET
    parallel_tool_calls: Raw | UnsetType = UNSET
    thinking: Raw | UnsetType = UNSET
    reasoning: Raw | UnsetType = UNSET
    reasoning_effort: Raw | UnsetType = UNSET
    response_format: Raw | UnsetType = UNSET
    text: Raw | UnsetType = UNSET
    output_config: Raw | UnsetType = UNSET
    chat_template_kwargs: Raw | UnsetType = UNSET
    prompt_cache_retention: Raw | UnsetType = UNSET
    prompt_cache_key: Raw | UnsetType = UNSET

    @property
    def is_one(self) -> bool:
        """Whether there is a prompt in it."""
        return any(each is not UNSET for each in (self.messages, self.input, self.prompt))


class _Role(msgspec.Struct):
    role: str = ""
    type: str = ""


_ROLE = msgspec.json.Decoder(_Role)
_RAWS = msgspec.json.Decoder(list[Raw])


def shape_of(body: Body) -> Shape:
    """In whose words it is."""
    if body.input is not UNSET:
        return "openai-responses"
    if body.messages is UNSET:
        return "completion"
    if body.system is not UNSET or body.cache_control is not UNSET or body.thinking is not UNSET:
        return "anthropic"
    if body.tools and b'"input_schema"' in bytes(body.tools[0]):
        return "anthropic"
    if body.model.lower().rpartition("/")[2].startswith("claude") and not _has_system(body.messages):
        return "anthropic"
    return "openai-chat"


class Keys:
    """Keys of pieces by what a model reads in them, each read once while it is among the last."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, bytes] = OrderedDict()

    def of(self, piece: Piece) -> Piece:
        """The piece with such a key."""
        key = self._known.get(piece.raw)
        if key is None:
            read = msgspec.json.encode([(leaf.text, leaf.kind) for leaf in leaves(piece)])
            key = self._known[piece.raw] = blake2b(read, digest_size=16).digest()
            if len(self._known) > _KEYS_MAX:
                self._known.popitem(last=False)
        return Piece(piece.kind, piece.path, piece.raw, key)


def pieces_of(body: Body, shape: Shape, keys: Keys | None) -> tuple[Piece, ...]:
    """In the order in which a model reads them. `keys`: there may be marks of boundaries in them. Raises
    msgspec.MsgspecError for what is no JSON of that shape."""
    pieces = _pieces(body, shape)
    return tuple(pieces if keys is None else map(keys.of, pieces))


def parameters_of(body: Body) -> dict[str, bytes]:
    """Those that are part of what is cached."""
    found = {name: getattr(body, name) for name in _PARAMETERS}
    return {name: bytes(raw) for name, raw in found.items() if raw is not UNSET}


def role_of(piece: Piece) -> str:
    """Of a message; of an item of the Responses API that has none, what its type stands for."""
    if piece.path == "prompt":
        return "user"
    read = _ROLE.decode(piece.raw)
    if read.role:
        return read.role
    return "assistant" if read.type in ("function_call", "reasoning", "custom_tool_call") else "tool"


def _pieces(body: Body, shape: Shape) -> list[Piece]:
    made: list[Piece] = []
    for place, tool in enumerate(body.tools or ()):
        raw = bytes(tool)
        made.append(Piece("tool", f"tools[{place}]", raw, raw))
    if shape == "completion":
        if body.prompt is not UNSET:
            raw = bytes(body.prompt)
            made.append(Piece("message", "prompt", raw, raw))
    elif shape == "openai-responses":
        _add_texts(made, "instructions", body.instructions)
        assert body.input is not UNSET
        raw = bytes(body.input)
        _add_messages(made, "input", _RAWS.decode(raw) if raw[:1] == b"[" else [body.input])
    else:
        _add_texts(made, "system", body.system)
        if body.messages is not UNSET:
            _add_messages(made, "messages", body.messages)
    return made


def _add_texts(made: list[Piece], path: str, value: Raw | UnsetType) -> None:
    """A system text: a string, or blocks."""
    if value is UNSET:
        return
    raw = bytes(value)
    if raw == b"null":
        return
    if raw[:1] != b"[":
        made.append(Piece("system", path, raw, raw))
        return
    for place, block in enumerate(_RAWS.decode(raw)):
        made.append(Piece("system", f"{path}[{place}]", bytes(block), bytes(block)))


def _add_messages(made: list[Piece], path: str, given: list[Raw]) -> None:
    """Instructions at the beginning are the system's."""
    raws = [bytes(each) for each in given]
    start = 0
    while start < len(raws) and _is_system(raws[start]):
        made.append(Piece("system", f"{path}[{start}]", raws[start], raws[start]))
        start += 1
    made += [Piece("message", f"{path}[{place}]", raw, raw) for place, raw in enumerate(raws[start:], start)]


def _is_system(raw: bytes) -> bool:
    head = raw[: _LOOKS_AHEAD + 16]
    if b'"user"' in head or b'"assistant"' in head:
        return False
    return raw[:1] == b"{" and _ROLE.decode(raw).role in ("system", "developer")


def _has_system(messages: list[Raw]) -> bool:
    return bool(messages) and _is_system(bytes(messages[0]))

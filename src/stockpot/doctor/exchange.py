"""A recorded request as the doctor sees it: the prompt in the order the model reads it, in raw JSON.

The seam between the readers of formats and all that follows. Pieces are left as they stood in the file: key
order, white space and escapes are causes, too. Structs, for a million of them are made in a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

Shape = Literal["openai-chat", "openai-responses", "anthropic", "completion"]
PieceKind = Literal["tool", "system", "message"]


class Piece(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One tool, system text or message. `path` is where it stood in the body (`messages[3]`), `raw` its
    JSON as it stood there. Two pieces with the same `key` are the same to a model; two with different ones
    may be, too. It is `raw`, but where marks of cache boundaries come and go: there it is of what is read."""

    kind: PieceKind
    path: str
    raw: bytes
    key: bytes


class Usage(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What the provider or the engine counted, as far as it was recorded; `written` is what it cached."""

    prompt_tokens: int
    cached_tokens: int | None = None
    written_tokens: int | None = None
    completion_tokens: int | None = None


class Exchange(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One request. `file` and `line` (from 1) tell where it was read. `pieces` are in the order in which the
    model reads them: tools, system, messages. `parameters` are the other fields of the body, in raw JSON,
    that are part of what is cached (tool_choice, thinking, response_format, ...). Labels are "" where nothing
    was recorded, times None; `at_s` is Unix time, `ttft_s` until the first token. At piece `start` the
    conversation begins."""

    file: str
    line: int
    shape: Shape
    pieces: tuple[Piece, ...]
    model: str = ""
    provider: str = ""
    at_s: float | None = None
    request: str = ""
    session: str = ""
    tenant: str = ""
    backend: str = ""
    usage: Usage | None = None
    ttft_s: float | None = None
    cost_usd: float | None = None
    parameters: Mapping[str, bytes] = {}
    size_bytes: int = 0
    start: int = 0

    @property
    def place(self) -> str:
        """For people."""
        return f"{self.file}:{self.line}"


def start_of(pieces: tuple[Piece, ...]) -> int:
    """Where the pieces of the conversation begin."""
    for at, piece in enumerate(pieces):
        if piece.kind == "message":
            return at
    return len(pieces)

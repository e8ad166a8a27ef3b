"""A recorded request as the doctor sees it: the prompt in the order the model reads it, in raw JSON.

The seam between the readers of formats and all that follows. Pieces are left as they stood in the file: key
order, white space and escapes are causes, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Shape = Literal["openai-chat", "openai-responses", "anthropic", "completion"]
PieceKind = Literal["tool", "system", "message"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tool, system text or message. `path` is where it stood in the body (`messages[3]`), `raw` its
    JSON as it stood there; `role` of messages. Two pieces whose `raw` is the same are the same to a model."""

    kind: PieceKind
    path: str
    raw: bytes
    role: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the provider or the engine counted, as far as it was recorded; `written` is what it cached."""

    prompt_tokens: int
    cached_tokens: int | None = None
    written_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request. `place` tells where it was read (`file:line`). `pieces` are in the order in which the
    model reads them: tools, system, messages. `parameters` are the other fields of the body that may change
    what is cached (tool_choice, thinking, response_format, ...). Labels are "" where nothing was recorded,
    times None; `at_s` is Unix time, `ttft_s` until the first token."""

    place: str
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
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])

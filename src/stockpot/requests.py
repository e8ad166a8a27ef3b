"""What a client asks for, once the wire format is behind it: the one shape every backend is given.

All values are validated when they are made (the wire does it), so backends may rely on their ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; several text parts arrive joined, without a separator, in `content`."""

    role: Role
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class CacheBoundary:
    """A place in the prompt; what precedes it is to be kept for `ttl_s` seconds at least from its last use on
    (`cache_control` of the Anthropic API).

    The place lies in the content of `messages[message]`, behind its first `characters` characters (None: all
    of them); the prompt of a plain completion is message 0. `shared` declares that all that precedes it may
    be found by every tenant. `tags` are labels for invalidation; `document:NAME` is that of a document.
    """

    message: int
    characters: int | None
    ttl_s: int
    shared: bool = False
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TokenBoundary:
    """A boundary in the prompt as the model reads it: it applies to the first `tokens` tokens."""

    tokens: int
    ttl_s: int
    shared: bool = False
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. The defaults leave the model's distribution as it is.

    `temperature` 0 is greedy. `top_k` 0 and `min_p` 0 switch those filters off. `repetition_penalty`
    divides positive and multiplies negative logits of tokens already seen (prompt and output;
    Keskar et al. 2019); `presence_penalty` and `frequency_penalty` are subtracted for tokens of the
    output, as the OpenAI API defines them. `logit_bias` is added to the logits of the given token ids.
    The same `seed` with the same request gives the same text; None draws a fresh one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What the output must be: free text, any JSON object, or JSON that satisfies `schema`."""

    kind: Literal["text", "json_object", "json_schema"] = "text"
    schema: Mapping[str, Any] | bool | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What chat and plain completions have in common.

    `max_tokens` None means: until the model stops or the context is full. `logprobs` None means none;
    0 the chosen token's alone; k > 0 also those of the k likeliest tokens. `deadline_s` counts from arrival.
    `tenant` is who asks ("": nobody in particular). `client_request_id` is the id the client knows the
    request by (X-Request-Id), `request_id` is ours, and unique.
    """

    model: str
    request_id: str
    sampling: Sampling = field(default_factory=Sampling)
    output_format: OutputFormat = field(default_factory=OutputFormat)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    choices: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False
    deadline_s: float | None = None
    tenant: str = ""
    client_request_id: str = ""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to continue."""

    generation: Generation
    messages: Sequence[Message]
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    boundaries: tuple[CacheBoundary, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A prompt to continue: text, or token ids taken as they are."""

    generation: Generation
    prompt: str | Sequence[int]
    echo: bool = False
    boundaries: tuple[CacheBoundary, ...] = ()

"""What a client asks for, once the wire format is behind it: the one shape every backend is given.

All values are validated when they are made (the wire does it), so backends may rely on their ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stockpot.caller import NOBODY, Caller

Role = Literal["system", "developer", "user", "assistant", "tool"]


Dialect = Literal["openai", "anthropic"]
"""Whose wire format something is in."""

Priority = Literal["high", "normal", "low"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text among other parts."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image: at `url` (http or https), or `data` in base64 with its `media_type`. `detail` is OpenAI's."""

    url: str | None = None
    media_type: str | None = None
    data: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class OpaquePart:
    """A part that is not read here and only a backend of the same `dialect` can be given (audio, files,
    documents, signed reasoning), as it came in JSON."""

    dialect: Dialect
    value: Mapping[str, Any]


Part = TextPart | ImagePart | OpaquePart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool the model asked for; `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may ask to have called. `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools must be called: auto, none, required (any), or the one `name`d."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; several text parts arrive joined, without a separator, in `content`.

    `parts` is there, and holds the texts too, in order, where something is not text. A turn of role `tool`
    answers the call `tool_call_id` (`tool_failed`: the tool reported an error)."""

    role: Role
    content: str
    name: str | None = None
    parts: tuple[Part, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    tool_failed: bool = False


TOOLS = -1
"""As `CacheBoundary.message`: the boundary stands behind the definitions of tool `characters` (from 0)."""


@dataclass(frozen=True, slots=True)
class CacheBoundary:
    """A place in the prompt; what precedes it is to be kept for `ttl_s` seconds at least from its last use on
    (`cache_control` of the Anthropic API).

    The place lies in the content of `messages[message]`, behind its first `characters` characters (None: all
    of them); the prompt of a plain completion is message 0, `TOOLS` stands for the tools. `shared` declares
    that all that precedes it may be found by every tenant. `tags` are labels for invalidation;
    `document:NAME` is that of a document.
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
    """What the output must be: free text, any JSON object, or JSON that satisfies `schema`. The `name` and
    `strict` of a schema make a difference to some backends."""

    kind: Literal["text", "json_object", "json_schema"] = "text"
    schema: Mapping[str, Any] | bool | None = None
    name: str | None = None
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class RecallControl:
    """What a request allows of answers that are kept: never more than the operator does. `read` False: none
    is given; `store` False: none is kept; `only`: give a kept one or fail. `max_age_s` and `max_error` narrow
    what may be given, `semantic` False leaves the same request alone. `tags` are labels for invalidation."""

    read: bool = True
    store: bool = True
    only: bool = False
    semantic: bool = True
    max_age_s: float | None = None
    max_error: float | None = None
    tags: frozenset[str] = frozenset()


AS_ALLOWED = RecallControl()
"""All that the operator allows."""

NO_RECALL = RecallControl(read=False, store=False, semantic=False)
"""Of questions of our own (a judge's, an audit): recall has nothing to do with them, nor counts them."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What chat and plain completions have in common.

    `max_tokens` None means: until the model stops or the context is full. `logprobs` None means none;
    0 the chosen token's alone; k > 0 also those of the k likeliest tokens. `deadline_s` counts from arrival.
    `tenant` is whose caches it uses ("": nobody's in particular), `caller` who asks. `session` groups
    requests that have beginnings in common, `task` those that serve one end. `extras` are fields of the wire
    format (`dialect`) that are not read here: a backend of that dialect is given them as they are, others
    refuse them. `client_request_id` is the id the client knows the
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
    caller: Caller = NOBODY
    session: str = ""
    task: str = ""
    user: str = ""
    priority: Priority = "normal"
    stream: bool = False
    dialect: Dialect = "openai"
    extras: Mapping[str, Any] = field(default_factory=dict[str, Any])
    trace_parent: str = ""
    recall: RecallControl = AS_ALLOWED


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to continue."""

    generation: Generation
    messages: Sequence[Message]
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    boundaries: tuple[CacheBoundary, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A prompt to continue: text, or token ids taken as they are."""

    generation: Generation
    prompt: str | Sequence[int]
    echo: bool = False
    boundaries: tuple[CacheBoundary, ...] = ()


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts (or token ids) to embed. Of `generation` only what is not about generating counts."""

    generation: Generation
    inputs: Sequence[str] | Sequence[Sequence[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each input, in order: numbers, or base64 of little-endian float32."""

    model: str
    vectors: Sequence[Sequence[float]] | Sequence[str]
    prompt_tokens: int


GenerationRequest = ChatRequest | CompletionRequest
AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest

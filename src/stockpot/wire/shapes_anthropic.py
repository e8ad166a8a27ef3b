"""The request bodies of /v1/messages and /v1/messages/count_tokens (Anthropic API reference, "Messages").

Blocks that are read here (text, images, tools' calls and results) are strict; blocks of all other types
(documents, thinking, searches) are kept as they came, for a backend of the same dialect. `scope`, `tags` and
`document` of `cache_control` are ours, and so is `timeout`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Discriminator, Field, Tag

from stockpot.wire.shapes_common import CacheControl, Shape

_COUNT_MAX = 2**31 - 1


class TextBlock(Shape):
    """Text. `citations` null and [] say that there are none; a text that has some is an OpaqueBlock."""

    type: Literal["text"]
    text: str
    citations: Annotated[list[Any], Field(max_length=0)] | None = None
    cache_control: CacheControl | None = None


class Base64Source(Shape):
    """An image in the request itself."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str = Field(min_length=1)


class UrlSource(Shape):
    """An image somewhere else."""

    type: Literal["url"]
    url: str = Field(pattern="^https?://", max_length=8192)


def _type_of(value: Any) -> Any:
    """The `type` of an object, whatever it may be."""
    return cast(dict[str, Any], value).get("type") if isinstance(value, dict) else None


def _source_kind(value: Any) -> str:
    return "<base64>" if _type_of(value) == "base64" else "<url>"


class ImageBlock(Shape):
    """An image. One from elsewhere (an upload to the provider) is an OpaqueBlock."""

    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")],
        Discriminator(_source_kind),
    ]
    cache_control: CacheControl | None = None


class ToolUseBlock(Shape):
    """A call the model asked for, sent back. `caller` says that the model itself called; a call that came
    another way is an OpaqueBlock."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=256)
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: None = None
    cache_control: CacheControl | None = None


class OpaqueBlock(Shape):
    """A block that is not read here; all its fields are kept."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(min_length=1, max_length=128)
    cache_control: CacheControl | None = None


_READ = frozenset({"text", "image", "tool_use", "tool_result"})


def _block_kind(value: Any) -> str:
    """The tag of a block's shape. Tags are spelled so that `body` can leave them out of paths."""
    type_ = _type_of(value)
    if not isinstance(type_, str) or type_ not in _READ:
        return "<opaque>"
    block = cast(dict[str, Any], value)
    if type_ == "text":
        opaque = bool(block.get("citations"))
    elif type_ == "image":
        source = _type_of(block.get("source"))
        opaque = isinstance(source, str) and source not in ("base64", "url")
    elif type_ == "tool_use":
        opaque = _type_of(block.get("caller")) not in (None, "direct") or bool(block.get("toolset_name"))
    else:
        opaque = False
    return "<opaque>" if opaque else f"<{type_}>"


def _result_kind(value: Any) -> str:
    kind = _block_kind(value)
    return kind if kind in ("<text>", "<image>") else "<opaque>"


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[OpaqueBlock, Tag("<opaque>")],
    Discriminator(_result_kind),
]


def _content_kind(value: Any) -> str:
    return "<blocks>" if isinstance(value, list) else "<string>"


class ToolResultBlock(Shape):
    """What a tool gave back for the call `tool_use_id`."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=256)
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[ResultBlock], Tag("<blocks>")],
        Discriminator(_content_kind),
    ] = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[OpaqueBlock, Tag("<opaque>")],
    Discriminator(_block_kind),
]

Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Block], Tag("<blocks>")],
    Discriminator(_content_kind),
]

SystemContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[TextBlock], Tag("<blocks>")],
    Discriminator(_content_kind),
]


class TurnShape(Shape):
    """One turn. Turns of role `system` stand within a conversation; what stands before it is `system`."""

    role: Literal["user", "assistant", "system"]
    content: Content


class ToolShape(Shape):
    """A tool of the client's (`type` custom). `type` is any string: the tools that the provider runs are
    refused by name, see `anthropic_translate`."""

    model_config = ConfigDict(extra="allow")

    type: str | None = None
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoiceShape(Shape):
    """Whether tools must be called; `name` is there with the type `tool`, and only then."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = Field(default=None, min_length=1, max_length=128)
    disable_parallel_tool_use: bool | None = None


class JsonFormat(Shape):
    """The answer must be JSON that satisfies `schema`."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Shape):
    """`format` is read here; what else stands there (`effort`) goes on to a backend of this dialect."""

    model_config = ConfigDict(extra="allow")

    format: JsonFormat | None = None


class ThinkingShape(Shape):
    """Whether the model thinks first. All but `disabled` is for a backend of this dialect."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(min_length=1, max_length=64)


class MetadataShape(Shape):
    """`user_id` names the end user, opaquely."""

    user_id: str | None = Field(default=None, max_length=512)


class PromptShape(Shape):
    """What tokens are counted of. The fields that are `Any` or `dict` are not read here: they go on to a
    backend of this dialect, and others refuse them."""

    model: str = Field(min_length=1, max_length=512)
    messages: list[TurnShape] = Field(min_length=1)
    system: SystemContent | None = None
    tools: list[ToolShape] | None = None
    tool_choice: ToolChoiceShape | None = None
    thinking: ThinkingShape | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(
        default=None, description="a boundary at the end of the whole prompt"
    )
    context_management: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    speed: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesShape(PromptShape):
    """What may stand in a request for an answer."""

    max_tokens: int = Field(ge=1, le=_COUNT_MAX)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=_COUNT_MAX)
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        default=None, max_length=16
    )
    stream: bool | None = None
    metadata: MetadataShape | None = None
    timeout: float | None = Field(default=None, gt=0, description="seconds from arrival to the last token")
    service_tier: str | None = None
    container: str | dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None


EXTRAS = (
    "container",
    "context_management",
    "diagnostics",
    "inference_geo",
    "mcp_servers",
    "service_tier",
    "speed",
    "user_profile_id",
    "workspace_id",
)
"""The fields that go into `Generation.extras` as they came."""

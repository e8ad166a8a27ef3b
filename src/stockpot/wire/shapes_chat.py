"""The request body of /v1/chat/completions (OpenAI API reference, "Create chat completion")."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from stockpot.wire.shapes_common import CacheControl, GenerationShape, Shape

_NAME_LENGTH_MAX = 256
_TOOLS_MAX = 1024


class ContentPart(Shape):
    """One part of a message: `text`, `image_url`, or a kind that only some backends know, kept as it came.

    The boundary of `cache_control` stands behind the part."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(min_length=1, max_length=64)
    text: str | None = None
    cache_control: CacheControl | None = None


class ImageUrl(Shape):
    """Where an image is: http(s), or the image itself as a data URL."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


def _content_kind(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


# The tags are spelled so that `body` can leave them out of the paths in its messages.
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<parts>")],
    Discriminator(_content_kind),
]


class CalledFunction(Shape):
    """`arguments` is JSON text, as the model wrote it."""

    name: str = Field(min_length=1, max_length=_NAME_LENGTH_MAX)
    arguments: str


class ToolCallShape(Shape):
    """A call the model asked for. `index` is left over where a client put it together from a stream."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class MessageShape(Shape):
    """One turn. Which fields belong to which role is seen to in `body`.

    The boundary of `cache_control` stands behind the content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = Field(default=None, max_length=256)
    cache_control: CacheControl | None = None
    tool_calls: list[ToolCallShape] | None = Field(default=None, max_length=_TOOLS_MAX)
    tool_call_id: str | None = Field(default=None, min_length=1, max_length=256)


class FunctionShape(Shape):
    """A function the model may ask for; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=_NAME_LENGTH_MAX)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolShape(Shape):
    """One tool. The boundary of `cache_control` stands behind its definition."""

    type: Literal["function"]
    function: FunctionShape
    cache_control: CacheControl | None = None


class NamedFunction(Shape):
    """The function a choice names."""

    name: str = Field(min_length=1, max_length=_NAME_LENGTH_MAX)


class NamedTool(Shape):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


def _choice_kind(value: Any) -> str:
    return "<named>" if isinstance(value, dict) else "<mode>"


ToolChoiceShape = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")] | Annotated[NamedTool, Tag("<named>")],
    Discriminator(_choice_kind),
]


class JsonSchemaShape(Shape):
    """`strict` makes no difference: output always satisfies the schema."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Shape):
    """`json_schema` is there with the type of that name, and only then."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaShape | None = None


class ChatShape(GenerationShape):
    """What is read of a chat request; other fields are for backends that know them (`Generation.extras`)."""

    messages: list[MessageShape] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ToolShape] | None = Field(default=None, max_length=_TOOLS_MAX)
    tool_choice: ToolChoiceShape | None = None
    parallel_tool_calls: bool | None = None

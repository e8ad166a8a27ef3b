"""The request body of /v1/chat/completions (OpenAI API reference, "Create chat completion")."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from stockpot.wire.shapes_common import CacheControl, GenerationShape, Shape


class ContentPart(Shape):
    """One part of a message. Only `text` is served; what others carry is kept for the refusal.

    The boundary of `cache_control` stands behind the part."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    cache_control: CacheControl | None = None


def _content_kind(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


# The tags are spelled so that `body` can leave them out of the paths in its messages.
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<parts>")],
    Discriminator(_content_kind),
]


class MessageShape(Shape):
    """One turn. Tool messages are refused until tools are served.

    The boundary of `cache_control` stands behind the content."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(default=None, max_length=256)
    cache_control: CacheControl | None = None


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
    """What may stand in a chat request; see `tolerated.CHAT` for what may stand there unused."""

    messages: list[MessageShape] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

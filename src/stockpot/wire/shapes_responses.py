"""The request body of /v1/responses (OpenAI API reference, "Create a model response").

Nothing is stored between requests, so what refers to stored things (`previous_response_id`, `conversation`,
`prompt`, items by reference) is declared only to be refused with its reason, see `responses_translate`.
`timeout` is ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from stockpot.wire.shapes_common import Shape

_COUNT_MAX = 2**31 - 1
_ID_LENGTH_MAX = 256

NotServed = Annotated[Any, WithJsonSchema({"type": "null"})]
"""Taken as it comes, to be refused with its reason unless it is null."""

ItemStatus = Literal["in_progress", "completed", "incomplete"]


def _type_of(value: Any) -> Any:
    """The `type` of an object, whatever it may be."""
    return cast(dict[str, Any], value).get("type") if isinstance(value, dict) else None


class InputText(Shape):
    """Text of a user, system or developer turn."""

    type: Literal["input_text"]
    text: str


class OutputText(Shape):
    """Text of an earlier answer. Annotations and log probabilities say nothing to a model and may stand
    there, as answers have them."""

    type: Literal["output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalPart(Shape):
    """What an earlier answer said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


class InputImage(Shape):
    """An image at an address, or in the request itself as a `data:` URL."""

    type: Literal["input_image"]
    image_url: str | None = Field(default=None, pattern="^(https?://|data:)")
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: str | None = None


class InputFile(Shape):
    """A file; only a backend of the same dialect can read it."""

    type: Literal["input_file"]
    file_data: str | None = None
    file_id: str | None = None
    file_url: str | None = None
    filename: str | None = None


class InputAudio(Shape):
    """Sound; only a backend of the same dialect can hear it."""

    type: Literal["input_audio"]
    input_audio: dict[str, Any]


class OtherPart(Shape):
    """A part of a type that is not known here; kept for the refusal."""

    model_config = ConfigDict(extra="allow")

    type: str


_PARTS = {
    "input_text": "<input_text>",
    "output_text": "<output_text>",
    "text": "<output_text>",
    "refusal": "<refusal>",
    "input_image": "<input_image>",
    "input_file": "<input_file>",
    "input_audio": "<input_audio>",
}


def _part_kind(value: Any) -> str:
    """The tag of a part's shape. Tags are spelled so that `body` can leave them out of paths."""
    type_ = _type_of(value)
    return _PARTS.get(type_, "<other>") if isinstance(type_, str) else "<other>"


InputPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[OutputText, Tag("<output_text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[InputFile, Tag("<input_file>")]
    | Annotated[InputAudio, Tag("<input_audio>")]
    | Annotated[OtherPart, Tag("<other>")],
    Discriminator(_part_kind),
]


def _content_kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<string>"


InputContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[InputPart], Tag("<list>")],
    Discriminator(_content_kind),
]


class MessageItem(Shape):
    """One turn. `id` and `status` are there where an earlier answer is sent back as it was."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent
    id: str | None = Field(default=None, max_length=_ID_LENGTH_MAX)
    status: ItemStatus | None = None


class FunctionCallItem(Shape):
    """A call of a function the model asked for, sent back."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=_ID_LENGTH_MAX)
    name: str = Field(min_length=1, max_length=_ID_LENGTH_MAX)
    arguments: str
    id: str | None = Field(default=None, max_length=_ID_LENGTH_MAX)
    status: ItemStatus | None = None


class FunctionCallOutputItem(Shape):
    """What a function gave back for the call `call_id`."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=_ID_LENGTH_MAX)
    output: InputContent
    id: str | None = Field(default=None, max_length=_ID_LENGTH_MAX)
    status: ItemStatus | None = None


class ReasoningItem(Shape):
    """What the model thought before an earlier answer."""

    type: Literal["reasoning"]
    id: str | None = Field(default=None, max_length=_ID_LENGTH_MAX)
    summary: list[Any] = Field(default_factory=list[Any])
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: ItemStatus | None = None


class OtherItem(Shape):
    """An item of a type that is not known here; kept for the refusal."""

    model_config = ConfigDict(extra="allow")

    type: str


_ITEMS = frozenset({"message", "function_call", "function_call_output", "reasoning"})


def _item_kind(value: Any) -> str:
    type_ = _type_of(value)
    if type_ is None:
        return "<message>"
    return f"<{type_}>" if isinstance(type_, str) and type_ in _ITEMS else "<other>"


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[OtherItem, Tag("<other>")],
    Discriminator(_item_kind),
]

Input = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Item], Field(min_length=1), Tag("<list>")],
    Discriminator(_content_kind),
]


class FunctionToolShape(Shape):
    """A function of the client's. `type` is any string: tools that a provider runs are refused by name."""

    model_config = ConfigDict(extra="allow")

    type: str
    name: str | None = Field(default=None, min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Shape):
    """The one function that must be called."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128)


def _choice_kind(value: Any) -> str:
    return "<mode>" if isinstance(value, str) else "<named>"


ToolChoiceShape = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("<mode>")] | Annotated[NamedTool, Tag("<named>")],
    Discriminator(_choice_kind),
]


class TextFormat(Shape):
    """What the output must be; `name` and `schema` are there with the type json_schema, and only then."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextShape(Shape):
    """How the text of the answer is to be."""

    format: TextFormat | None = None
    verbosity: str | None = Field(default=None, max_length=32)


class ReasoningShape(Shape):
    """How much the model is to think. Summaries are not made here: `summary` auto asks for one where there
    is one, and the others are refused."""

    effort: str | None = Field(default=None, min_length=1, max_length=32)
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponseStreamOptions(Shape):
    """Obfuscation pads streams against traffic analysis; it is not done here."""

    include_obfuscation: Literal[False] | None = None


class ResponsesShape(Shape):
    """What may stand in a request for an answer. None stands for left out. `store` and `background`
    may be false."""

    model: str = Field(min_length=1, max_length=512)
    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=_COUNT_MAX)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[FunctionToolShape] | None = Field(default=None, max_length=1024)
    tool_choice: ToolChoiceShape | None = None
    parallel_tool_calls: bool | None = None
    text: TextShape | None = None
    reasoning: ReasoningShape | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    truncation: Literal["disabled"] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    prompt_cache_retention: str | None = Field(default=None, max_length=32)
    service_tier: str | None = Field(default=None, max_length=32)
    timeout: float | None = Field(default=None, gt=0, description="seconds from arrival to the last token")
    store: bool | None = Field(default=None, json_schema_extra={"enum": [False, None]})
    background: bool | None = Field(default=None, json_schema_extra={"enum": [False, None]})
    previous_response_id: NotServed = None
    conversation: NotServed = None
    prompt: NotServed = None
    context_management: NotServed = None
    max_tool_calls: NotServed = None
    moderation: NotServed = None
    prompt_cache_options: NotServed = None


EXTRAS = ("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user")
"""The fields that go into `Generation.extras` as they came: a chat has them under the same names."""

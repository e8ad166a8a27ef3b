"""From the shape of the Responses API to the one request every backend is given.

A response is a chat here: items become turns, `instructions` the first of them, of role developer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stockpot.errors import RequestError, UnsupportedField
from stockpot.requests import (
    ChatRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    OutputFormat,
    Part,
    Role,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from stockpot.wire.arrival import Arrival, label_of, session_of
from stockpot.wire.shapes_responses import (
    EXTRAS,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionToolShape,
    InputAudio,
    InputFile,
    InputImage,
    InputPart,
    InputText,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    RefusalPart,
    ResponsesShape,
    TextFormat,
    ToolChoiceShape,
)

_STATELESS = "this server keeps no answers, so there is none to go on from; send the whole conversation as"
_NOT_SERVED: Mapping[str, str] = {
    "previous_response_id": f"{_STATELESS} 'input'",
    "conversation": f"{_STATELESS} 'input'",
    "prompt": "this server keeps no prompts; send 'instructions' and 'input'",
    "context_management": "this server never shortens a conversation; shorten 'input'",
    "max_tool_calls": "it bounds the tools a provider runs, and none are run here",
    "moderation": "this server moderates by its own guards alone",
    "prompt_cache_options": "every prefix is found by its content here",
}


def responses_request(shape: ResponsesShape, arrival: Arrival) -> ChatRequest:
    """The chat a request for a response stands for. Raises RequestError where fields contradict."""
    _check_served(shape, arrival.longest_s)
    turns = _Turns()
    if shape.instructions:
        turns.add(Message("developer", shape.instructions))
    if isinstance(shape.input, str):
        turns.add(Message("user", shape.input))
    else:
        for index, item in enumerate(shape.input):
            turns.item(item, f"input[{index}]")
    tools = tuple(_tool(tool, index) for index, tool in enumerate(shape.tools or ()))
    return ChatRequest(
        Generation(
            model=shape.model,
            request_id=arrival.request_id,
            sampling=Sampling(
                temperature=1.0 if shape.temperature is None else shape.temperature,
                top_p=1.0 if shape.top_p is None else shape.top_p,
            ),
            output_format=_output_format(shape.text and shape.text.format),
            max_tokens=shape.max_output_tokens,
            logprobs=(shape.top_logprobs or 0) if wants_logprobs(shape) else None,
            deadline_s=shape.timeout or arrival.longest_s,
            tenant=arrival.tenant,
            client_request_id=arrival.client_request_id,
            caller=arrival.caller,
            session=session_of(arrival, shape.prompt_cache_key, shape.user),
            task=arrival.task,
            user=label_of(shape.user),
            priority=arrival.priority,
            stream=bool(shape.stream),
            extras=_extras(shape),
            trace_parent=arrival.trace_parent,
            recall=arrival.recall,
        ),
        turns.all(),
        tools=tools,
        tool_choice=None if shape.tool_choice is None else _tool_choice(shape.tool_choice, tools),
        parallel_tool_calls=shape.parallel_tool_calls if tools else None,
    )


def wants_logprobs(shape: ResponsesShape) -> bool:
    """Whether log probabilities were asked for, in one of the two ways."""
    return bool(shape.top_logprobs) or "message.output_text.logprobs" in (shape.include or ())


def _check_served(shape: ResponsesShape, longest_s: float) -> None:
    if shape.store:
        raise UnsupportedField(
            "'store' is true: this server keeps no answers; send false, and the whole conversation as 'input'"
            " each time.",
            param="store",
        )
    if shape.background:
        raise UnsupportedField(
            "'background' is true: this server keeps no answers that could be fetched later; send false.",
            param="background",
        )
    for name, reason in _NOT_SERVED.items():
        if getattr(shape, name) is not None:
            raise UnsupportedField(f"'{name}' is supported only as null: {reason}.", param=name)
    if shape.stream_options is not None and not shape.stream:
        raise RequestError("'stream_options' needs 'stream': true; add it.", param="stream_options")
    if shape.timeout is not None and shape.timeout > longest_s:
        raise RequestError(
            f"'timeout' must be at most {longest_s:g} seconds, this server's own limit"
            f" (engine.request_timeout_s); got {shape.timeout:g}.",
            param="timeout",
        )


class _Turns:
    """The turns of a conversation as its items are read.

    An answer is several items (a message, then calls) and one turn: what the assistant said and called
    without anybody in between is joined.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._said: Message | None = None
        self._calls: list[ToolCall] = []

    def add(self, message: Message) -> None:
        self._close()
        self._messages.append(message)

    def item(self, item: Item, path: str) -> None:
        match item:
            case MessageItem():
                message = _message(item.role, item.content, path)
                if item.role == "assistant":
                    if self._said is not None or self._calls:
                        self._close()
                    self._said = message
                else:
                    self.add(message)
            case FunctionCallItem():
                self._calls.append(ToolCall(item.call_id, item.name, item.arguments))
            case FunctionCallOutputItem():
                message = _message("tool", item.output, path, content_name="output")
                self.add(Message("tool", message.content, parts=message.parts, tool_call_id=item.call_id))
            case ReasoningItem():
                # The chat template of a model leaves earlier reasoning out, so leaving it out here makes no
                # difference. What is encrypted was made for its maker's eyes, who would miss it.
                if item.encrypted_content:
                    raise UnsupportedField(
                        f"'{path}.encrypted_content' can be read only by the provider that made it; remove"
                        " the item.",
                        param=f"{path}.encrypted_content",
                    )
            case _:
                hint = " (nothing is stored here that it could refer to)" if "reference" in item.type else ""
                raise UnsupportedField(
                    f"'{path}' has the type {item.type[:40]!r}; this server takes items of the types message,"
                    f" function_call, function_call_output and reasoning{hint}; remove it.",
                    param=f"{path}.type",
                )

    def all(self) -> tuple[Message, ...]:
        self._close()
        if not self._messages:
            raise RequestError("'input' has nothing but reasoning; add a message.", param="input")
        return tuple(self._messages)

    def _close(self) -> None:
        said, calls = self._said, tuple(self._calls)
        if said is not None or calls:
            said = said or Message("assistant", "")
            self._messages.append(Message("assistant", said.content, parts=said.parts, tool_calls=calls))
        self._said = None
        self._calls.clear()


def _message(
    role: Role, content: str | list[InputPart], path: str, *, content_name: str = "content"
) -> Message:
    if isinstance(content, str):
        return Message(role, content)
    parts = [_part(part, role, f"{path}.{content_name}[{place}]") for place, part in enumerate(content)]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return Message(role, "".join(texts), parts=tuple(parts) if len(texts) < len(parts) else ())


def _part(part: InputPart, role: Role, path: str) -> Part:
    match part:
        case InputText() | OutputText():
            return TextPart(part.text)
        case RefusalPart():
            return TextPart(part.refusal)
        case InputImage() if role in ("user", "tool"):
            return _image(part, path)
        case InputFile() if role in ("user", "tool"):
            if part.file_url is not None:
                raise UnsupportedField(
                    f"'{path}.file_url' is not supported by this server; send the file as 'file_data'.",
                    param=f"{path}.file_url",
                )
            named = {"file_data": part.file_data, "file_id": part.file_id, "filename": part.filename}
            file = {name: value for name, value in named.items() if value is not None}
            return OpaquePart("openai", {"type": "file", "file": file})
        case InputAudio() if role in ("user", "tool"):
            return OpaquePart("openai", {"type": "input_audio", "input_audio": part.input_audio})
        case _:
            raise UnsupportedField(
                f"'{path}' has the type {part.type[:40]!r}, which is not taken in a turn of the role"
                f" {role!r}; remove it.",
                param=f"{path}.type",
            )


def _image(part: InputImage, path: str) -> ImagePart:
    if part.file_id is not None:
        raise UnsupportedField(
            f"'{path}.file_id' names a file of the provider's, which this server cannot read; send the image"
            " as 'image_url'.",
            param=f"{path}.file_id",
        )
    url = part.image_url
    if url is None:
        raise RequestError(f"The field '{path}.image_url' is missing; add it.", param=f"{path}.image_url")
    if not url.startswith("data:"):
        return ImagePart(url=url, detail=part.detail)
    media_type, separator, data = url.removeprefix("data:").partition(";base64,")
    if not (separator and data and media_type.startswith("image/")):
        raise RequestError(
            f"'{path}.image_url' must be http://, https:// or 'data:image/...;base64,...'.",
            param=f"{path}.image_url",
        )
    return ImagePart(media_type=media_type, data=data, detail=part.detail)


def _tool(shape: FunctionToolShape, index: int) -> Tool:
    path = f"tools[{index}]"
    if shape.type != "function":
        raise UnsupportedField(
            f"'{path}.type' is {shape.type[:40]!r}: tools that the provider itself runs are not served here,"
            " tools of type 'function' are; remove it.",
            param=f"{path}.type",
        )
    for name, value in (shape.model_extra or {}).items():
        if value is not None:
            param = f"{path}.{name[:80]}"
            raise UnsupportedField(
                f"The field '{param}' is not supported by this server; remove it.", param=param
            )
    if shape.name is None:
        raise RequestError(f"The field '{path}.name' is missing; add it.", param=f"{path}.name")
    return Tool(shape.name, shape.description, shape.parameters, shape.strict)


def _tool_choice(shape: ToolChoiceShape, tools: tuple[Tool, ...]) -> ToolChoice:
    if isinstance(shape, str):
        if shape == "required" and not tools:
            raise RequestError("'tool_choice' is 'required' and there are no 'tools'.", param="tool_choice")
        return ToolChoice(shape)
    if all(tool.name != shape.name for tool in tools):
        raise RequestError(
            f"'tool_choice.name' is {shape.name!r}, which is not among 'tools'; add the tool.",
            param="tool_choice.name",
        )
    return ToolChoice("named", shape.name)


def _output_format(shape: TextFormat | None) -> OutputFormat:
    if shape is None:
        return OutputFormat()
    if shape.type == "json_schema":
        for name, value in (("name", shape.name), ("schema", shape.schema_)):
            if value is None:
                raise RequestError(
                    f"The field 'text.format.{name}' is missing; add it.", param=f"text.format.{name}"
                )
        return OutputFormat("json_schema", shape.schema_, shape.name, shape.strict)
    if shape.schema_ is not None:
        raise RequestError(
            "'text.format.schema' and the type 'json_schema' go together; send both or none.",
            param="text.format.schema",
        )
    return OutputFormat(shape.type)


def _extras(shape: ResponsesShape) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    for name in EXTRAS:
        value = getattr(shape, name)
        if value is not None:
            extras[name] = value
    if shape.reasoning is not None and shape.reasoning.effort is not None:
        extras["reasoning_effort"] = shape.reasoning.effort
    if shape.text is not None and shape.text.verbosity is not None:
        extras["verbosity"] = shape.text.verbosity
    return extras

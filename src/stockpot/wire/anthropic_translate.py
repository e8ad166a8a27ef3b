"""From the shapes of the Anthropic API to the one request every backend is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from stockpot.errors import RequestError, UnsupportedField
from stockpot.requests import (
    TOOLS,
    CacheBoundary,
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
from stockpot.wire.shapes_anthropic import (
    EXTRAS,
    ImageBlock,
    MessagesShape,
    OpaqueBlock,
    OutputConfig,
    PromptShape,
    TextBlock,
    ThinkingShape,
    ToolChoiceShape,
    ToolResultBlock,
    ToolShape,
    ToolUseBlock,
    TurnShape,
    UrlSource,
)
from stockpot.wire.shapes_common import CacheControl
from stockpot.wire.translate import BOUNDARIES_MAX, boundary_of


def messages_request(shape: MessagesShape, arrival: Arrival) -> ChatRequest:
    """The chat a request for an answer stands for. Raises RequestError where fields contradict."""
    longest_s = arrival.longest_s
    if shape.timeout is not None and shape.timeout > longest_s:
        raise RequestError(
            f"'timeout' must be at most {longest_s:g} seconds, this server's own limit"
            f" (engine.request_timeout_s); got {shape.timeout:g}.",
            param="timeout",
        )
    user = (shape.metadata and shape.metadata.user_id) or ""
    extras = _extras(shape)
    if user:
        extras["metadata"] = {"user_id": user}
    return _chat(
        shape,
        Generation(
            model=shape.model,
            request_id=arrival.request_id,
            sampling=Sampling(
                temperature=1.0 if shape.temperature is None else shape.temperature,
                top_p=1.0 if shape.top_p is None else shape.top_p,
                top_k=shape.top_k or 0,
            ),
            output_format=_output_format(shape.output_config),
            max_tokens=shape.max_tokens,
            stop=tuple(shape.stop_sequences or ()),
            deadline_s=shape.timeout or longest_s,
            tenant=arrival.tenant,
            client_request_id=arrival.client_request_id,
            caller=arrival.caller,
            session=session_of(arrival, user),
            task=arrival.task,
            user=label_of(user),
            priority=arrival.priority,
            stream=bool(shape.stream),
            dialect="anthropic",
            extras=extras,
            trace_parent=arrival.trace_parent,
            recall=arrival.recall,
        ),
    )


def counted_request(shape: PromptShape, arrival: Arrival) -> ChatRequest:
    """The chat whose tokens are to be counted, without its boundaries: the tokens are the same without them,
    and nothing is kept. Raises RequestError where fields contradict."""
    counted = _chat(
        shape,
        Generation(
            model=shape.model,
            request_id=arrival.request_id,
            output_format=_output_format(shape.output_config),
            tenant=arrival.tenant,
            client_request_id=arrival.client_request_id,
            caller=arrival.caller,
            dialect="anthropic",
            extras=_extras(shape),
        ),
    )
    return replace(counted, boundaries=())


def _chat(shape: PromptShape, generation: Generation) -> ChatRequest:
    prompt = _Prompt()
    tools = tuple(_tool(tool, index, prompt) for index, tool in enumerate(shape.tools or ()))
    if shape.system:
        prompt.system(shape.system)
    for index, turn in enumerate(shape.messages):
        prompt.turn(turn, f"messages[{index}]")
    if shape.cache_control is not None:
        prompt.mark(shape.cache_control, len(prompt.messages) - 1, None)
    if len(prompt.boundaries) > BOUNDARIES_MAX:
        raise RequestError(
            f"The request has {len(prompt.boundaries)} boundaries ('cache_control'); send at most"
            f" {BOUNDARIES_MAX}.",
            param="cache_control",
        )
    choice = shape.tool_choice
    parallel = choice and choice.disable_parallel_tool_use
    return ChatRequest(
        generation,
        tuple(prompt.messages),
        boundaries=tuple(prompt.boundaries),
        tools=tools,
        tool_choice=choice and _tool_choice(choice, tools),
        parallel_tool_calls=None if parallel is None else not parallel,
    )


class _Prompt:
    """The turns of a request as they are read, and the boundaries in them, in order."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.boundaries: list[CacheBoundary] = []

    def mark(self, control: CacheControl, message: int, characters: int | None) -> None:
        self.boundaries.append(boundary_of(control, message, characters))

    def system(self, content: str | Sequence[TextBlock]) -> None:
        pieces = _Pieces()
        for block in [TextBlock(type="text", text=content)] if isinstance(content, str) else content:
            pieces.add(block)
        self._turn("system", pieces)

    def turn(self, turn: TurnShape, path: str) -> None:
        if isinstance(turn.content, str):
            self.messages.append(Message(turn.role, turn.content))
            return
        pieces = _Pieces()
        calls: list[ToolCall] = []
        after_results = False
        for place, block in enumerate(turn.content):
            if turn.role == "system" and not isinstance(block, TextBlock):
                raise _misplaced(block.type, f"{path}.content[{place}]", turn.role)
            if isinstance(block, ToolUseBlock):
                if turn.role != "assistant":
                    raise _misplaced(block.type, f"{path}.content[{place}]", turn.role)
                calls.append(ToolCall(block.id, block.name, msgspec.json.encode(block.input).decode()))
                if block.cache_control is not None:
                    pieces.controls.append((block.cache_control, None))
            elif isinstance(block, ToolResultBlock):
                if turn.role != "user":
                    raise _misplaced(block.type, f"{path}.content[{place}]", turn.role)
                if pieces.parts:
                    self._turn("user", pieces)
                    pieces = _Pieces()
                self._result(block)
                after_results = True
            else:
                pieces.add(block)
        if pieces.parts or not after_results:
            self._turn(turn.role, pieces, tuple(calls))

    def _result(self, block: ToolResultBlock) -> None:
        """A tool's answer is a turn of its own here."""
        pieces = _Pieces()
        content = block.content
        for part in [TextBlock(type="text", text=content)] if isinstance(content, str) else content:
            pieces.add(part)
        if block.cache_control is not None:
            pieces.controls.append((block.cache_control, None))
        self._close(
            Message(
                "tool",
                pieces.text,
                parts=pieces.mixed,
                tool_call_id=block.tool_use_id,
                tool_failed=bool(block.is_error),
            ),
            pieces,
        )

    def _turn(self, role: Role, pieces: _Pieces, calls: tuple[ToolCall, ...] = ()) -> None:
        self._close(Message(role, pieces.text, parts=pieces.mixed, tool_calls=calls), pieces)

    def _close(self, message: Message, pieces: _Pieces) -> None:
        index = len(self.messages)
        self.messages.append(message)
        for control, place in pieces.controls:
            # Behind the last piece is behind all of it, also where that piece has no characters.
            whole = place is None or place[0] == len(pieces.parts)
            self.mark(control, index, None if whole or place is None else place[1])


class _Pieces:
    """The content of one turn as it is gathered. A control stands behind so many parts and characters; None:
    behind all of them."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.controls: list[tuple[CacheControl, tuple[int, int] | None]] = []
        self._texts: list[str] = []
        self._characters = 0

    def add(self, block: TextBlock | ImageBlock | OpaqueBlock) -> None:
        if isinstance(block, TextBlock):
            self.parts.append(TextPart(block.text))
            self._texts.append(block.text)
            self._characters += len(block.text)
        elif isinstance(block, ImageBlock):
            self.parts.append(_image(block))
        else:
            self.parts.append(OpaquePart("anthropic", {"type": block.type, **(block.model_extra or {})}))
        if block.cache_control is not None:
            self.controls.append((block.cache_control, (len(self.parts), self._characters)))

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def mixed(self) -> tuple[Part, ...]:
        """The parts where not all are text, else none."""
        return tuple(self.parts) if len(self._texts) < len(self.parts) else ()


def _image(block: ImageBlock) -> ImagePart:
    source = block.source
    if isinstance(source, UrlSource):
        return ImagePart(url=source.url)
    return ImagePart(media_type=source.media_type, data=source.data)


def _misplaced(type_: str, path: str, role: str) -> RequestError:
    return RequestError(
        f"'{path}' has the type {type_[:40]!r}, which cannot stand in a turn of the role {role!r}; move it.",
        param=f"{path}.type",
    )


_DEFAULTS_OF_TOOLS: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "input_examples": ([],),
    "eager_input_streaming": (False, True),  # arguments are always streamed as they come
}
"""Fields of a tool that are not acted on, and the values at which that makes no difference (null, always)."""


def _tool(shape: ToolShape, index: int, prompt: _Prompt) -> Tool:
    path = f"tools[{index}]"
    if shape.type not in (None, "custom"):
        raise UnsupportedField(
            f"'{path}.type' is {shape.type[:40]!r}: tools that the provider itself runs are not served here,"
            " tools of type 'custom' are; remove it.",
            param=f"{path}.type",
        )
    for name, value in (shape.model_extra or {}).items():
        known = _DEFAULTS_OF_TOOLS.get(name)
        if known is None or (value is not None and value not in known):
            param = f"{path}.{name[:80]}"
            raise UnsupportedField(
                f"The field '{param}' is not supported by this server; remove it.", param=param
            )
    if shape.input_schema is None:
        raise RequestError(
            f"The field '{path}.input_schema' is missing; add it.", param=f"{path}.input_schema"
        )
    if shape.cache_control is not None:
        prompt.mark(shape.cache_control, TOOLS, index)
    return Tool(shape.name, shape.description, shape.input_schema, shape.strict)


def _tool_choice(shape: ToolChoiceShape, tools: Sequence[Tool]) -> ToolChoice:
    if (shape.type == "tool") != (shape.name is not None):
        raise RequestError(
            "'tool_choice.name' and the type 'tool' go together; send both or none.", param="tool_choice.name"
        )
    if shape.name is not None and all(tool.name != shape.name for tool in tools):
        raise RequestError(
            f"'tool_choice.name' is {shape.name!r}, and no tool of that name is in 'tools'; add it.",
            param="tool_choice.name",
        )
    if shape.type == "any" and not tools:
        raise RequestError("'tool_choice' needs 'tools'; add them.", param="tool_choice")
    match shape.type:
        case "any":
            return ToolChoice("required")
        case "tool":
            return ToolChoice("named", shape.name)
        case "auto" | "none":
            return ToolChoice(shape.type)


def _output_format(shape: OutputConfig | None) -> OutputFormat:
    if shape is None or shape.format is None:
        return OutputFormat()
    return OutputFormat("json_schema", shape.format.schema_, strict=True)


def _extras(shape: PromptShape) -> dict[str, Any]:
    """What is not read here, for a backend of this dialect; null stands for left out."""
    extras = {name: value for name in EXTRAS if (value := getattr(shape, name, None)) is not None}
    if shape.thinking is not None and shape.thinking.type != "disabled":
        extras["thinking"] = _as_it_came(shape.thinking)
    unread = (shape.output_config and shape.output_config.model_extra) or {}
    if unread := {name: value for name, value in unread.items() if value is not None}:
        extras["output_config"] = unread
    return extras


def _as_it_came(shape: ThinkingShape) -> dict[str, Any]:
    return {"type": shape.type, **(shape.model_extra or {})}

"""Events as the JSON of /v1/responses: one object, or the named events of a stream, in the API's order.

created  in_progress  (item added  [part added  delta*  done  part done]*  item done)*  completed

Items follow one another: reasoning, text, calls of functions. A stream ends with `response.completed`,
`.incomplete` or `.failed`; there is no `[DONE]`. Source: OpenAI API reference, "Streaming events".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType, structs

from stockpot.clock import Clock
from stockpot.errors import StockpotError
from stockpot.events import Completed, Delta, Finished, Started
from stockpot.wire.delivery import Collector, Narrator
from stockpot.wire.errors import body_of
from stockpot.wire.responses_items import CallItem, Items, OutputItem, Part, Step
from stockpot.wire.shapes_responses import ResponsesShape
from stockpot.wire.sse import Framer
from stockpot.wire.usage import Extension, extension_of

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputTokensDetails(msgspec.Struct, frozen=True):
    """`cached_tokens` were not computed for this request; `cache_write_tokens` are kept under a promise."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """Backends do not tell tokens of reasoning from others: they are counted in the output alone."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Token counts in the words of this API."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why the answer ends early."""

    reason: Literal["max_output_tokens", "content_filter"]


class ResponseError(msgspec.Struct, frozen=True):
    """Why there is no whole answer. `code` is one of the API's words; the rest is as in refusals."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str
    type: str
    param: str | None


class ResponseBody(msgspec.Struct, frozen=True, tag_field="object", tag="response"):
    """The whole body. What the request asked for stands in it again, with the defaults."""

    id: str
    created_at: int
    model: str
    instructions: str | None
    max_output_tokens: int | None
    metadata: Mapping[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    reasoning: Mapping[str, Any]
    safety_identifier: str | None
    service_tier: str | None
    temperature: float
    text: Mapping[str, Any]
    tool_choice: Any
    tools: list[Mapping[str, Any]]
    top_logprobs: int
    top_p: float
    user: str | None
    status: Status = "in_progress"
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    completed_at: int | None = None
    background: bool = False
    max_tool_calls: None = None
    previous_response_id: None = None
    store: bool = False
    truncation: str = "disabled"
    stockpot: Extension | UnsetType = UNSET


def response_begun(shape: ResponsesShape, *, id: str, created_s: int) -> ResponseBody:
    """The body of a response of which nothing is there yet."""
    text: dict[str, Any] = {"format": {"type": "text"}}
    if shape.text is not None:
        if shape.text.format is not None:
            text["format"] = shape.text.format.model_dump(by_alias=True, exclude_none=True)
        if shape.text.verbosity is not None:
            text["verbosity"] = shape.text.verbosity
    choice = shape.tool_choice
    return ResponseBody(
        id=id,
        created_at=created_s,
        model=shape.model,
        instructions=shape.instructions,
        max_output_tokens=shape.max_output_tokens,
        metadata=shape.metadata or {},
        parallel_tool_calls=shape.parallel_tool_calls is not False,
        prompt_cache_key=shape.prompt_cache_key,
        reasoning={"effort": shape.reasoning and shape.reasoning.effort, "summary": None},
        safety_identifier=shape.safety_identifier,
        service_tier=shape.service_tier,
        temperature=1.0 if shape.temperature is None else shape.temperature,
        text=text,
        tool_choice="auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        tools=[
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in shape.tools or ()
        ],
        top_logprobs=shape.top_logprobs or 0,
        top_p=1.0 if shape.top_p is None else shape.top_p,
        user=shape.user,
    )


class _Ending:
    """How a response ends, from its last two events."""

    def __init__(self, begun: ResponseBody, clock: Clock) -> None:
        self._begun = begun
        self._clock = clock
        self._cut_off: IncompleteDetails | None = None

    @property
    def whole(self) -> bool:
        return self._cut_off is None

    def finished(self, event: Finished) -> None:
        if event.reason == "length":
            self._cut_off = IncompleteDetails("max_output_tokens")
        elif event.reason == "content_filter":
            self._cut_off = IncompleteDetails("content_filter")

    def body(self, event: Completed, output: list[OutputItem]) -> ResponseBody:
        usage = event.usage
        return structs.replace(
            self._begun,
            status="completed" if self.whole else "incomplete",
            output=output,
            usage=ResponseUsage(
                usage.prompt_tokens,
                InputTokensDetails(usage.cached_total, sum((usage.promised_tokens or {}).values())),
                usage.completion_tokens,
                OutputTokensDetails(usage.reasoning_tokens or 0),
                usage.prompt_tokens + usage.completion_tokens,
            ),
            incomplete_details=self._cut_off,
            completed_at=int(self._clock.wall()) if self.whole else None,
            stockpot=extension_of(event),
        )


class ResponseCollector(Collector):
    """Makes one ResponseBody."""

    def __init__(self, begun: ResponseBody, *, logprobs: bool, clock: Clock) -> None:
        self._items = Items(begun.id, logprobs=logprobs)
        self._ending = _Ending(begun, clock)

    def delta(self, event: Delta) -> None:
        for _ in self._items.add(event):
            pass

    def finished(self, event: Finished) -> None:
        self._ending.finished(event)
        for _ in self._items.close(whole=self._ending.whole):
            pass

    def answer(self, event: Completed) -> ResponseBody:
        return self._ending.body(event, self._items.output())


class ResponseNarrator(Narrator):
    """Makes the events of a stream; each says its place in it (`sequence_number`)."""

    last = b""

    def __init__(self, begun: ResponseBody, *, logprobs: bool, clock: Clock) -> None:
        self._begun = begun
        self._items = Items(begun.id, logprobs=logprobs)
        self._ending = _Ending(begun, clock)
        self._framer = Framer()
        self._sequence = 0

    def started(self, event: Started) -> bytes:
        del event
        return self._opening()

    def delta(self, event: Delta) -> bytes:
        return self._opening() + b"".join(self._told(self._items.add(event)))

    def finished(self, event: Finished) -> bytes:
        self._ending.finished(event)
        return self._opening() + b"".join(self._told(self._items.close(whole=self._ending.whole)))

    def completed(self, event: Completed) -> bytes:
        body = self._ending.body(event, self._items.output())
        return self._opening() + self._event(f"response.{body.status}", response=body)

    def failed(self, error: StockpotError) -> bytes:
        body = structs.replace(
            self._begun, status="failed", output=self._items.output(), error=_error_of(error)
        )
        return self._opening() + self._event("response.failed", response=body)

    def _opening(self) -> bytes:
        if self._sequence:
            return b""
        created = self._event("response.created", response=self._begun)
        return created + self._event("response.in_progress", response=self._begun)

    def _told(self, steps: Iterator[Step]) -> Iterator[bytes]:
        for step in steps:
            item = step.item
            if step.kind in ("item_added", "item_done"):
                yield self._event(
                    f"response.output_{step.kind.replace('_', '.')}",
                    output_index=item.index,
                    item=item.body(),
                )
            elif isinstance(item, CallItem):
                place = {"item_id": item.id, "output_index": item.index}
                if step.kind == "delta":
                    yield self._event("response.function_call_arguments.delta", **place, delta=step.text)
                elif step.kind == "done":
                    yield self._event(
                        "response.function_call_arguments.done",
                        **place,
                        name=item.name,
                        arguments=item.arguments,
                    )
            elif step.part is not None:
                yield self._part_told(step, step.part)

    def _part_told(self, step: Step, part: Part) -> bytes:
        place = {
            "item_id": step.item.id,
            "output_index": step.item.index,
            "content_index": part.index,
        }
        if step.kind in ("part_added", "part_done"):
            return self._event(f"response.content_{step.kind.replace('_', '.')}", **place, part=part.body())
        extra: dict[str, Any] = {}
        if part.kind == "output_text":
            extra["logprobs"] = step.logprobs if step.kind == "delta" else part.logprobs
        if step.kind == "delta":
            return self._event(f"response.{part.kind}.delta", **place, delta=step.text, **extra)
        field = "refusal" if part.kind == "refusal" else "text"
        return self._event(f"response.{part.kind}.done", **place, **{field: part.text}, **extra)

    def _event(self, type_: str, **fields: Any) -> bytes:
        number = self._sequence
        self._sequence = number + 1
        return self._framer.named(type_.encode(), {"type": type_, "sequence_number": number, **fields})


def _error_of(error: StockpotError) -> ResponseError:
    detail = body_of(error).error
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"] = "server_error"
    if error.status < 500:
        code = "rate_limit_exceeded" if error.status == 429 else "invalid_prompt"
    return ResponseError(code, detail.message, detail.type, detail.param)

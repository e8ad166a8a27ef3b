"""Answers that are kept: recorded as they pass, given again event for event, never taken where damaged."""

from __future__ import annotations

import math
import zlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import blake3
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.events import (
    Completed,
    Delta,
    Event,
    Finished,
    FinishReason,
    Progress,
    Queued,
    Started,
    Timings,
    TokenDetail,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from stockpot.recall.answer import DamagedAnswer, Recorder, pack, replay, text_of, unpack
from stockpot.requests import (
    CacheBoundary,
    ChatRequest,
    Generation,
    GenerationRequest,
    Message,
    Sampling,
    Tool,
    ToolChoice,
)
from stockpot.wire.anthropic_answer import MessageCollector, MessageNarrator
from stockpot.wire.chat_answer import ChatCollector, ChatNarrator
from stockpot.wire.delivery import Collector, Narrator

pytestmark = pytest.mark.anyio

ASKED = ChatRequest(Generation("m", "r"), (Message("user", "hello"),))
DONE = Completed(Usage(7, {"ram": 3}, 2), Timings(0.1, 0.2, 0.3))
NOW = Timings(0.0, 0.0, 0.0)
ROOM_BYTES = 2**20

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
TOKENS = st.builds(
    TokenLogprob,
    token_id=st.integers(-1, 200_000),
    data=st.binary(max_size=4),
    logprob=st.floats(max_value=0, allow_nan=False) | st.just(-math.inf),
)
CALLS = st.builds(
    ToolCallDelta,
    index=st.integers(0, 2),
    id=st.none() | st.just("") | TEXTS,
    name=st.none() | TEXTS,
    arguments=TEXTS,
)
DELTAS = st.builds(
    Delta,
    choice=st.integers(0, 2),
    text=TEXTS,
    token_ids=st.lists(st.integers(0, 200_000), max_size=3).map(tuple),
    details=st.lists(st.builds(TokenDetail, TOKENS, st.lists(TOKENS, max_size=2).map(tuple)), max_size=2).map(
        tuple
    ),
    reasoning=st.just("") | TEXTS,
    refusal=st.just("") | TEXTS,
    tool_calls=st.just(()) | st.lists(CALLS, max_size=2).map(tuple),
    signature=st.just("") | TEXTS,
)
ENDS = st.builds(
    Finished,
    choice=st.integers(0, 2),
    reason=st.sampled_from(["stop", "tool_calls", "length", "content_filter"]),
    detail=st.none() | TEXTS,
    stop_sequence=st.none() | TEXTS,
)
USAGES = st.builds(
    Usage,
    prompt_tokens=st.integers(0, 10**6),
    cached_tokens=st.just({}),
    completion_tokens=st.integers(0, 10**6),
    promised_tokens=st.none() | st.just({300: 5}),
    estimated=st.booleans(),
    reasoning_tokens=st.none() | st.integers(0, 10**6),
)


@st.composite
def streams(draw: st.DrawFn) -> list[Event]:
    """Whatever a backend may produce: choices interleaved, an end anywhere behind what its choice said."""
    content: list[Event] = list(draw(st.lists(DELTAS, max_size=12)))
    for end in draw(st.lists(ENDS, max_size=3, unique_by=lambda end: end.choice)):
        behind = max((at + 1 for at, each in enumerate(content) if _choice(each) == end.choice), default=0)
        content.insert(draw(st.integers(behind, len(content))), end)
    completed = Completed(draw(USAGES), Timings(0.1, 0.2, 0.3))
    return [Queued(1), Queued(0), Started(7, {"ram": 3}, 0.1), Progress(2, 4), *content, completed]


def _choice(event: Event) -> int:
    return event.choice if isinstance(event, Delta | Finished) else -1


def content_of(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, Delta | Finished)]


def replayed(packed: bytes, request: GenerationRequest = ASKED) -> list[Event]:
    return list(replay(unpack(packed), request))


@given(streams())
def test_an_answer_is_given_again_event_for_event(events: list[Event]) -> None:
    again = replayed(pack(events))
    first, started, last = again[0], again[1], again[-1]
    assert content_of(again) == content_of(events)
    assert content_of(again) == again[2:-1]
    made = events[-1]
    assert isinstance(made, Completed)
    cached = {"answer": made.usage.prompt_tokens}
    assert first == Queued(0)
    assert started == Started(made.usage.prompt_tokens, cached, 0.0)  # pyright: ignore[reportArgumentType]
    assert isinstance(last, Completed)
    assert last.timings == NOW
    assert last.delivery is None
    assert last.usage.cached_tokens == cached
    assert last.usage.completion_tokens == made.usage.completion_tokens
    assert last.usage.reasoning_tokens == made.usage.reasoning_tokens
    assert last.usage.estimated == made.usage.estimated
    said = "".join(each.text for each in events if isinstance(each, Delta) and each.choice == 0)
    assert text_of(unpack(pack(events))) == said


def told(narrator: Narrator, events: Sequence[Event]) -> bytes:
    """A stream's bytes, all but those of `Completed`, which tell how it came."""
    stream = b""
    for event in events:
        if isinstance(event, Delta):
            stream += narrator.delta(event)
        elif isinstance(event, Finished):
            stream += narrator.finished(event)
    return stream


def collected(collector: Collector, events: Sequence[Event]) -> bytes:
    for event in events:
        if isinstance(event, Delta):
            collector.delta(event)
        elif isinstance(event, Finished):
            collector.finished(event)
    return msgspec.json.encode(collector.answer(DONE))


@given(streams(), st.booleans())
def test_what_clients_read_is_the_same_streamed_or_collected(events: list[Event], logprobs: bool) -> None:
    again = replayed(pack(events))

    def chat_stream() -> Narrator:
        return ChatNarrator(id="c", created=1, model="m", usage=False)

    def chat() -> Collector:
        return ChatCollector(id="c", created=1, model="m", choices=3, logprobs=logprobs)

    assert told(chat_stream(), again) == told(chat_stream(), events)
    assert collected(chat(), again) == collected(chat(), events)
    # The Anthropic API has one choice, and gives a call without an id a random one.
    if any(not call.id for event in events if isinstance(event, Delta) for call in event.tool_calls):
        return
    assert told(MessageNarrator(id="c", model="m"), again) == told(MessageNarrator(id="c", model="m"), events)
    collectors = [MessageCollector(id="c", model="m") for _ in range(2)]
    assert collected(collectors[0], again) == collected(collectors[1], events)


def test_promises_are_told_only_to_those_who_asked_for_some() -> None:
    packed = pack([Delta(0, "a"), Finished(0, "stop"), DONE])
    boundaries = (CacheBoundary(0, None, 300),)
    asked = ChatRequest(ASKED.generation, ASKED.messages, boundaries=boundaries)
    for request in (ASKED, asked):
        last = replayed(packed, request)[-1]
        assert isinstance(last, Completed)
        assert last.usage.promised_tokens == ({} if request is asked else None)


async def recorded(events: AsyncGenerator[Event]) -> tuple[list[Event], Recorder]:
    recorder, seen = Recorder(ROOM_BYTES), list[Event]()
    async for event in events:
        recorder.saw(event)
        seen.append(event)
    return seen, recorder


@pytest.mark.parametrize("tools", [(), (Tool("look", parameters={"type": "object"}),)], ids=["text", "tool"])
async def test_answers_of_a_backend_are_recorded_and_replayed(tools: tuple[Tool, ...]) -> None:
    generation = Generation("fake", "r", sampling=Sampling(temperature=0.0), choices=2, logprobs=2)
    choice = ToolChoice("named", "look") if tools else None
    backend = FakeBackend(FakeBehaviour(accepts_all=True))
    await backend.start()
    made = backend.generate(ChatRequest(generation, ASKED.messages, tools=tools, tool_choice=choice))
    seen, recorder = await recorded(made)
    await backend.stop(drain=True)
    packed = recorder.answer()
    assert packed is not None
    assert packed == pack(seen)
    assert content_of(replayed(packed)) == content_of(seen)


ENDED = Finished(0, "stop")
SAID = Delta(0, "yes")


@pytest.mark.parametrize(
    ("events", "why_not"),
    [
        ([SAID, ENDED, DONE], ""),
        ([Delta(0, "", tool_calls=(ToolCallDelta(0, "c", "look"),)), Finished(0, "tool_calls"), DONE], ""),
        ([SAID, Delta(0, "", refusal="but"), ENDED, DONE], ""),
        ([SAID, Delta(1, "no"), Finished(1, "stop"), ENDED, DONE], ""),
        ([SAID, ENDED], "incomplete"),
        ([SAID, DONE], "incomplete"),
        ([DONE], "incomplete"),
        ([], "incomplete"),
        ([SAID, Delta(1, "no"), ENDED, DONE], "incomplete"),
        ([Delta(0, "", refusal="I will not."), ENDED, DONE], "refused"),
        ([SAID, Delta(1, "", refusal="I will not."), ENDED, Finished(1, "stop"), DONE], "refused"),
        ([ENDED, DONE], "empty"),
        ([Delta(0, "", (1,)), ENDED, DONE], "empty"),
        ([Delta(0, "", reasoning="hm"), ENDED, DONE], "empty"),
        ([Delta(0, "\ud800"), ENDED, DONE], "no_form"),
        ([Delta(0, "a", (2**64,)), ENDED, DONE], "no_form"),
        *(
            ([SAID, Finished(0, reason), DONE], reason)
            for reason in ("length", "content_filter", "cancelled", "deadline", "error")
        ),
        ([SAID, Delta(1, "no"), ENDED, Finished(1, "length"), DONE], "length"),
    ],
)
def test_only_whole_answers_are_kept(events: Sequence[Event], why_not: FinishReason | str) -> None:
    recorder = Recorder(ROOM_BYTES)
    for event in events:
        recorder.saw(event)
    answer = recorder.answer()
    assert recorder.why_not == why_not
    assert (answer is None) == bool(why_not)
    assert recorder.answer() == answer


def test_an_answer_without_a_choice_that_was_asked_for_is_not_kept() -> None:
    for choices, kept in ((1, True), (2, False)):
        recorder = Recorder(ROOM_BYTES, choices)
        for event in (SAID, ENDED, DONE):
            recorder.saw(event)
        assert (recorder.answer() is not None) == kept


@pytest.mark.parametrize(
    "delta",
    [
        Delta(0, "x" * 100),
        Delta(0, "", reasoning="x" * 100),
        Delta(0, "", tool_calls=(ToolCallDelta(0, arguments="x" * 100),)),
        Delta(0, "a", (1,) * 100),
        Delta(0, "a", (1,), (TokenDetail(TokenLogprob(1, b"a", -0.5), (TokenLogprob(1, b"a", -0.5),) * 10),)),
    ],
    ids=["text", "reasoning", "arguments", "tokens", "details"],
)
def test_a_long_answer_is_let_go_before_it_is_over(delta: Delta) -> None:
    recorder = Recorder(1024)
    for _ in range(20):
        recorder.saw(delta)
    assert recorder.why_not == "too_long"
    for event in (ENDED, DONE):
        recorder.saw(event)
    assert recorder.answer() is None
    assert recorder.why_not == "too_long"


@given(st.lists(DELTAS, max_size=12), st.integers(0, 600))
def test_an_answer_is_kept_as_long_as_it_is_within_bounds(deltas: list[Delta], room_bytes: int) -> None:
    whole, bounded = Recorder(ROOM_BYTES), Recorder(room_bytes)
    for event in (SAID, *(replace(delta, choice=0) for delta in deltas), ENDED, DONE):
        whole.saw(event)
        bounded.saw(event)
    answer = whole.answer()
    assert answer is not None
    taken_bytes = len(zlib.decompress(answer[9:]))
    assert bounded.answer() == (answer if taken_bytes <= room_bytes else None)


PACKED = pack(
    [
        Delta(0, "", reasoning="hm", signature="s"),
        Delta(0, "yes, ", (5,), (TokenDetail(TokenLogprob(5, b"yes", -0.1)),)),
        Delta(0, "indeed", (6, 7)),
        ENDED,
        DONE,
    ]
)


def test_damage_is_found() -> None:
    for at in range(len(PACKED)):
        for bit in (1, 128):
            damaged = bytearray(PACKED)
            damaged[at] ^= bit
            with pytest.raises(DamagedAnswer):
                unpack(bytes(damaged))
    for length in range(len(PACKED)):
        with pytest.raises(DamagedAnswer):
            unpack(PACKED[:length])
    with pytest.raises(DamagedAnswer):
        unpack(PACKED + b"\0")


def sealed(encoded: bytes) -> bytes:
    deflated = zlib.compress(encoded, 9)
    return b"\x01" + blake3.blake3(deflated).digest(8) + deflated


COLUMNS: list[Any] = msgspec.msgpack.decode(zlib.decompress(PACKED[9:]))


MISFITS: list[tuple[int, Any]] = [
    (4, [0, 0]),
    (5, ["a"]),
    (5, [1, 2, 3]),
    (6, [0, 1, 3]),
    (6, [4, -1, 0]),
    (7, [5, 6]),
    (8, [[3, "", "", "", [], []]]),
    (8, [[1, "", "", "", [], []], [0, "", "", "", [], []]]),
    (8, [[1, "", "", "", [], []], [1, "", "", "", [], []]]),
    (9, [[4, 0, "stop", None, None]]),
    (9, [[-1, 0, "stop", None, None]]),
    (9, [[3, 0, "bored", None, None]]),
]


@pytest.mark.parametrize(("column", "value"), MISFITS)
def test_columns_that_do_not_fit_are_damage(column: int, value: Any) -> None:
    unpack(sealed(msgspec.msgpack.encode(COLUMNS)))
    columns = [value if place == column else each for place, each in enumerate(COLUMNS)]
    with pytest.raises(DamagedAnswer):
        unpack(sealed(msgspec.msgpack.encode(columns)))


@pytest.mark.parametrize("encoded", [b"", b"\xc1", b"\x91" * 100_000, b"\0" * (2**26 + 1)])
def test_what_nobody_has_packed_is_damage(encoded: bytes) -> None:
    with pytest.raises(DamagedAnswer):
        unpack(sealed(encoded))


@given(st.binary(max_size=64))
def test_noise_is_damage(noise: bytes) -> None:
    for data in (noise, b"\x01" + noise, sealed(noise)):
        with pytest.raises(DamagedAnswer):
            unpack(data)


def test_an_answer_that_is_not_over_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="Completed"):
        pack([SAID, ENDED])

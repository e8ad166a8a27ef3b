"""Which requests are the same: whatever can change the answer tells them apart, and nothing else does."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.caller import Caller
from stockpot.recall.exact_key import exact_key, partition_key
from stockpot.requests import (
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    Generation,
    GenerationRequest,
    ImagePart,
    Message,
    OpaquePart,
    OutputFormat,
    RecallControl,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from stockpot.routing.plan import RoutePlan, Step
from stockpot.settings_gateway import CascadeSettings

PLAN = RoutePlan("asked", (Step("small"),), "least-load")

PARTS = (
    TextPart("what is this?"),
    ImagePart(media_type="image/png", data="AAAA"),
    OpaquePart("openai", {"type": "input_audio", "input_audio": {"data": "AAAA"}}),
)
CHAT = ChatRequest(
    Generation("asked", "r1", extras={"effort": "low"}),
    (
        Message("system", "Be brief."),
        Message("user", "what is this?", parts=PARTS),
        Message("assistant", "", tool_calls=(ToolCall("c1", "look", '{"at": 1}'),)),
        Message("tool", "a cat", tool_call_id="c1"),
        Message("user", "What is its name?"),
    ),
    tools=(Tool("look", "looks", {"type": "object"}),),
    tool_choice=ToolChoice("named", "look"),
)
COMPLETION = CompletionRequest(Generation("asked", "r1"), "Once upon a time")


def key(request: GenerationRequest, scope: str = "t", plan: RoutePlan = PLAN, version: str = "1") -> bytes:
    found = exact_key(scope, plan, version, request)
    assert found is not None
    assert len(found) == 32
    return found


def with_extras(request: ChatRequest, extras: Mapping[str, Any]) -> ChatRequest:
    return replace(request, generation=replace(request.generation, extras=extras))


OTHERWISE: dict[type[Any], dict[str, Any]] = {
    Generation: {
        "sampling": Sampling(seed=1),
        "output_format": OutputFormat("json_object"),
        "max_tokens": 5,
        "stop": ("x",),
        "choices": 2,
        "logprobs": 0,
        "ignore_eos": True,
        "dialect": "anthropic",
        "extras": {"effort": "high"},
    },
    Sampling: {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {1: 2.0},
        "seed": 0,
    },
    OutputFormat: {"kind": "json_schema", "schema": {"type": "string"}, "name": "n", "strict": False},
    Message: {
        "role": "developer",
        "content": "Be brief",
        "name": "n",
        "parts": (TextPart("Be brief."),),
        "tool_calls": (ToolCall("c", "n", ""),),
        "tool_call_id": "c",
        "tool_failed": True,
    },
    TextPart: {"text": "what is this"},
    ImagePart: {"url": "https://x", "media_type": "image/gif", "data": "AAAB", "detail": "low"},
    OpaquePart: {"dialect": "anthropic", "value": {"type": "input_audio"}},
    ToolCall: {"id": "c2", "name": "see", "arguments": '{"at":1}'},
    Tool: {"name": "see", "description": None, "parameters": {"type": "string"}, "strict": True},
    ToolChoice: {"mode": "required", "name": "see"},
    ChatRequest: {
        "messages": CHAT.messages[1:],
        "template_arguments": {"thinking": True},
        "tools": (),
        "tool_choice": None,
        "parallel_tool_calls": False,
    },
    CompletionRequest: {"prompt": [1, 2], "echo": True},
}
"""For each field that counts, another value than the requests above have."""

NAMING: dict[type[Any], dict[str, Any]] = {
    Generation: {
        "model": "alias",
        "request_id": "r2",
        "deadline_s": 1.0,
        "tenant": "other",
        "client_request_id": "c",
        "caller": Caller("other", "k"),
        "session": "s",
        "task": "t",
        "user": "u",
        "priority": "high",
        "stream": True,
        "trace_parent": "00-1",
        "recall": RecallControl(read=False),
    },
    ChatRequest: {"boundaries": (CacheBoundary(0, None, 300),)},
    CompletionRequest: {"boundaries": (CacheBoundary(0, None, 300),)},
}
"""For each that does not."""


def changed(value: Any, kind: type[Any], change: dict[str, Any]) -> Any:
    """The same, but for this in everything of that kind."""
    if type(value) is kind:
        return replace(value, **change)
    if isinstance(value, tuple):
        return tuple(changed(each, kind, change) for each in cast("tuple[Any, ...]", value))
    if is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in fields(value)]
        return replace(value, **{name: changed(getattr(value, name), kind, change) for name in names})
    return value


def one_and_other(kind: type[Any], name: str, value: Any) -> tuple[GenerationRequest, GenerationRequest]:
    one = COMPLETION if kind is CompletionRequest else CHAT
    return one, changed(one, kind, {name: value})


def cases(table: dict[type[Any], dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(kind, name, value, id=f"{kind.__name__}.{name}")
        for kind, values in table.items()
        for name, value in values.items()
    ]


@pytest.mark.parametrize("kind", OTHERWISE)
def test_of_each_field_it_is_known_whether_it_counts(kind: type[Any]) -> None:
    parts = {"generation"} if kind in (ChatRequest, CompletionRequest) else set[str]()
    known = parts | set(OTHERWISE[kind]) | set(NAMING.get(kind, {}))
    assert {each.name for each in fields(kind)} == known


@pytest.mark.parametrize(("kind", "name", "value"), cases(OTHERWISE))
def test_what_can_change_the_answer_tells_requests_apart(kind: type[Any], name: str, value: Any) -> None:
    one, other = one_and_other(kind, name, value)
    assert key(one) != key(other)
    if isinstance(one, ChatRequest) and isinstance(other, ChatRequest):
        partitions = {partition_key("t", PLAN, "1", each, "e", exact_context=True) for each in (one, other)}
        assert len(partitions) == 2


@pytest.mark.parametrize(("kind", "name", "value"), cases(NAMING))
def test_what_only_names_a_request_does_not(kind: type[Any], name: str, value: Any) -> None:
    one, other = one_and_other(kind, name, value)
    assert key(one) == key(other)


def test_scope_model_version_and_cascade_tell_requests_apart() -> None:
    cascade = CascadeSettings(to="large")
    keys = [
        key(CHAT),
        key(CHAT, scope="u"),
        key(CHAT, scope=""),
        key(CHAT, version="2"),
        key(CHAT, plan=replace(PLAN, steps=(Step("large"),))),
        key(CHAT, plan=replace(PLAN, cascade=cascade)),
        key(CHAT, plan=replace(PLAN, cascade=cascade.model_copy(update={"on": ("length",)}))),
    ]
    assert len(set(keys)) == len(keys)
    assert key(CHAT, plan=replace(PLAN, asked="alias", steps=(Step("small"), Step("spare")))) == key(CHAT)


def test_a_text_and_its_token_ids_are_different_prompts() -> None:
    prompts: list[str | Sequence[int]] = ["", "1", [], [1], [49]]
    assert len({key(replace(COMPLETION, prompt=prompt)) for prompt in prompts}) == len(prompts)
    assert key(replace(COMPLETION, prompt=range(3))) == key(replace(COMPLETION, prompt=(0, 1, 2)))


def test_messages_are_not_run_together() -> None:
    splits = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]
    requests = [replace(CHAT, messages=tuple(Message("user", text) for text in split)) for split in splits]
    assert len({key(each) for each in requests}) == len(splits)


def test_the_order_of_keys_and_white_space_between_tokens_do_not_count() -> None:
    one = msgspec.json.decode(b'{"a": {"x": [1, 2], "y": "\\u0041"}, "b": null}')
    other = msgspec.json.decode(b' {"b":null,"a":{"y":"A",\n"x":[1,2]}}')
    assert key(with_extras(CHAT, one)) == key(with_extras(CHAT, other))
    frozen = MappingProxyType({"b": None, "a": MappingProxyType({"y": "A", "x": (1, 2)})})
    assert key(with_extras(CHAT, one)) == key(with_extras(CHAT, frozen))
    biased = [Sampling(logit_bias={1: 1.0, 2: 2.0}), Sampling(logit_bias={2: 2.0, 1: 1.0})]
    one, other = (replace(CHAT, generation=replace(CHAT.generation, sampling=each)) for each in biased)
    assert key(one) == key(other)


def test_no_text_is_normalised() -> None:
    texts = ["é", "e\u0301", "É", " é", "é ", "é\n", "é\r\n", '{"a": 1}', '{"a":1}']
    requests = [replace(COMPLETION, prompt=text) for text in texts]
    assert len({key(each) for each in requests}) == len(texts)


@pytest.mark.parametrize(
    ("dialect", "naming", "counting"),
    [
        (
            "openai",
            {"user": "u", "prompt_cache_key": "p", "safety_identifier": "s"},
            {"metadata": {"a": "b"}},
        ),
        ("anthropic", {"metadata": {"user_id": "u"}}, {"user": "u"}),
    ],
)
def test_unknown_fields_count_unless_they_are_known_to_name(
    dialect: Any, naming: dict[str, Any], counting: dict[str, Any]
) -> None:
    plain = replace(CHAT, generation=replace(CHAT.generation, dialect=dialect))
    extras = CHAT.generation.extras
    assert key(with_extras(plain, {**extras, **naming})) == key(plain)
    assert key(with_extras(plain, {**extras, **counting})) != key(plain)


WIDE = [2**63, 2**64 - 1, 2**64, 2**64 + 1, 2**71, 2**72, -(2**63), -(2**63) - 1, -(2**71), 10**40]


def test_integers_of_any_width_have_a_form() -> None:
    keys = {key(with_extras(CHAT, {"x": {"y": [value, value]}})) for value in WIDE}
    assert len(keys) == len(WIDE)
    one, other = {"x": 2**80, "y": 1}, {"y": 1, "x": 2**80}
    assert key(with_extras(CHAT, one)) == key(with_extras(CHAT, other))


def test_what_has_no_form_has_no_key() -> None:
    deep: Any = 2**70
    for _ in range(100_000):
        deep = [deep]
    for value in ("\ud800", {"\ud800": 1}, deep, object()):
        request = with_extras(CHAT, {"x": value})
        assert exact_key("t", PLAN, "1", request) is None
        assert partition_key("t", PLAN, "1", request, "e", exact_context=True) is None
    while isinstance(deep, list):  # taken apart here: freeing it nested would recurse as deeply
        deep = cast("list[Any]", deep).pop()


LEAVES = st.sampled_from([None, False, True, 0, 1, -1, 0.0, -0.0, 1.0, 255, 256, "", "0", "1", "a", "b", "é"])
JSON = st.recursive(
    LEAVES | st.sampled_from(WIDE) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["", "a", "b", "ab"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SMALL = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
    ),
    max_leaves=3,
)


def told(value: Any) -> Any:
    """A value that equals another's if and only if the JSON is the same."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return ("object", frozenset((name, told(item)) for name, item in items))
    if isinstance(value, list):
        return ("array", tuple(told(item) for item in cast("list[Any]", value)))
    if isinstance(value, float):
        return ("float", struct.pack("d", value))
    return (type(value).__name__, value)


@given(st.one_of(st.tuples(JSON, JSON), st.tuples(SMALL, SMALL)))
def test_different_values_have_different_keys_and_equal_ones_the_same(pair: tuple[Any, Any]) -> None:
    one, other = (key(with_extras(CHAT, {"x": value})) for value in pair)
    assert (one == other) == (told(pair[0]) == told(pair[1]))


@given(JSON, st.randoms())
def test_every_object_may_be_in_any_order(value: Any, random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            items = list(cast("dict[str, Any]", value).items())
            random.shuffle(items)
            return MappingProxyType({name: shuffled(item) for name, item in items})
        if isinstance(value, list):
            return tuple(shuffled(item) for item in cast("list[Any]", value))
        return value

    assert key(with_extras(CHAT, {"x": value})) == key(with_extras(CHAT, {"x": shuffled(value)}))


TURNS = (
    Message("system", "Be brief."),
    Message("user", "Who wrote Faust?"),
    Message("assistant", "Goethe."),
    Message("user", "When was he born?"),
)
TALK = ChatRequest(Generation("asked", "r1"), TURNS)


def partition(
    messages: Sequence[Message], *, exact: bool = True, embedder: str = "minilm", scope: str = "t"
) -> bytes:
    request = replace(TALK, messages=tuple(messages))
    found = partition_key(scope, PLAN, "1", request, embedder, exact_context=exact)
    assert found is not None
    assert len(found) == 16
    return found


def test_questions_of_a_partition_differ_in_the_last_text_alone() -> None:
    for exact in (True, False):
        asked = partition(TURNS, exact=exact)
        assert partition((*TURNS[:3], Message("user", "Where was he born?")), exact=exact) == asked
        assert partition((*TURNS[:3], Message("user", "When was he born?", name="n")), exact=exact) != asked
        assert partition((Message("system", "Be long."), *TURNS[1:]), exact=exact) != asked
        assert partition(TURNS[1:], exact=exact) != asked
        assert partition(TURNS, exact=exact, embedder="other") != asked
        assert partition(TURNS, exact=exact, scope="u") != asked
    assert partition(TURNS, exact=True) != partition(TURNS, exact=False)
    assert key(TALK)[:16] != partition(TURNS)


def test_what_was_said_before_counts_unless_its_meaning_is_compared() -> None:
    other = (TURNS[0], Message("user", "Who wrote Hamlet?"), Message("assistant", "Shakespeare."), TURNS[3])
    assert partition(other) != partition(TURNS)
    assert partition(other, exact=False) == partition(TURNS, exact=False)
    assert partition((TURNS[0], TURNS[3]), exact=False) == partition(TURNS, exact=False)


def test_what_is_more_than_text_counts_either_way() -> None:
    pictures = [
        Message("user", "", parts=(ImagePart(media_type="image/png", data=data),)) for data in ("AA", "AB")
    ]
    for exact in (True, False):
        before = {partition((TURNS[0], picture, TURNS[3]), exact=exact) for picture in pictures}
        last = {partition((*TURNS[:3], picture), exact=exact) for picture in pictures}
        called = Message("assistant", "", tool_calls=(ToolCall("c", "look", "{}"),))
        tool = partition(
            (TURNS[0], called, Message("tool", "a cat", tool_call_id="c"), TURNS[3]), exact=exact
        )
        assert len({*before, *last, tool, partition(TURNS, exact=exact)}) == 6
    texts = [Message("user", text, parts=(TextPart(text), *pictures[0].parts)) for text in ("this?", "that?")]
    assert partition((texts[0],)) == partition((texts[1],))
    assert key(replace(TALK, messages=(texts[0],))) != key(replace(TALK, messages=(texts[1],)))


def test_without_a_question_nothing_is_left_out() -> None:
    instructions = [(Message("system", text),) for text in ("Be brief.", "Be long.")]
    assert partition(instructions[0]) != partition(instructions[1])

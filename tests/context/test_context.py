"""`Context`: append-only holds, calls and results stay together, what moves on is told at the end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot import context
from stockpot.context import Context
from stockpot.errors import StockpotError

Step = tuple[str, str]


def call(id: str, name: str = "find", arguments: Any = "{}") -> dict[str, Any]:
    """As OpenAI has it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


STEPS = st.lists(
    st.tuples(st.sampled_from(["user", "tools", "fact", "state", "boundary"]), st.text(max_size=8)),
    max_size=25,
)


def play(prompt: Context, step: Step, number: int) -> None:
    """One thing an agent may do. After each but a fact or a state it could ask the model."""
    kind, text = step
    match kind:
        case "user":
            prompt.user(text or "go on")
            prompt.assistant(f"answer {text}")
        case "tools":
            prompt.user(text or "look")
            ids = [f"{number}a", f"{number}b"]
            prompt.assistant(tool_calls=[call(id, arguments={"q": text}) for id in ids])
            for id in reversed(ids):
                prompt.tool_result(id, {"found": text})
            prompt.assistant("done")
        case "fact":
            prompt.fact("time", text)
        case "state":
            prompt.state.set("plan.step", text)
        case _:
            if len(prompt):
                prompt.boundary()


def made(**more: Any) -> Context:
    tools = [{"name": "find", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}]
    return Context(system="Be kind.", tools=tools, documents={"rules": "Be brief."}, **more)


@given(STEPS)
def test_each_prompt_begins_with_the_one_before(steps: list[Step]) -> None:
    prompt = made()
    before: list[Any] = []
    for number, step in enumerate(steps):
        play(prompt, step, number)
        now = prompt.openai("m")["messages"]
        if len(prompt):
            assert now[: len(before)] == before
            before = now


@given(STEPS, st.integers(0, 30))
def test_a_fork_shares_its_beginning_and_nothing_else(steps: list[Step], turns: int) -> None:
    prompt = made()
    for number, step in enumerate(steps):
        play(prompt, step, number)
    log = prompt.prompt.log
    cut = next((each for each in range(min(turns, len(log)), -1, -1) if ends_whole(log[:each])), 0)
    fork = prompt.fork(cut)
    fork.state.set("plan.step", "forked")
    fork.user("another way")
    assert prompt.prompt.log == log
    assert fork.prompt.log[:cut] == log[:cut]
    assert all(each.count <= cut for each in fork.prompt.boundaries if each.section == "log")
    assert "forked" in fork.prompt.log[-1].content


def ends_whole(log: tuple[Any, ...]) -> bool:
    waiting: set[str] = set()
    for message in log:
        waiting |= {call.id for call in message.tool_calls}
        waiting -= {message.tool_call_id or ""}
    return not waiting


@given(STEPS)
def test_rendering_is_a_pure_function(steps: list[Step]) -> None:
    one, other = made(), made()
    for number, step in enumerate(steps):
        play(one, step, number)
        play(other, step, number)
    assert one.prompt == other.prompt
    assert one.openai("m") == one.openai("m") == other.openai("m")
    claude: dict[str, Any] = {"model": "claude-sonnet-4-5", "max_tokens": 10}
    assert one.anthropic(**claude) == other.anthropic(**claude)


def test_facts_are_told_when_they_change_and_stay() -> None:
    prompt = Context(system="Be kind.")
    prompt.fact("time", "10:00")
    prompt.fact("user", {"name": "Ann", "id": 7.0})
    prompt.user("hello")
    prompt.assistant("hello")
    prompt.user("again")
    prompt.assistant("yes")
    prompt.fact("time", "10:05")
    prompt.user("and again")
    told = [message.content for message in prompt.prompt.log if message.role == "user"]
    assert told == [
        'hello\n\n<facts>\ntime: 10:00\nuser: {"id":7,"name":"Ann"}\n</facts>',
        "again",
        "and again\n\n<facts>\ntime: 10:05\n</facts>",
    ]


def test_state_is_told_whole_once_and_then_by_what_has_changed() -> None:
    prompt = Context(state={"plan": {"step": 1, "left": ["a", "b"]}})
    prompt.user("go")
    prompt.assistant("ok")
    prompt.state.set("plan.step", 2)
    prompt.state.delete("plan.left")
    prompt.user("on")
    assert prompt.prompt.log[0].content.endswith('<state>{"plan":{"left":["a","b"],"step":1}}</state>')
    assert prompt.prompt.log[2].content.endswith(
        '<state_change>{"plan.left":null,"plan.step":2}</state_change>'
    )


def test_facts_come_behind_all_results_of_a_turn() -> None:
    prompt = made()
    prompt.user("look")
    prompt.assistant(tool_calls=[call(id) for id in ("1", "2")])
    prompt.fact("time", "10:00")
    prompt.tool_result("2", "second")
    prompt.tool_result("1", "first")
    assert [message.content for message in prompt.prompt.log[2:]] == [
        "second",
        "first\n\n<facts>\ntime: 10:00\n</facts>",
    ]


@pytest.mark.parametrize(
    ("system", "found"),
    [
        ("The current time is 2026-11-25T08:42:11Z.", "timestamp"),
        ("Today is November 25, 2026. Be kind.", "date"),
        ("Session 550e8400-e29b-41d4-a716-446655440000", "uuid"),
        ("You answer request #4711.", "counter"),
        ("Now: 1764060000", "timestamp"),
    ],
)
def test_what_moves_on_is_refused_early_with_the_way_out(system: str, found: str) -> None:
    with pytest.raises(context.VolatileText, match=f"has a {found}.*context.fact"):
        Context(system=system)
    with pytest.warns(context.VolatileTextWarning):
        Context(system=system, checks="warn")
    prompt = Context(system=system, checks="off")
    prompt.user("ok")
    with pytest.raises(context.VolatileText):
        Context(tools=[{"name": "a", "description": system}])
    with pytest.raises(context.VolatileText):
        Context(examples=[(system, "ok")])


@pytest.mark.parametrize(
    "system",
    [
        "We are open from 9:00 to 17:00, Monday to Friday.",
        "The company was founded on 12 April 1998.",
        "Step 1: read. Step 2: write. See RFC 2119, section 5.",
        "Use version 1.2.3, commit deadbeef1234.",
        "The contract ends on 2027-01-31.",
    ],
)
def test_what_never_changes_is_let_through(system: str) -> None:
    assert Context(system=system).prompt.system == (system,)


def test_calls_and_results_never_part() -> None:
    prompt = made()
    prompt.user("look")
    with pytest.raises(context.UnpairedCall, match="No call 'x' waits"):
        prompt.tool_result("x", "nothing")
    prompt.assistant(tool_calls=[call("1")])
    for early in (lambda: prompt.user("hello"), lambda: prompt.assistant("hello")):
        with pytest.raises(context.UnpairedCall, match=r"1 \(find\)"):
            early()
    with pytest.raises(context.UnpairedCall, match="wait for their results"):
        prompt.fork(2).user("hello")
    prompt.tool_result("1", "found")
    with pytest.raises(context.UnpairedCall):
        prompt.tool_result("1", "again")
    with pytest.raises(context.UnpairedCall, match="same id"):
        prompt.assistant(tool_calls=[call("2")] * 2)


def test_equal_tools_are_equal_in_bytes() -> None:
    one: dict[str, Any] = {
        "name": "a",
        "parameters": {"type": "object", "properties": {"x": {"minimum": 1.0}, "b": {}}},
    }
    other: dict[str, Any] = {
        "parameters": {"properties": {"b": {}, "x": {"minimum": 1}}, "type": "object"},
        "name": "a",
    }
    wrapped = {"type": "function", "function": {**other}}
    claude = {"name": "a", "input_schema": other["parameters"]}
    second = {"name": "b"}
    forms = [
        Context(tools=tools).openai("m") for tools in ([one, second], [second, other], [wrapped, second])
    ]
    forms.append(Context(tools=[claude, second]).openai("m"))
    assert len({context.canonical_json(each) for each in forms}) == 1
    assert len({str(each) for each in forms}) == 1
    with pytest.raises(context.NotCanonical):
        Context(tools=[{"name": "a", "parameters": {"default": float("nan")}}])


def test_arguments_that_are_text_stay_as_the_model_wrote_them() -> None:
    prompt = made()
    prompt.user("look")
    prompt.assistant(tool_calls=[call("1", arguments='{ "q" : 1 }')])
    assert prompt.prompt.log[1].tool_calls[0].arguments == '{ "q" : 1 }'


def test_a_boundary_needs_something_before_it() -> None:
    prompt = Context()
    with pytest.raises(StockpotError, match="nothing before"):
        prompt.boundary()
    prompt.user("a")
    prompt.boundary(ttl="1h", shared=True, tags=("x",))
    (boundary,) = prompt.prompt.boundaries
    assert (boundary.section, boundary.count, boundary.ttl_s, boundary.shared) == ("log", 1, 3600, True)
    with pytest.raises(StockpotError, match="ttl"):
        prompt.boundary(ttl="2h")

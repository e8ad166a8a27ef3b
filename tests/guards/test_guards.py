"""Guards over whole requests and answers: what reaches the model, what reaches the client, what is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.caller import Caller
from stockpot.errors import GuardRefused, StockpotError, UnsupportedField, cause_of
from stockpot.events import (
    Completed,
    Delta,
    Event,
    Finished,
    FinishReason,
    Notice,
    Queued,
    Started,
    Timings,
    ToolCallDelta,
    Usage,
)
from stockpot.guards import answer_texts, finders
from stockpot.guards.counts import GuardCounts
from stockpot.guards.guards import Guards, open_guards
from stockpot.requests import (
    CacheBoundary,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    OutputFormat,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from stockpot.settings_guards import GuardSettings

pytestmark = pytest.mark.anyio

KEY = "AKIAIOSFODNN7EXAMPLE"
GONE = "[redacted:aws_access_key]"
SECRETS = {"rule": "secrets"}
WORDS = {"rule": "block-list", "words": ["zebra"]}
PATTERN = {"rule": "pattern", "pattern": "[a-z]+", "on": "output"}
SCHEMA = {
    "rule": "json-schema",
    "on": "output",
    "schema": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}},
}
JUDGE = {"rule": "classifier", "judge": "judge-model"}
IMAGE = ImagePart(url="https://pictures/1")


class Around:
    """Guards of some rules, with a judge that says what it is told to, and what they did."""

    def __init__(self, verdict: str = '{"flagged": false}', **rules: Mapping[str, Any]) -> None:
        self.counts, self.notices, self.asked = GuardCounts(), list[Notice](), list[tuple[str, str, str]]()
        self.verdict = verdict
        settings = {
            name.replace("_", "-"): GuardSettings.model_validate(rule) for name, rule in rules.items()
        }
        self.guards: Guards = open_guards(settings, self._ask, self.counts)
        self.runs = 0

    async def _ask(self, model: str, instruction: str, text: str) -> str:
        self.asked.append((model, instruction, text))
        if self.verdict == "down":
            raise StockpotError("the judge is down")
        return self.verdict

    async def sent(self, request: Any) -> Any:
        return await self.guards.check_input(request, self.notices)

    async def given(self, *answers: list[Event], request: ChatRequest | None = None) -> list[Event]:
        """What the client gets where the model gives these answers, one after the other."""

        async def run() -> AsyncGenerator[Event]:
            events = answers[self.runs]
            self.runs += 1
            for event in (Queued(0), Started(3, {}, 0.0), *events):
                yield event

        stream = self.guards.answer(request or chat("hi"), run, self.notices)
        return [event async for event in stream]

    def totals(self) -> dict[tuple[str, str, str], int]:
        return dict(self.counts.totals())


def chat(*contents: str | Message, **generation: Any) -> ChatRequest:
    messages = [each if isinstance(each, Message) else Message("user", each) for each in contents]
    return ChatRequest(Generation("m", "r1", **generation), tuple(messages))


def answer(*texts: str, choice: int = 0, reason: FinishReason = "stop") -> list[Event]:
    return [
        *(Delta(choice, text) for text in texts),
        Finished(choice, reason),
        Completed(Usage(3, {}, 2), Timings(0.0, 0.0, 0.0)),
    ]


def said(events: list[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


# --- Input --------------------------------------------------------------------------------------------------


async def test_secrets_are_redacted_in_every_turn_and_every_call() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    request = chat(
        Message("system", f"Use {KEY}."),
        "hello",
        Message("assistant", "", tool_calls=(ToolCall("c1", "f", f'{{"key": "{KEY}"}}'),)),
        Message("tool", f"it was {KEY}", tool_call_id="c1"),
    )
    clean = await around.sent(request)
    assert [message.content for message in clean.messages] == [f"Use {GONE}.", "hello", "", f"it was {GONE}"]
    assert clean.messages[2].tool_calls[0].arguments == f'{{"key": "{GONE}"}}'
    assert clean.messages[1] is request.messages[1]
    assert around.totals() == {("secrets", "input", "redact"): 3}
    assert [notice.kind for notice in around.notices] == ["guard_redact"]
    assert "aws access key" in around.notices[0].detail
    assert KEY not in around.notices[0].detail


async def test_what_is_clean_is_not_copied() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    request = chat("hello", Message("user", "see", parts=(TextPart("see"), IMAGE)))
    assert await around.sent(request) is request
    assert around.notices == []


async def test_parts_say_what_the_content_says() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    parts = (TextPart(f"one {KEY} "), IMAGE, TextPart("two"))
    clean = await around.sent(chat(Message("user", f"one {KEY} two", parts=parts)))
    assert clean.messages[0].content == f"one {GONE} two"
    assert clean.messages[0].parts == (TextPart(f"one {GONE} "), IMAGE, TextPart("two"))
    assert around.totals() == {("secrets", "input", "redact"): 1}


async def test_a_secret_across_two_parts_is_found() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    parts = (IMAGE, TextPart(f"my {KEY[:9]}"), IMAGE, TextPart(f"{KEY[9:]} ok"))
    clean = await around.sent(chat(Message("user", f"my {KEY} ok", parts=parts)))
    assert clean.messages[0].parts == (IMAGE, TextPart(f"my {GONE} ok"), IMAGE)
    assert clean.messages[0].content == f"my {GONE} ok"


async def test_a_secret_that_only_a_part_alone_shows_is_found_and_told() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    parts = (TextPart("see"), IMAGE, TextPart(KEY))
    clean = await around.sent(chat(Message("user", f"see{KEY}", parts=parts)))
    assert clean.messages[0].content == f"see{GONE}"
    assert clean.messages[0].parts == (TextPart("see"), IMAGE, TextPart(GONE))
    assert around.totals() == {("secrets", "input", "redact"): 1}
    refusing = Around(secrets=SECRETS)
    with pytest.raises(GuardRefused):
        await refusing.sent(chat(Message("user", f"see{KEY}", parts=parts)))


async def test_texts_in_parts_of_one_dialect_are_read_and_data_is_not() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    text = {"type": "document", "source": {"type": "text", "data": f"a {KEY}"}, "title": KEY}
    data = {"type": "document", "source": {"type": "base64", "data": f"a {KEY}"}, "signature": KEY}
    parts = (OpaquePart("anthropic", text), OpaquePart("anthropic", data))
    clean = await around.sent(chat(Message("user", "", parts=parts)))
    first, second = clean.messages[0].parts
    assert first.value == {"type": "document", "source": {"type": "text", "data": f"a {GONE}"}, "title": GONE}
    assert second is parts[1]


async def test_boundaries_stay_where_they_were() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    content = f"{KEY} and more"
    within, behind, whole = (CacheBoundary(0, n, 300) for n in (5, len(KEY) + 4, None))
    other = CacheBoundary(1, 2, 300)
    request = ChatRequest(
        Generation("m", "r"),
        (Message("user", content), Message("user", "hello")),
        boundaries=(within, behind, whole, other),
    )
    clean = await around.sent(request)
    assert [each.characters for each in clean.boundaries] == [0, len(GONE) + 4, None, 2]


async def test_a_refusal_names_the_rule_and_not_the_text() -> None:
    around = Around(no_keys=SECRETS)
    with pytest.raises(GuardRefused) as refused:
        await around.sent(chat(f"use {KEY}"))
    assert "'no-keys'" in str(refused.value)
    assert "aws access key" in str(refused.value)
    assert KEY not in str(refused.value)
    assert refused.value.code == "guard_refused_input"
    assert cause_of(refused.value) == "guard"
    assert around.totals() == {("no-keys", "input", "refuse"): 1}


async def test_a_note_changes_nothing_and_is_told() -> None:
    around = Around(words={**WORDS, "action": "note"})
    request = chat("a zebra, and a Zebra")
    assert await around.sent(request) is request
    assert around.totals() == {("words", "input", "note"): 2}
    assert [notice.kind for notice in around.notices] == ["guard_note"]


async def test_prompts_and_texts_to_embed_are_read() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    completion = CompletionRequest(
        Generation("m", "r"), f"key {KEY}.", boundaries=(CacheBoundary(0, len(KEY) + 5, 300),)
    )
    clean = await around.sent(completion)
    assert clean.prompt == f"key {GONE}."
    assert clean.boundaries[0].characters == len(clean.prompt)
    embedding = await around.sent(EmbeddingRequest(Generation("m", "r"), ["hello", KEY]))
    assert tuple(embedding.inputs) == ("hello", GONE)


@pytest.mark.parametrize(
    "request_of_ids",
    [
        CompletionRequest(Generation("m", "r"), [1, 2, 3]),
        EmbeddingRequest(Generation("m", "r"), [[1, 2], [3]]),
    ],
)
@pytest.mark.parametrize("rule", [SECRETS, JUDGE])
async def test_token_ids_are_refused(request_of_ids: Any, rule: Mapping[str, Any]) -> None:
    around = Around(rule=rule)
    with pytest.raises(GuardRefused, match="token ids"):
        await around.sent(request_of_ids)
    assert await Around(rule={**rule, "on": "output"}).sent(request_of_ids) is request_of_ids


async def test_a_rule_holds_for_its_models_and_teams_alone() -> None:
    around = Around(secrets={**SECRETS, "models": ["m"], "teams": ["research"]})
    research, support = (Caller(team=team) for team in ("research", "support"))
    with pytest.raises(GuardRefused):
        await around.sent(chat(KEY, caller=research))
    assert await around.sent(chat(KEY, caller=support))
    other = ChatRequest(Generation("n", "r", caller=research), (Message("user", KEY),))
    assert await around.sent(other) is other
    assert said(await around.given(answer(KEY), request=other)) == KEY


async def test_the_judge_reads_what_the_model_would() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"}, judge={**JUDGE, "on": "input"})
    await around.sent(chat(f"my {KEY}", Message("assistant", "", tool_calls=(ToolCall("c", "f", "{}"),))))
    assert [(model, text) for model, _, text in around.asked] == [("judge-model", f"my {GONE}\n\n{{}}")]
    around.verdict = '{"flagged": true}'
    with pytest.raises(GuardRefused, match="'judge' refused the request: it was flagged"):
        await around.sent(chat("hello"))
    assert around.totals()["judge", "input", "refuse"] == 1


# --- Answers ------------------------------------------------------------------------------------------------


async def test_a_stream_is_held_only_as_far_as_needed() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    events = await around.given(answer("Hello, ", "use AKIAIOSF", "ODNN7EXAM", "PLE for ", "it."))
    texts = [event.text for event in events if isinstance(event, Delta)]
    # "it." may still become an address with a password in it.
    assert texts == ["Hello, ", "use ", "", f"{GONE} for ", "", "it."]
    assert [type(event) for event in events if not isinstance(event, Delta)] == [
        Queued,
        Started,
        Finished,
        Completed,
    ]
    assert around.totals() == {("secrets", "output", "redact"): 1}


async def test_what_is_held_comes_before_the_end() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    events = await around.given(answer("use AKIAIOSF"))
    assert said(events) == "use AKIAIOSF"
    assert isinstance(events[-2], Finished)


async def test_a_stream_is_refused_where_the_finding_is_complete() -> None:
    around = Around(words=WORDS)
    seen: list[Event] = []
    closed: list[bool] = []

    async def run() -> AsyncGenerator[Event]:
        try:
            for text in ("I saw a ", "ze", "bra", " today"):
                yield Delta(0, text)
        finally:
            closed.append(True)

    with pytest.raises(GuardRefused) as refused:
        async for event in around.guards.answer(chat("hi"), run, around.notices):
            seen.append(event)
    assert said(seen) == "I saw a "
    assert refused.value.code == "guard_refused_output"
    assert closed == [True]


async def test_each_choice_and_each_call_has_a_window_of_its_own() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    events = await around.given(
        [
            Delta(0, f"a {KEY[:8]}"),
            Delta(1, f"b {KEY[:12]}"),
            Delta(0, f"{KEY[8:]} c"),
            Delta(1, f"{KEY[12:]} d"),
            Delta(0, "", tool_calls=(ToolCallDelta(0, "c0", "f", f'{{"k": "{KEY[:5]}'),)),
            Delta(0, "", tool_calls=(ToolCallDelta(0, arguments=f'{KEY[5:]}"}}'),)),
            Delta(0, "", tool_calls=(ToolCallDelta(1, "c1", "g", '{"k": "AKIA'),)),
            Finished(0, "tool_calls"),
            Finished(1, "stop"),
        ]
    )
    assert said(events, 0) == f"a {GONE} c"
    assert said(events, 1) == f"b {GONE} d"
    arguments = {0: "", 1: ""}
    for event in events:
        for call in event.tool_calls if isinstance(event, Delta) else ():
            arguments[call.index] += call.arguments
    assert arguments == {0: f'{{"k": "{GONE}"}}', 1: '{"k": "AKIA'}


async def test_blocks_stay_in_order() -> None:
    """What is held of one goes out before the next begins: reasoning, its signature, text, calls."""
    around = Around(secrets={**SECRETS, "action": "redact"})
    events = await around.given(
        [
            Delta(0, "", reasoning="think sk-"),
            Delta(0, "", signature="signed"),
            Delta(0, "text sk-"),
            Delta(0, "", tool_calls=(ToolCallDelta(0, "c", "f", "args sk-"),)),
            Delta(0, "", tool_calls=(ToolCallDelta(1, "d", "g", "more"),)),
            Finished(0, "tool_calls"),
        ]
    )
    order: list[str] = []
    for event in events:
        if isinstance(event, Delta):
            order += [event.reasoning, event.signature, event.text]
            order += [f"{call.index}:{call.arguments}" for call in event.tool_calls]
    assert [piece for piece in order if piece] == [
        *("think ", "sk-", "signed", "text ", "sk-"),
        *("0:args ", "0:sk-", "1:", "1:more"),
    ]


async def test_one_delta_with_several_texts_loses_none() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    both = Delta(
        0,
        "text sk-",
        reasoning="think sk-",
        tool_calls=(ToolCallDelta(0, "c", "f", "a sk-"), ToolCallDelta(1, "d", "g", "b sk-")),
        signature="s",
    )
    events = await around.given([both, Finished(0, "tool_calls")])
    deltas = [event for event in events if isinstance(event, Delta)]
    assert "".join(delta.reasoning for delta in deltas) == "think sk-"
    assert deltas[0].reasoning == "think sk-"
    assert "".join(delta.text for delta in deltas) == "text sk-"
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert [call.id for call in calls[:2]] == ["c", "d"]
    for index, expected in ((0, "a sk-"), (1, "b sk-")):
        assert "".join(call.arguments for call in calls if call.index == index) == expected


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["text", "reasoning", "refusal", "call 0", "call 1"]),
            st.sampled_from(["hello ", "sk-", KEY, KEY[:7], "ghp_", " ", "x"]),
        ),
        max_size=12,
    )
)
async def test_channels_keep_their_texts_and_their_order(pieces: list[tuple[str, str]]) -> None:
    def delta(channel: str, text: str) -> Delta:
        if channel.startswith("call"):
            return Delta(0, "", tool_calls=(ToolCallDelta(int(channel[-1]), arguments=text),))
        fields: dict[str, Any] = {"text": "", channel: text}
        return Delta(0, **fields)

    def flat(events: list[Event]) -> list[tuple[str, str]]:
        blocks: list[tuple[str, str]] = []
        for event in events:
            if not isinstance(event, Delta):
                continue
            found = [(name, getattr(event, name)) for name in ("reasoning", "text", "refusal")]
            found += [(f"call {call.index}", call.arguments) for call in event.tool_calls]
            for channel, text in found:
                if text and blocks and blocks[-1][0] == channel:
                    blocks[-1] = (channel, blocks[-1][1] + text)
                elif text:
                    blocks.append((channel, text))
        return blocks

    around = Around(secrets={**SECRETS, "action": "note"})
    sent: list[Event] = [*(delta(*piece) for piece in pieces), Finished(0, "stop")]
    assert flat(await around.given(sent)) == flat(sent)


async def test_log_probabilities_do_not_go_past_a_rule() -> None:
    for action in ("redact", "refuse"):
        around = Around(secrets={**SECRETS, "action": action})
        with pytest.raises(UnsupportedField, match="Log probabilities"):
            await around.given(answer("hi"), request=chat("hi", logprobs=0))
    for rule in ({**SECRETS, "action": "note"}, {**SECRETS, "on": "input"}, PATTERN):
        assert said(await Around(rule=rule).given(answer("hi"), request=chat("hi", logprobs=0))) == "hi"


# --- Whole answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "text", "objection"),
    [
        (PATTERN, "hello", None),
        (PATTERN, " hello\n", None),
        (PATTERN, "hello 1", "does not match the pattern"),
        (PATTERN, "", "does not match the pattern"),
        (SCHEMA, '{"a": 1}', None),
        (SCHEMA, '{"a": "x"}', "does not satisfy the schema (type at /a)"),
        (SCHEMA, "{}", "does not satisfy the schema"),
        (SCHEMA, "hello", "is not JSON"),
        (SCHEMA, "", "is not JSON"),
    ],
)
async def test_the_form_of_an_answer(rule: Mapping[str, Any], text: str, objection: str | None) -> None:
    around = Around(form=rule)
    if objection is None:
        assert said(await around.given(answer(*text))) == text
        assert around.totals() == {}
        return
    with pytest.raises(GuardRefused) as refused:
        await around.given(answer(*text))
    assert objection in str(refused.value)
    assert around.totals() == {("form", "output", "refuse"): 1}


async def test_nothing_of_an_answer_goes_out_before_it_has_passed() -> None:
    around = Around(form=SCHEMA)
    seen: list[Event] = []

    async def run() -> AsyncGenerator[Event]:
        for event in (Queued(1), Queued(0), Started(3, {}, 0.0), *answer("{", "}")):
            yield event

    with pytest.raises(GuardRefused):
        async for event in around.guards.answer(chat("hi"), run, around.notices):
            seen.append(event)
    assert seen == [Queued(1), Queued(0), Started(3, {}, 0.0)]


async def test_every_choice_is_looked_at() -> None:
    around = Around(form=PATTERN)
    with pytest.raises(GuardRefused):
        await around.given([Delta(0, "fine"), Finished(0, "stop"), Finished(1, "stop")])
    calls = Delta(0, "", tool_calls=(ToolCallDelta(0, "c", "f", "{}"),))
    assert len(await around.given([], [calls, Finished(0, "tool_calls")])) == 4
    assert len(await around.given([], [], [Finished(0, "error", "lost")])) == 3


async def test_a_judge_reads_calls_and_refusals_too() -> None:
    around = Around(judge={**JUDGE, "on": "output", "instruction": "Is it rude?"})
    await around.given(
        [
            Delta(0, "text", refusal="no"),
            Delta(0, "", tool_calls=(ToolCallDelta(0, "c", "f", '{"a"'), ToolCallDelta(1, "d", "g", "{}"))),
            Delta(0, "", tool_calls=(ToolCallDelta(0, arguments=": 1}"),)),
            Finished(0, "tool_calls"),
            Finished(1, "stop"),
        ]
    )
    assert around.asked == [("judge-model", "Is it rude?", 'text\n\nno\n\n{"a": 1}\n\n{}')]


@pytest.mark.parametrize("verdict", ["down", "yes, it is rude", '{"flagged": "maybe"}', ""])
async def test_a_judge_without_a_decision_does_as_configured(verdict: str) -> None:
    refusing = Around(verdict, judge=JUDGE)
    with pytest.raises(GuardRefused, match="could not be judged"):
        await refusing.given(answer("hi"))
    allowing = Around(verdict, judge={**JUDGE, "when_it_fails": "allow"})
    assert said(await allowing.given(answer("hi"))) == "hi"


async def test_a_note_on_a_whole_answer_lets_it_pass() -> None:
    around = Around('{"flagged": true}', judge={**JUDGE, "action": "note"})
    assert said(await around.given(answer("hi"))) == "hi"
    assert around.totals() == {("judge", "output", "note"): 1}
    assert around.notices[0].kind == "guard_note"


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ({**SCHEMA, "action": "retry"}, "no JSON", '{"a": 1}'),
        ({**WORDS, "action": "retry", "on": "output"}, "a zebra", "a horse"),
    ],
)
async def test_a_retry_is_made_once_and_told(rule: Mapping[str, Any], bad: str, good: str) -> None:
    around = Around(again=rule)
    events = await around.given(answer(bad), answer(good))
    assert said(events) == good
    kinds = [type(event) for event in events if not isinstance(event, Delta)]
    assert kinds == [Queued, Started, Finished, Completed]
    assert around.runs == 2
    assert around.totals() == {("again", "output", "retry"): 1}
    assert [notice.kind for notice in around.notices] == ["guard_retry"]
    assert "'again'" in around.notices[0].detail

    around = Around(again=rule)
    with pytest.raises(GuardRefused, match="'again'"):
        await around.given(answer(bad), answer(bad), answer(good))
    assert around.runs == 2


async def test_a_rule_that_refuses_is_not_tried_again() -> None:
    around = Around(again={**SCHEMA, "action": "retry"}, never={**WORDS, "on": "output"})
    with pytest.raises(GuardRefused, match="'never'"):
        await around.given(answer("a zebra"), answer('{"a": 1}'))
    assert around.runs == 1


async def test_redaction_and_a_check_go_together() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"}, judge={**JUDGE, "on": "output"})
    assert said(await around.given(answer("use ", KEY[:9], KEY[9:]))) == f"use {GONE}"
    assert around.asked[0][2] == f"use {GONE}"


async def test_an_endless_answer_is_not_held_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_texts, "HELD_CHARACTERS_MAX", 100)
    around = Around(form=PATTERN)
    with pytest.raises(GuardRefused, match="more than 100 characters"):
        await around.given(answer(*("a" * 30 for _ in range(5))))


async def test_errors_of_the_model_pass_through() -> None:
    around = Around(form={**SCHEMA, "action": "retry"}, secrets={**SECRETS, "action": "redact"})

    async def run() -> AsyncGenerator[Event]:
        yield Queued(0)
        raise StockpotError("lost")

    with pytest.raises(StockpotError, match="lost"):
        [event async for event in around.guards.answer(chat("hi"), run, around.notices)]


async def test_without_rules_for_it_an_answer_is_left_alone() -> None:
    around = Around(secrets={**SECRETS, "on": "input"})
    events = answer("a", KEY)
    assert (await around.given(events))[2:] == events


# --- All that a backend is given ----------------------------------------------------------------------------


async def test_all_that_reaches_a_backend_is_read() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    schema = {"type": "object", "description": KEY, "properties": {KEY: {"type": "string"}}}
    request = ChatRequest(
        Generation(
            "m",
            "r",
            extras={"documents": [{"text": KEY}], "prediction": {"content": [{"text": KEY}]}, KEY: 1},
            output_format=OutputFormat("json_schema", schema, name=KEY),
            stop=(KEY,),
            user=KEY,
        ),
        (
            Message("user", "hi", name=KEY),
            Message("user", "", parts=(ImagePart(url=f"https://pictures/?key={KEY}"),)),
            Message("assistant", "", tool_calls=(ToolCall("c", KEY, "{}"),)),
        ),
        template_arguments={"k": KEY, "n": [KEY, 1, None]},
        tools=(Tool(KEY, KEY, schema),),
        tool_choice=ToolChoice("named", KEY),
    )
    clean = await around.sent(request)
    assert KEY not in repr(clean)
    assert clean.generation.extras == {
        "documents": [{"text": GONE}],
        "prediction": {"content": [{"text": GONE}]},
        GONE: 1,
    }
    assert clean.template_arguments == {"k": GONE, "n": [GONE, 1, None]}
    assert clean.tools == (Tool(GONE, GONE, clean.generation.output_format.schema),)
    suffix = CompletionRequest(Generation("m", "r", extras={"suffix": KEY}), "x")
    assert (await around.sent(suffix)).generation.extras == {"suffix": GONE}
    with pytest.raises(GuardRefused):
        await Around(secrets=SECRETS).sent(suffix)


async def test_two_names_that_become_one_lose_no_field() -> None:
    around = Around(secrets={**SECRETS, "action": "redact"})
    other = KEY[:-1] + "Q"
    clean = await around.sent(chat("hi", extras={"metadata": {KEY: "a", other: "b"}}))
    assert sorted(clean.generation.extras["metadata"].values()) == ["a", "b"]


async def test_a_judge_reads_documents() -> None:
    around = Around(judge={**JUDGE, "on": "input"})
    await around.sent(chat("hi", extras={"documents": [{"text": "a document"}]}))
    assert around.asked[0][2] == "a document\n\nhi"


async def test_what_is_nested_too_deeply_is_refused() -> None:
    value: Any = KEY
    for _ in range(5000):
        value = [value]
    with pytest.raises(GuardRefused, match="nested too deeply"):
        await Around(secrets=SECRETS).sent(chat("hi", extras={"x": value}))


async def turns_during(work: Awaitable[Any]) -> int:
    """How often another task had its turn while this one was not done."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turning = asyncio.create_task(turn())
    try:
        await work
    finally:
        turning.cancel()
    return turns


async def test_large_texts_do_not_stop_the_loop() -> None:
    around = Around(personal={"rule": "personal-data", "action": "redact"})
    large = "1 1 a@a. +1 1 AA00 AAAA " * 2000
    assert await turns_during(around.sent(chat(large))) > 3
    assert await turns_during(around.given(answer(large))) > 3


async def test_what_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finders, "READING_MAX_S", 0.0)
    for text in ("1", "1 " * 10_000):
        around = Around(personal={"rule": "personal-data"})
        with pytest.raises(GuardRefused, match="could not be read in time"):
            await around.sent(chat(text))
        with pytest.raises(GuardRefused, match="could not be read in time"):
            await around.given(answer(text))

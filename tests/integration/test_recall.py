"""Recall over HTTP: the same request, the same meaning, what must never be given, and what is around it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from tests.integration.gateway_harness import ADMIN, Gateway, Process, backends, bearer, gateway
from tests.mock_upstream import MockUpstream, Script

EXACT: dict[str, Any] = {"exact": True}
MEANING: dict[str, Any] = {"exact": True, "sampled": True, "semantic": {"mode": "on", "audit_share": 0}}


@asynccontextmanager
async def world(
    folder: Path, recall: dict[str, Any], **sections: Any
) -> AsyncGenerator[tuple[Gateway, MockUpstream]]:
    async with MockUpstream() as mock:
        sections.setdefault("backends", backends(a=mock))
        async with gateway(folder, recall=recall, **sections) as gw:
            yield gw, mock


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def posts(mock: MockUpstream) -> int:
    return sum(each.path.endswith("/chat/completions") for each in mock.requests)


async def test_the_same_request_is_answered_once(tmp_path: Path) -> None:
    async with world(tmp_path, EXACT) as (gw, mock):
        first = await gw.chat("hello", temperature=0)
        again = await gw.chat("hello", temperature=0)
        assert posts(mock) == 1
        assert first.headers["x-stockpot-recall"] == "miss"
        assert again.headers["x-stockpot-recall"] == "exact"
        assert int(again.headers["age"]) >= 0
        one, two = first.json(), again.json()
        assert one["choices"] == two["choices"]
        assert one["id"] != two["id"]
        usage = two["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
        assert two["stockpot"]["cost_usd"] == 0
        assert two["stockpot"]["recall"]["entry"] == one["stockpot"]["recall"]["entry"]
        await gw.record()
        record = await gw.record()
        assert record.cost.nanousd == 0
        assert record.prompt_tokens == 0
        assert record.recalled is not None
        assert record.recalled.outcome == "exact"
        assert record.recalled.saved_prompt_tokens == one["usage"]["prompt_tokens"]
        assert record.recalled.saved_nanousd > 0


@pytest.mark.parametrize("first_streams", [True, False])
async def test_an_answer_is_replayed_as_it_is_asked_for(tmp_path: Path, first_streams: bool) -> None:
    script = Script(
        text="Let me look. " + "word " * 20,
        reasoning="thinking of it",
        tool_calls=(("call_1", "get_weather", '{"city": "Paris"}'),),
    )
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    async with world(tmp_path, EXACT) as (gw, mock):
        mock.default = lambda _: script
        fields: dict[str, Any] = {
            "temperature": 0,
            "tools": tools,
            "stream_options": {"include_usage": True},
        }
        plain = {name: value for name, value in fields.items() if name != "stream_options"}
        if first_streams:
            made = await gw.stream("weather?", **fields)
        else:
            await gw.chat("weather?", **plain)
            made = await gw.stream("weather?", headers={"cache-control": "no-cache, no-store"}, **fields)
        before = posts(mock)
        replayed = await gw.stream("weather?", **fields)
        collected = await gw.chat("weather?", **plain)
        assert posts(mock) == before
        assert replayed.done
        if first_streams:
            assert _content(replayed.events) == _content(made.events)
        message = collected.json()["choices"][0]["message"]
        assert message["content"] == made.text
        assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
        assert collected.headers["x-stockpot-recall"] == "exact"


def _content(events: list[Any]) -> list[Any]:
    """What the events of a stream say, without what names this answer or counts."""
    return [event["choices"] for event in events if event.get("choices")]


async def test_answers_that_are_none_are_not_kept(tmp_path: Path) -> None:
    scripts = {
        "truncated": Script(text="cut of", finish_reason="length"),
        "filtered": Script(text="no", finish_reason="content_filter"),
        "broken": Script(text="one two three", fault="reset", fault_after=2),
        "refused": Script(status=400, body={"error": {"message": "no"}}),
    }
    async with world(tmp_path, EXACT, resilience={"retries": 0}) as (gw, mock):
        for name, script in scripts.items():
            mock.default = lambda _, script=script: script
            await gw.chat(name, temperature=0)
            before = posts(mock)
            await gw.chat(name, temperature=0)
            assert posts(mock) == before + 1, name


async def test_what_is_drawn_at_random_is_not_kept_unless_the_operator_says_so(tmp_path: Path) -> None:
    async with world(_folder(tmp_path, "a"), EXACT) as (gw, mock):
        for _ in range(2):
            answer = await gw.chat("hello")
            assert answer.headers["x-stockpot-recall"] == "bypass"
            assert answer.json()["stockpot"]["recall"]["reason"] == "sampled"
        await gw.chat("hello", seed=7, temperature=0.8)
        await gw.chat("hello", seed=7, temperature=0.8)
        assert posts(mock) == 3
    async with world(_folder(tmp_path, "b"), {"exact": True, "sampled": True}) as (gw, mock):
        await gw.chat("hello")
        await gw.chat("hello")
        assert posts(mock) == 1


async def test_a_request_may_be_stricter(tmp_path: Path) -> None:
    async with world(tmp_path, EXACT) as (gw, mock):
        absent = await gw.chat("a", temperature=0, headers={"cache-control": "only-if-cached"})
        assert absent.status_code == 504
        assert posts(mock) == 0
        await gw.chat("a", temperature=0, headers={"cache-control": "no-store"})
        await gw.chat("a", temperature=0)
        assert posts(mock) == 2
        fresh = await gw.chat("a", temperature=0, headers={"cache-control": "no-cache"})
        assert fresh.headers["x-stockpot-recall"] == "bypass"
        assert posts(mock) == 3
        found = await gw.chat("a", temperature=0, headers={"cache-control": "only-if-cached"})
        assert found.status_code == 200
        await asyncio.sleep(1.1)
        await gw.chat("a", temperature=0, headers={"cache-control": "max-age=1"})
        assert posts(mock) == 4


async def test_a_thousand_at_once_are_one_generation(tmp_path: Path) -> None:
    async with world(tmp_path, EXACT) as (gw, mock):
        mock.default = lambda _: Script(text="an answer of some words", token_delay_s=0.002)
        # In waves, so that some come while the answer is made, some when it is just over, some later.
        spread = random.Random(1)

        async def ask() -> str:
            await asyncio.sleep(spread.random() * 0.15)
            answer = await gw.chat("the same", temperature=0)
            return answer.json()["choices"][0]["message"]["content"]

        async with openai.AsyncOpenAI(base_url=f"{gw.url}/v1", api_key="unused"):
            answers = await asyncio.gather(*(ask() for _ in range(1_000)))
        assert set(answers) == {"an answer of some words"}
        assert posts(mock) == 1


async def test_tenants_never_share(tmp_path: Path) -> None:
    access = {
        "admin_key": "the-admin-key",
        "tenants": {"one": {"key": "key-of-one"}, "two": {"key": "key-of-two"}},
    }
    async with world(tmp_path, MEANING, access=access) as (gw, mock):
        for text in ("How do I reset my password?", "how do i reset my password"):
            for key in ("key-of-one", "key-of-two"):
                await gw.chat(text, headers=bearer(key))
        assert posts(mock) == 2


async def test_answers_outlive_the_process(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        sections: dict[str, Any] = {"backends": backends(a=mock), "recall": EXACT}
        for _ in range(2):
            async with Process(tmp_path, **sections) as process:
                async with openai.AsyncOpenAI(base_url=f"{process.url}/v1", api_key="unused") as client:
                    for _ in range(2):
                        await client.chat.completions.create(
                            model="m", messages=[{"role": "user", "content": "hello"}], temperature=0
                        )
                await asyncio.sleep(1.0)
                assert process.process is not None
                process.process.kill()
        assert posts(mock) == 1


async def test_the_anthropic_client_is_told_too(tmp_path: Path) -> None:
    async with world(tmp_path, EXACT) as (gw, mock):
        async with anthropic.AsyncAnthropic(base_url=gw.url, api_key="unused") as typed:
            client: Any = typed
            ask: Any = {
                "model": "m",
                "max_tokens": 50,
                "messages": [{"role": "user", "content": "hello there"}],
                "extra_body": {"temperature": 0},
            }
            first = await client.messages.create(**ask)
            again = await client.messages.create(**ask)
            async with client.messages.stream(**ask) as stream:
                last = await stream.get_final_message()
        assert posts(mock) == 1
        assert first.content == again.content
        assert [each.model_dump() for each in last.content] == [each.model_dump() for each in first.content]
        assert again.usage.cache_read_input_tokens


async def test_a_question_that_differs_in_form_alone_is_answered(tmp_path: Path) -> None:
    async with world(tmp_path, MEANING) as (gw, mock):
        await gw.serving.recall.rebuilt()  # type: ignore[union-attr]
        await gw.chat("How do I reset my password?")
        await _indexed(gw)
        again = await gw.chat("how do i reset my password ??")
        assert posts(mock) == 1
        assert again.headers["x-stockpot-recall"] == "semantic"
        assert float(again.headers["x-stockpot-recall-similarity"]) > 0.9
        exact = await gw.chat("hi, how do i reset my password", headers={"x-stockpot-recall": "exact"})
        assert exact.headers["x-stockpot-recall"] == "miss"
        trap = await gw.chat("How do I not reset my password?")
        assert trap.headers["x-stockpot-recall"] == "miss"


async def test_what_was_said_before_counts(tmp_path: Path) -> None:
    def after(product: str) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": f"I have a {product} subscription."},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "How is it cancelled?"},
        ]

    async with world(tmp_path, MEANING) as (gw, mock):
        await gw.chat(messages=after("Flixora"))
        await _indexed(gw)
        other = await gw.chat(messages=after("PulseFit"))
        assert other.headers["x-stockpot-recall"] == "miss"
        assert posts(mock) == 2


async def test_shadow_gives_nothing_and_learns(tmp_path: Path) -> None:
    recall = {"sampled": True, "semantic": {"mode": "shadow"}}
    async with world(tmp_path, recall) as (gw, mock):
        mock.default = lambda _: Script(text="Open the settings, then choose reset.")
        await gw.chat("How do I reset my password?")
        await _indexed(gw)
        second = await gw.chat("how do i reset my password")
        told = second.json()["stockpot"]["recall"]
        assert posts(mock) == 2
        assert told["outcome"] == "miss"
        assert told["would"]
        assert gw.serving.recall is not None
        assert gw.serving.recall.learner is not None
        await gw.serving.recall.learner.settled()
        assert gw.serving.recall.learner.counts.audited == 1


async def test_feedback_evicts_and_teaches(tmp_path: Path) -> None:
    async with world(tmp_path, MEANING) as (gw, _):
        await gw.chat("How do I reset my password?")
        await _indexed(gw)
        hit = await gw.chat("how do i reset my password")
        assert hit.headers["x-stockpot-recall"] == "semantic"
        told = await gw.client.post("/v1/feedback", json={"request_id": hit.json()["id"], "verdict": "wrong"})
        assert told.status_code == 200, told.text
        again = await gw.chat("how do i reset my password")
        assert again.headers["x-stockpot-recall"] == "miss"
        unknown = await gw.client.post("/v1/feedback", json={"entry": "0" * 32, "verdict": "wrong"})
        assert unknown.status_code == 404
        report = await gw.client.get("/admin/recall", headers=ADMIN)
        assert report.status_code == 200, report.text


async def test_invalidation_by_tag(tmp_path: Path) -> None:
    async with world(tmp_path, EXACT) as (gw, mock):
        tagged = {"x-stockpot-recall-tags": "handbook"}
        await gw.chat("one", temperature=0, headers=tagged)
        await gw.chat("two", temperature=0)
        done = await gw.client.post("/admin/recall/invalidate", json={"tag": "handbook"}, headers=ADMIN)
        assert done.status_code == 200, done.text
        await gw.chat("one", temperature=0, headers=tagged)
        await gw.chat("two", temperature=0)
        assert posts(mock) == 3


async def test_audits_make_given_answers_again(tmp_path: Path) -> None:
    recall = {"sampled": True, "semantic": {"mode": "on", "audit_share": 1.0}}
    async with world(tmp_path, recall) as (gw, mock):
        mock.default = lambda _: Script(text="Open the settings, then choose reset.")
        await gw.chat("How do I reset my password?")
        await _indexed(gw)
        hit = await gw.chat("how do i reset my password")
        assert hit.headers["x-stockpot-recall"] == "semantic"
        assert gw.serving.recall is not None
        assert gw.serving.recall.learner is not None
        await gw.serving.recall.learner.settled()
        assert gw.serving.recall.learner.counts.audited == 1
        assert posts(mock) == 2
        # The audit is in the ledger, and costs nobody's allowance.
        assert any(record.task == "recall-audit" for record in gw.records)


async def _indexed(gw: Gateway) -> None:
    """Until what was kept is found by meaning."""
    recall = gw.serving.recall
    assert recall is not None
    assert recall.semantic is not None
    async with asyncio.timeout(20):
        while not len(recall.semantic.index):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_flight_is_not_shared_where_answers_are_not(tmp_path: Path) -> None:
    recall = {"exact": True, "scope": "key"}
    async with world(tmp_path, recall) as (gw, mock):
        mock.default = lambda _: Script(text="an answer", first_delay_s=0.2)
        keys = [(await gw.create_key(name=name))["key"] for name in ("one", "two")]
        asked = [gw.chat("hello", temperature=0, headers=bearer(key)) for key in keys for _ in range(2)]
        answers = await asyncio.gather(*asked)
        assert all(answer.status_code == 200 for answer in answers)
        assert posts(mock) == 2


async def test_audits_are_on_nobodys_allowance(tmp_path: Path) -> None:
    recall = {"sampled": True, "semantic": {"mode": "on", "audit_share": 1.0}}
    async with world(tmp_path, recall) as (gw, _):
        key = (await gw.create_key(name="k", limits={"requests_per_minute": 2}))["key"]
        await gw.chat("How do I reset my password?", headers=bearer(key))
        await _indexed(gw)
        assert (await gw.chat("how do i reset my password", headers=bearer(key))).status_code == 200
        recall_here = gw.serving.recall
        assert recall_here is not None
        assert recall_here.learner is not None
        await recall_here.learner.settled()
        assert (recall_here.learner.counts.audited, recall_here.learner.counts.failed) == (1, 0)


async def test_only_a_kept_answer_is_none_where_nothing_is_kept(tmp_path: Path) -> None:
    async with world(tmp_path, {}) as (gw, mock):
        refused = await gw.chat("x", temperature=0, headers={"cache-control": "only-if-cached"})
        assert refused.status_code == 504
        assert refused.headers["x-should-retry"] == "false"
        assert not posts(mock)


async def test_feedback_about_an_answer_that_was_replaced_takes_nothing_out(tmp_path: Path) -> None:
    async with world(tmp_path, EXACT) as (gw, _):
        await gw.chat("one", temperature=0)
        given = (await gw.chat("one", temperature=0)).json()["id"]
        await asyncio.sleep(0.01)
        await gw.chat("one", temperature=0, headers={"cache-control": "no-cache"})
        told = await gw.client.post("/v1/feedback", json={"request_id": given, "verdict": "wrong"})
        assert told.status_code == 404
        assert (await gw.chat("one", temperature=0)).headers["x-stockpot-recall"] == "exact"

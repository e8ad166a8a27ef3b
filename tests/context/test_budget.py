"""Budgets hold, nothing is dropped silently, calls and results never part, compaction is rare and pays."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.context import (
    Budget,
    BudgetExceeded,
    Chunk,
    Context,
    Document,
    ExtractiveCompressor,
    LinguaCompressor,
    Summaries,
    by_server,
    decide_compaction,
    fit,
    open_counter,
    select_chunks,
)
from stockpot.context.budget import prompt_tokens
from stockpot.context.prompt import document_text
from stockpot.context.tokens import EstimatedTokens, TokenCounter
from stockpot.errors import ConfigurationError, ServerUnreachable


class Words:
    """A tokenizer that is easy to follow."""

    name = "words"
    exact = True

    def count(self, text: str) -> int:
        return len(text.split())


WORDS: TokenCounter = Words()
ROUNDS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2), st.integers(1, 40)), max_size=14)


def talked(rounds: list[tuple[int, int, int]], documents: tuple[Document, ...] = ()) -> Context:
    prompt = Context(system="Be kind and exact.", documents=documents)
    for number, (asked, calls, answered) in enumerate(rounds):
        prompt.user(f"q{number} " + "why " * asked)
        if calls:
            ids = [f"{number}-{each}" for each in range(calls)]
            prompt.assistant(
                tool_calls=[{"id": id, "name": "find", "arguments": {"n": number}} for id in ids]
            )
            for id in ids:
                prompt.tool_result(id, "found it " * 3)
        prompt.assistant(f"a{number} " + "so " * answered)
    return prompt


def pairs_hold(log: tuple[Any, ...]) -> bool:
    open_calls: set[str] = set()
    for message in log:
        if message.role == "tool":
            if message.tool_call_id not in open_calls:
                return False
            open_calls.discard(message.tool_call_id)
        elif open_calls:
            return False
        open_calls |= {call.id for call in message.tool_calls}
    return not open_calls


@given(ROUNDS, st.integers(40, 700), st.booleans(), st.booleans(), st.integers(0, 60))
def test_a_budget_is_never_exceeded_and_nothing_goes_silently(
    rounds: list[tuple[int, int, int]], tokens: int, summarised: bool, keep_first: bool, read: int
) -> None:
    context = talked(rounds, (Document("a", "word " * read), Document("b", "word " * read)))
    before = context.prompt
    budget = Budget(tokens, reserve_tokens=10, keep_first=keep_first)
    summaries = Summaries(None, WORDS) if summarised else None
    try:
        fitted = context.fit(budget, WORDS, summaries=summaries)
    except BudgetExceeded as error:
        assert context.prompt == before
        assert "what must be kept" in str(error)
        return
    assert fitted.prompt == context.prompt
    assert fitted.tokens == prompt_tokens(fitted.prompt, WORDS) <= budget.room
    assert fitted.prompt.system == before.system
    assert pairs_hold(fitted.prompt.log)
    gone = [message for message in before.log if message not in fitted.prompt.log]
    told = {each.kind for each in fitted.trimmed}
    assert ("turns" in told) == any(message.role == "assistant" for message in gone)
    assert [each.what for each in fitted.trimmed if each.kind == "document"] == [
        document.name for document in reversed(before.documents) if document not in fitted.prompt.documents
    ]
    if keep_first and rounds:
        assert fitted.prompt.log[0].content.endswith(before.log[0].content)


@given(ROUNDS, st.integers(100, 500))
def test_it_is_fitted_in_rare_big_steps_and_in_between_only_grows(
    rounds: list[tuple[int, int, int]], tokens: int
) -> None:
    context, budget = Context(system="Be kind."), Budget(tokens)
    before: list[Any] = []
    for number, (asked, _, answered) in enumerate(rounds):
        context.user(f"q{number} " + "why " * asked)
        try:
            fitted = context.fit(budget, WORDS)
        except BudgetExceeded:
            return
        now = context.openai("m")["messages"]
        if fitted.decision is None or not fitted.decision.compact:
            assert now[: len(before)] == before
        else:
            assert now[0] == before[0]  # the stable sections stay
            assert fitted.tokens <= budget.low * budget.room or len(context) <= 6
        before = now
        context.assistant("so " * answered)


def test_a_compaction_that_does_not_pay_is_not_made_until_it_must_be() -> None:
    many = [(20, 0, 20)] * 8
    context = talked(many)
    size = prompt_tokens(context.prompt, WORDS)
    budget = Budget(int(size / 0.95))
    held = context.fit(budget, WORDS, expected_turns=0.1)
    assert held.decision is not None
    assert not held.decision.compact
    assert not held.trimmed
    assert "not compacted" in str(held.decision)
    made = context.fit(budget, WORDS, expected_turns=50)
    assert made.decision is not None
    assert made.decision.compact
    assert made.trimmed[0].kind == "turns"
    assert "saves" in made.trimmed[0].why
    forced = talked(many).fit(Budget(size - 1), WORDS, expected_turns=0)
    assert forced.decision is not None
    assert forced.decision.forced
    assert "did not fit" in str(forced.decision)


def test_the_price_of_a_decision() -> None:
    decision = decide_compaction(
        tokens_before=10_000, tokens_after=3_000, stable_tokens=2_000, expected_turns=10
    )
    assert decision.saved == pytest.approx(7_000)  # 7,000 tokens fewer, at 0.1, ten times
    assert decision.burned == pytest.approx(1_150)  # 1,000 tokens written at 1.25 rather than read at 0.1
    assert decision.compact


def test_after_a_compaction_facts_and_state_are_told_anew() -> None:
    context = talked([(20, 0, 20)] * 6)
    context.fact("time", "10:00")
    context.state.set("step", 3)
    context.user("now")
    context.assistant("yes")
    context.fit(Budget(160), WORDS)
    context.user("and")
    assert "time: 10:00" in context.prompt.log[-1].content
    assert '<state>{"step":3}</state>' in context.prompt.log[-1].content


CHUNKS = st.lists(
    st.builds(
        Chunk,
        st.text("abcdef", min_size=1, max_size=2),
        st.integers(1, 12).map(lambda count: "w " * count),
        st.floats(-1, 10, allow_nan=False),
    ),
    max_size=9,
)


@given(CHUNKS, st.integers(0, 60))
def test_chunks_are_the_most_valuable_that_fit(chunks: list[Chunk], tokens: int) -> None:
    made = select_chunks(chunks, tokens, WORDS)
    again = select_chunks(list(reversed(chunks)), tokens, WORDS)
    assert made.included == again.included
    assert [chunk.id for chunk in made.included] == sorted(chunk.id for chunk in made.included)
    assert made.tokens == sum(WORDS.count(document_text(each)) for each in made.documents()) <= tokens
    assert {*made.included, *made.left_out} >= set(made.included)
    value = sum(chunk.value for chunk in made.included)
    unique = [*made.included, *made.left_out]
    best = 0.0
    for mask in range(2 ** len(unique)):
        chosen = [chunk for place, chunk in enumerate(unique) if mask >> place & 1]
        size = sum(WORDS.count(document_text(Document(chunk.id, chunk.text))) for chunk in chosen)
        if size <= tokens:
            best = max(best, sum(chunk.value for chunk in chosen))
    assert value == pytest.approx(best, abs=1e-6)


def test_many_chunks_are_chosen_quickly_and_nearly_as_well() -> None:
    chunks = [Chunk(f"{n:05}", "w " * (1 + n % 50), (n * 7919) % 101 / 10) for n in range(3_000)]
    made = select_chunks(chunks, 5_000, WORDS)
    assert 4_500 < made.tokens <= 5_000
    assert len(made.included) + len(made.left_out) == 3_000


@given(st.lists(st.text("abc .\n", max_size=40), max_size=12).map(". ".join), st.integers(0, 30))
def test_compression_keeps_its_bound_and_whole_sentences(text: str, tokens: int) -> None:
    made = ExtractiveCompressor().compress(text, tokens, WORDS)
    assert made == ExtractiveCompressor().compress(text, tokens, WORDS)
    assert WORDS.count(made) <= tokens or made == text
    assert all(word in text for word in made.split())


def test_a_text_about_something_is_shortened_to_it() -> None:
    text = (
        "The invoice of the bakery is overdue. It rained. The bakery asked twice about the invoice. My cat"
        " sleeps. Please pay the invoice of the bakery by Friday."
    )
    made = ExtractiveCompressor().compress(text, 9, WORDS)
    assert "invoice" in made
    assert "cat" not in made


def test_llmlingua_is_asked_as_it_wants_and_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class PromptCompressor:
        def __init__(self, **options: Any) -> None:
            asked.update(options)

        def compress_prompt(self, texts: list[str], **options: Any) -> dict[str, str]:
            asked.update(options)
            return {"compressed_prompt": " ".join(texts[0].split()[: options["target_token"]])}

    stub: Any = ModuleType("llmlingua")
    stub.PromptCompressor = PromptCompressor
    monkeypatch.setitem(__import__("sys").modules, "llmlingua", stub)
    assert LinguaCompressor().compress("one two three four", 2, WORDS) == "one two"
    assert asked["use_llmlingua2"] is True
    monkeypatch.setitem(__import__("sys").modules, "llmlingua", None)
    with pytest.raises(ConfigurationError, match="not installed"):
        LinguaCompressor()


def test_summaries_are_made_once_and_level_by_level() -> None:
    made: list[int] = []

    def summarise(text: str, tokens: int) -> str:
        made.append(WORDS.count(text))
        return " ".join(text.split()[:tokens])

    summaries = Summaries(summarise, WORDS)
    log = talked([(900, 0, 900)] * 6).prompt.log
    first = summaries.of(log, 100)
    assert WORDS.count(first) <= 100
    count = len(made)
    assert count > 2
    assert max(made) <= 4_000
    assert summaries.of(log, 100) == first
    assert len(made) == count
    grown = talked([(900, 0, 900)] * 7).prompt.log
    summaries.of(grown, 100)
    assert len(made) <= count + 3  # what is new, and the levels above it


@contextmanager
def answering(reply: Any, status: int = 200) -> Generator[tuple[str, list[Any]]]:
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            asked.append((self.path, json.loads(body)))
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_model_behind_a_server_summarises() -> None:
    with answering({"choices": [{"message": {"content": "short"}}]}) as (url, asked):
        assert by_server(url, "m")("a long text", 20) == "short"
        assert asked[0][0] == "/v1/chat/completions"
        assert asked[0][1]["messages"][1]["content"] == "a long text"
    with pytest.raises(ServerUnreachable, match="gave no summary"):
        by_server(url, "m")("a long text", 20)


def test_counters_of_all_kinds(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made: Any = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    counter = open_counter(str(tmp_path / "tokenizer.json"))
    assert counter.exact
    assert counter.count("a b c") == 3
    with answering({"data": [{"id": "m"}], "count": 7, "tokens": [1]}) as (url, asked):
        served = open_counter(url)
        assert served.count("hello") == served.count("hello") == 7
        assert [path for path, _ in asked] == ["/tokenize"]
    with pytest.raises(ServerUnreachable):
        open_counter(url).count("hello")
    with pytest.raises(ConfigurationError, match=r"no tokenizer.json"):
        (tmp_path / "wrong.json").write_text("{}")
        open_counter(str(tmp_path / "wrong.json"))
    estimate = open_counter("estimate")
    assert not estimate.exact
    assert (estimate.count(""), estimate.count("abcd" * 3), estimate.count("日本語")) == (0, 3, 3)
    assert isinstance(estimate, EstimatedTokens)


def test_the_packaged_model_counts_as_it_reads() -> None:
    counter = open_counter("smollm2-135m-instruct")
    assert counter.exact
    assert counter.count("Hello, world!") == 4
    assert counter.count("") == 0


def test_fit_is_a_pure_function() -> None:
    prompt = talked([(20, 1, 20)] * 6).prompt
    assert fit(prompt, Budget(150), WORDS) == fit(prompt, Budget(150), WORDS)

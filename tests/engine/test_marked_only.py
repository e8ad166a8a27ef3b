"""Without automatic caching, only what stands before a boundary is kept and found; answers are the same."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_core import Harness, alone, random_tokens

from stockpot.engine.core import EngineLimits
from stockpot.engine.fake_driver import FakeDriver
from stockpot.engine.sequence import Task
from stockpot.kv.promises import Promise

LIMITS = EngineLimits(block_tokens=8, ram_bytes=20_000, cache_automatic=False)


class MarkedHarness(Harness):
    """Submits prompts with a boundary behind `marked` tokens."""

    def ask(self, name: str, prompt: list[int], marked: int, max_tokens: int = 3) -> Task:
        submit = self.core.submit
        promises = (Promise(marked, 300, frozenset()),) if marked else ()

        def with_promise(task: Task) -> None:
            task.labels = replace(task.labels, promises=promises)
            submit(task)

        self.core.submit = with_promise
        try:
            return self.submit(name, prompt, max_tokens)
        finally:
            self.core.submit = submit

    def cached(self, name: str) -> int:
        return sum(self.started(name).cached_tokens.values())


def test_nothing_is_found_without_a_boundary_and_all_before_one() -> None:
    harness = MarkedHarness(FakeDriver(cells=1024), LIMITS)
    prompt = random_tokens(1, 60)
    for name in ("first", "second"):
        harness.ask(name, prompt, 0)
        harness.run()
        assert harness.cached(name) == 0
    for name, found in (("writes", 0), ("reads", 37)):
        harness.ask(name, prompt, 37)
        harness.run()
        assert harness.cached(name) == found
    harness.ask("reads less", prompt, 20)
    harness.run()
    assert harness.cached("reads less") == 20
    store = harness.core.cache
    assert store is not None
    explained = store.explanations.find("reads")
    assert explained is not None
    assert [(gap.start, gap.end, gap.cause) for gap in explained.gaps] == [(37, 59, "not marked")]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 40), st.integers(1, 6)),
        min_size=1,
        max_size=8,
    ),
    st.integers(64, 300),
)
def test_answers_are_those_of_a_lone_request(asked: list[tuple[int, int, int, int]], cells: int) -> None:
    harness = MarkedHarness(FakeDriver(cells=cells), LIMITS)
    names: list[tuple[str, list[int], int, int]] = []
    for number, (seed, length, marked, tokens) in enumerate(asked):
        prompt = random_tokens(seed, length)
        names.append((f"r{number}", prompt, min(marked, length), tokens))
        harness.ask(f"r{number}", prompt, min(marked, length), tokens)
        harness.core.step()
    harness.run()
    for name, prompt, marked, tokens in names:
        assert harness.answer(name) == alone(prompt, tokens)
        assert harness.cached(name) <= marked
    harness.core.check_integrity()

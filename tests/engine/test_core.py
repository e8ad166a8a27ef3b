"""The engine core on the deterministic fake: whatever the schedule, every answer is what a lone request
without any cache would get; nothing leaks, nothing starves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.clock import VirtualClock
from stockpot.engine.core import EngineCore, EngineLimits
from stockpot.engine.fake_driver import FakeDriver
from stockpot.engine.sampling import Sampler
from stockpot.engine.sequence import Sequence, Task
from stockpot.engine.text_stream import TextStream
from stockpot.events import Completed, Delta, Event, Finished, Progress, Queued, Started
from stockpot.requests import Sampling

CELLS = 256
GREEDY = Sampling(temperature=0)


@dataclass
class Harness:
    """A core with its events collected by request."""

    driver: FakeDriver
    limits: EngineLimits = field(default_factory=lambda: EngineLimits(block_tokens=8, ram_bytes=20_000))
    events: dict[str, list[Event]] = field(default_factory=dict[str, list[Event]])
    clock: VirtualClock = field(default_factory=VirtualClock)

    def __post_init__(self) -> None:
        self.core = EngineCore(self.driver, self.limits, sink=self.take, observers=(), clock=self.clock)

    def take(self, events: list[tuple[Task, Event]]) -> None:
        for task, event in events:
            self.events.setdefault(task.request_id, []).append(event)

    def submit(
        self, name: str, prompt: list[int], max_tokens: int, *, choices: int = 1, banned: tuple[int, ...] = ()
    ) -> Task:
        task = Task(name, np.array(prompt, np.int32), self.clock.monotonic(), None)
        for choice in range(choices):
            sampler = Sampler(
                GREEDY, vocabulary=self.driver.vocabulary, prompt=task.prompt, seed=0, banned=banned
            )
            text = TextStream(self.driver.vocabulary, ())
            task.sequences.append(Sequence(task, choice, max_tokens=max_tokens, sampler=sampler, text=text))
        self.core.submit(task)
        return task

    def run(self, most_steps: int = 10_000) -> None:
        for _ in range(most_steps):
            if not self.core.step():
                break
        assert not self.core.tasks, "requests starve"

    def answer(self, name: str, choice: int = 0) -> list[int]:
        return [
            token
            for event in self.events[name]
            if isinstance(event, Delta) and event.choice == choice
            for token in event.token_ids
        ]

    def started(self, name: str) -> Started:
        return next(event for event in self.events[name] if isinstance(event, Started))


def random_tokens(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(33, 126, count)]


def alone(prompt: list[int], max_tokens: int, banned: tuple[int, ...] = ()) -> list[int]:
    """The answer of a lone request on a fresh driver without any cache."""
    harness = Harness(FakeDriver(cells=4096), EngineLimits(cache_enabled=False))
    harness.submit("alone", prompt, max_tokens, banned=banned)
    harness.run()
    return harness.answer("alone")


def test_a_second_turn_computes_only_what_is_new() -> None:
    harness = Harness(FakeDriver(cells=CELLS))
    first = list(b"a system prompt that is long enough for several blocks")
    harness.submit("one", first, 5)
    harness.run()
    answer = harness.answer("one")
    before = harness.driver.decoded_tokens
    second = first + answer + list(b"next")
    harness.submit("two", second, 3)
    harness.run()
    # All but the answer's last token (never decoded) and the new message come from RAM.
    assert harness.started("two").cached_tokens == {"ram": len(first) + len(answer) - 1}
    assert harness.driver.decoded_tokens - before == 1 + 4 + 2
    assert harness.answer("two") == alone(second, 3)


def test_a_prompt_that_departs_within_a_block_reuses_it_to_the_token() -> None:
    harness = Harness(FakeDriver(cells=CELLS))
    harness.submit("one", list(b"0123456789abcdefghij"), 2)
    harness.run()
    harness.submit("two", list(b"0123456789abXYZ"), 2)
    harness.run()
    assert harness.started("two").cached_tokens == {"ram": 12}
    assert harness.answer("two") == alone(list(b"0123456789abXYZ"), 2)


def test_cold_requests_with_one_prefix_prefill_it_once() -> None:
    harness = Harness(FakeDriver(cells=2048, max_batch_tokens=64))
    shared = random_tokens(1, 300)
    for user in range(8):
        harness.submit(f"user {user}", shared + list(f"I am {user}".encode()), 4)
    harness.run()
    own_tokens = 8 * (6 + 3)  # each user's own message, and three decodes of four tokens
    assert harness.driver.decoded_tokens <= 300 + own_tokens + 8
    for user in range(8):
        assert harness.answer(f"user {user}") == alone(shared + list(f"I am {user}".encode()), 4)


def test_choices_share_the_prompt() -> None:
    harness = Harness(FakeDriver(cells=CELLS))
    harness.submit("n", list(range(40, 90)), 4, choices=3)
    harness.run()
    assert harness.driver.decoded_tokens == 50 + 2 + 3 * 3  # followers compute the last prompt token anew
    assert harness.answer("n", 0) == harness.answer("n", 1) == harness.answer("n", 2)
    assert sum(isinstance(event, Completed) for event in harness.events["n"]) == 1


def test_a_cancelled_request_is_out_at_once_and_its_prefix_stays() -> None:
    harness = Harness(FakeDriver(cells=CELLS))
    task = harness.submit("gone", list(range(40, 100)), 50)
    harness.core.step()
    harness.core.end(task, "cancelled")
    assert harness.core.stats().running == 0
    assert harness.driver.used_cells() == 0
    harness.submit("next", list(range(40, 100)), 1)
    harness.run()
    assert harness.started("next").cached_tokens == {"ram": 59}


def test_a_deadline_ends_waiting_and_running_requests() -> None:
    harness = Harness(FakeDriver(cells=CELLS, max_sequences=1))
    tasks = [harness.submit(f"{i}", list(range(40 + i, 60)), 50) for i in range(2)]
    for task in tasks:
        task.deadline_s = 1.0
    harness.core.step()
    harness.clock.advance(2)
    harness.core.expire()
    harness.core.flush()
    assert not harness.core.tasks
    for i in range(2):
        assert [e.reason for e in harness.events[f"{i}"] if isinstance(e, Finished)] == ["deadline"]


def test_pressure_preempts_and_resumes_with_the_same_answer() -> None:
    driver = FakeDriver(cells=400, max_sequences=8, max_batch_tokens=64)
    harness = Harness(driver, EngineLimits(block_tokens=8, ram_bytes=2**20))
    prompts = [[40 + i] * 24 + list(range(50, 60)) for i in range(6)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"{i}", prompt, 200, banned=(256, 258))
    harness.run()
    assert harness.core.stats().preemptions > 0
    # What preemption saved came back from RAM: no prompt token and hardly an answer token is computed twice.
    assert driver.decoded_tokens <= 6 * (34 + 200) + harness.core.stats().preemptions
    for i, prompt in enumerate(prompts):
        assert harness.answer(f"{i}") == alone(prompt, 200, (256, 258))


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    harness = Harness(
        FakeDriver(cells=4096, max_batch_tokens=32), replace(EngineLimits(), prefill_tokens_beside_decode=16)
    )
    harness.submit("long", random_tokens(2, 400), 1)
    steps = 0
    while not any(isinstance(event, Completed) for event in harness.events.get("long", [])):
        harness.submit(f"short {steps}", [60 + steps % 60, *range(33, 60)], 4)
        harness.core.step()
        steps += 1
        assert steps <= 60, "the long prompt starves"


PROMPTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which shared beginning
        st.integers(1, 70),  # how much of it
        st.lists(st.integers(33, 126), max_size=12),  # own tokens behind it
        st.integers(1, 40),  # max_tokens
        st.integers(0, 6),  # steps before the next arrives
        st.booleans(),  # cancelled right after
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=120)
@given(
    requests=PROMPTS,
    cells=st.sampled_from([160, 256, 1024]),
    slots=st.sampled_from([1, 2, 5, 16]),
    batch=st.sampled_from([16, 33, 128]),
    ram=st.sampled_from([0, 700, 5_000, 2**20]),
    one_run=st.booleans(),
)
def test_any_schedule_gives_the_answers_of_lone_requests(  # noqa: PLR0917  hypothesis passes all by name
    requests: list[tuple[int, int, list[int], int, int, bool]],
    cells: int,
    slots: int,
    batch: int,
    ram: int,
    one_run: bool,
) -> None:
    driver = FakeDriver(cells=cells, max_sequences=slots, max_batch_tokens=batch, one_run=one_run)
    harness = Harness(driver, EngineLimits(block_tokens=8, ram_bytes=ram, prefill_tokens_beside_decode=12))
    beginnings = [random_tokens(n, 70) for n in range(4)]
    kept: dict[str, tuple[list[int], int]] = {}
    for index, (which, length, own, max_tokens, steps, cancelled) in enumerate(requests):
        prompt = beginnings[which][:length] + own
        task = harness.submit(f"{index}", prompt, max_tokens)
        for _ in range(steps):
            harness.core.step()
        if cancelled:
            harness.core.end(task, "cancelled")
        else:
            kept[f"{index}"] = (prompt, max_tokens)
        harness.core.check_integrity()
    harness.run()
    harness.core.check_integrity()
    assert driver.used_cells() == 0
    stats = harness.core.stats()
    assert (stats.running, stats.waiting, stats.ram_pinned_blocks) == (0, 0, 0)
    for name, (prompt, max_tokens) in kept.items():
        assert harness.answer(name) == alone(prompt, max_tokens)
        completed = harness.events[name][-1]
        assert isinstance(completed, Completed)
        assert completed.usage.cached_total <= len(prompt) - 1


def test_those_who_wait_are_told_how_far_they_are() -> None:
    harness = Harness(
        FakeDriver(cells=CELLS, max_sequences=1, max_batch_tokens=16), EngineLimits(cache_enabled=False)
    )
    harness.submit("first", random_tokens(1, 50), 4)
    harness.submit("second", random_tokens(2, 40), 4)
    harness.run()
    progress = [event for event in harness.events["first"] if isinstance(event, Progress)]
    assert progress == [Progress(16, 50), Progress(32, 50), Progress(48, 50)]
    kinds = [type(event) for event in harness.events["second"]]
    assert harness.events["second"][0] == Queued(0), "the first has left, nobody stands before it"
    assert kinds.index(Queued) < kinds.index(Started) < kinds.index(Progress) < kinds.index(Delta)

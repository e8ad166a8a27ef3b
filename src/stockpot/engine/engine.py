"""The engine: the driver's thread runs `EngineCore` while there is something to do.

Other threads put commands into a queue and are sent events through the sink. The thread never waits for
network or disk.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from stockpot.clock import Clock, SystemClock
from stockpot.engine.constraint import Constraint
from stockpot.engine.core import EngineCore, EngineLimits, Sink
from stockpot.engine.driver import Driver
from stockpot.engine.driver_thread import DriverThread
from stockpot.engine.reports import EngineStats, Observer
from stockpot.engine.sampling import Sampler
from stockpot.engine.sequence import Sequence, Task
from stockpot.engine.text_stream import TextStream
from stockpot.errors import (
    ContextLengthExceeded,
    EngineFailed,
    QueueFull,
    RequestError,
    ShuttingDown,
    StockpotError,
)
from stockpot.events import Completed, Event, Queued
from stockpot.kv.cache import KVCache
from stockpot.kv.promises import Labels
from stockpot.requests import Generation

_log = logging.getLogger(__name__)

HEADROOM_CELLS = 128
"""Cells no single request may claim: the driver needs a free run for a batch beside a full sequence."""

MOST_ERRANDS = 64

Result = TypeVar("Result")
State = Literal["new", "running", "draining", "stopping", "stopped", "failed"]


class Engine:
    """Runs requests on a driver. All methods may be called from any thread.

    `thread` is the one the driver was opened on (see `DriverThread`); None starts one. `cache` as in
    `EngineCore`; whoever gives one closes it after the engine has stopped.
    """

    def __init__(
        self,
        driver: Driver,
        limits: EngineLimits,
        *,
        sink: Sink,
        observers: Iterable[Observer] = (),
        clock: Clock | None = None,
        thread: DriverThread | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self._driver = driver
        self._limits = limits
        self._sink = sink
        self._observers = tuple(observers)
        self._clock = clock or SystemClock()
        self._core = EngineCore(
            driver, limits, sink=self._deliver, observers=self._observers, clock=self._clock, cache=cache
        )
        self._wake = threading.Condition()
        self._commands: deque[tuple[Literal["submit", "cancel"], Task]] = deque()
        self._errands: deque[Callable[[], None]] = deque()
        self._nudged = False
        if self._core.cache is not None:
            self._core.cache.on_ready(self._nudge)
        self._open_tasks = 0  # submitted and not completed: bounds queue and commands alike
        self._state: State = "new"
        self._failure: str | None = None
        self._thread = thread or DriverThread()
        self._ended: Future[None] | None = None
        self._stalled = False  # the last step found nothing to do

    def start(self) -> None:
        """Start the thread."""
        with self._wake:
            self._state = "running"
        self._ended = self._thread.submit(self._run)

    @property
    def max_request_tokens(self) -> int:
        """Prompt and answer together may be this long."""
        return min(self._driver.facts.training_context_tokens, self._driver.cells - HEADROOM_CELLS)

    @property
    def state(self) -> State:
        return self._state

    @property
    def failure(self) -> str | None:
        """Why the engine stopped, where it did so by itself."""
        return self._failure

    def submit(
        self,
        prompt: NDArray[np.int32],
        wanted: Generation,
        constraint: Constraint | None,
        labels: Labels | None = None,
    ) -> Task:
        """Queue a request; its events go to the sink, `Queued` first. `labels` say who may reuse its KV.

        Raises ContextLengthExceeded, QueueFull, ShuttingDown, EngineFailed.
        """
        task = self._task(prompt, wanted, constraint)
        task.labels = labels or Labels(tenant=wanted.tenant, request=wanted.request_id)
        task.client_request = wanted.client_request_id
        with self._wake:
            self._check_open()
            self._sink([(task, Queued(self._open_tasks))])
            self._open_tasks += 1
            self._commands.append(("submit", task))
            self._wake.notify()
        return task

    def cancel(self, task: Task) -> None:
        """End a request; its place is free within one step. Harmless for one that is over."""
        with self._wake:
            if self._state in ("running", "draining", "stopping"):
                self._commands.append(("cancel", task))
                self._wake.notify()

    def ask(self, errand: Callable[[EngineCore], Result]) -> Future[Result]:
        """Run `errand` on the engine's thread between two steps; it must be quick. Raises QueueFull where
        too many wait, EngineFailed and ShuttingDown where it would never run."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(errand(self._core))
            except Exception as error:  # noqa: BLE001  handed to whoever waits for the result
                future.set_exception(error)

        with self._wake:
            self._check_running()
            if len(self._errands) >= MOST_ERRANDS:
                raise QueueFull(
                    f"{len(self._errands)} administrative requests wait already; try again later.",
                    retry_after_s=1,
                )
            self._errands.append(run)
            self._wake.notify()
        return future

    def stop(self, *, drain: bool, timeout_s: float | None = None) -> None:
        """Refuse new requests; let running ones finish (`drain`, for `timeout_s` at most) or cancel them;
        end the thread. Blocks until it has ended."""
        with self._wake:
            if self._state == "new":
                self._state = "stopped"
            if self._state in ("stopped", "failed"):
                return
            self._state = "draining" if drain and self._state != "stopping" else "stopping"
            self._wake.notify()
        if self._ended is None:
            return
        try:
            self._ended.result(timeout_s)
        except TimeoutError:
            with self._wake:
                self._state = "stopping"
            self._ended.result()

    def stats(self) -> EngineStats:
        """A snapshot; counts may be a step apart from each other."""
        return self._core.stats()

    def _run(self) -> None:
        try:
            while self._round():
                pass
        except Exception as error:  # noqa: BLE001  last line of defence: clients must hear, not wait for ever
            _log.exception("the engine failed")
            # Only our own errors are worded for clients; of others the log tells.
            self._fail(
                str(error)
                if isinstance(error, StockpotError)
                else "an internal error; the server's log has it."
            )

    def _round(self) -> bool:
        """Obey commands, then one step; False when the thread is to end."""
        with self._wake:
            while not self._has_work():
                if self._limits.check_integrity and not self._core.tasks:
                    self._core.check_integrity()
                # With tasks, all wait for tiers behind RAM: until one is ready, or patience ends.
                self._wake.wait(self._core.patience_s())
                if self._core.tasks:
                    break
            self._nudged = False
            commands, self._commands = self._commands, deque()
            errands, self._errands = self._errands, deque()
            state = self._state
        for kind, task in commands:
            if kind == "submit":
                self._core.submit(task)
            else:
                self._core.end(task, "cancelled")
        for errand in errands:
            errand()
        if state == "stopping":
            for task in self._core.tasks:
                self._core.end(task, "cancelled")
        self._core.expire()
        self._stalled = not self._core.step()
        if state != "running" and not self._core.tasks:
            with self._wake:
                if not self._commands:
                    self._state = "stopped"
                    for errand in self._errands:
                        errand()
                    self._errands.clear()
                    return False
        return True

    def _has_work(self) -> bool:
        """Whether a step may do something now. Under the lock."""
        if self._commands or self._errands or self._nudged or self._state != "running":
            return True
        return bool(self._core.tasks) and not self._stalled

    def _nudge(self) -> None:
        """Something a request waits for has come."""
        with self._wake:
            self._nudged = True
            self._wake.notify()

    def _fail(self, reason: str) -> None:
        """The driver cannot be used any more: every request ends with an error, new ones are refused."""
        with self._wake:
            self._failure = reason
            self._state = "failed"
            commands, self._commands = self._commands, deque()
            errands, self._errands = self._errands, deque()
        for kind, task in commands:
            if kind == "submit":
                self._core.submit(task)
        for errand in errands:
            errand()
        self._core.abandon(f"The engine failed: {reason} Restart the server.")

    def _deliver(self, events: list[tuple[Task, Event]]) -> None:
        completed = sum(isinstance(event, Completed) for _, event in events)
        if completed:
            with self._wake:
                self._open_tasks -= completed
        self._sink(events)

    def _check_running(self) -> None:
        if self._state == "failed":
            raise EngineFailed(f"The engine has stopped: {self._failure} Restart the server.")
        if self._state != "running":
            raise ShuttingDown("The server is stopping and takes no new requests.", retry_after_s=5)

    def _check_open(self) -> None:
        self._check_running()
        if self._open_tasks >= self._limits.queue_limit + self._driver.max_sequences:
            raise QueueFull(
                f"{self._open_tasks} requests are running or waiting, the most this server takes. "
                "Try again later, or serve with a larger engine.queue_limit.",
                retry_after_s=1,
            )

    def _task(self, prompt: NDArray[np.int32], wanted: Generation, constraint: Constraint | None) -> Task:
        limit = self.max_request_tokens
        if len(prompt) >= limit:
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens and the context holds {limit}, answer included. "
                "Shorten the messages, or serve with a larger --context-tokens where the model allows it.",
                param="messages",
            )
        if not len(prompt):
            raise RequestError("The prompt has no tokens: send at least one.", param="prompt")
        now_s = self._clock.monotonic()
        deadline_s = now_s + wanted.deadline_s if wanted.deadline_s is not None else None
        task = Task(wanted.request_id, prompt, now_s, deadline_s)
        room = limit - len(prompt)
        max_tokens = room if wanted.max_tokens is None else min(wanted.max_tokens, room)
        seed = wanted.sampling.seed if wanted.sampling.seed is not None else secrets.randbits(62)
        for choice in range(wanted.choices):
            sampler = Sampler(
                wanted.sampling,
                vocabulary=self._driver.vocabulary,
                prompt=prompt,
                seed=seed,
                choice=choice,
                constraint=constraint.fresh() if constraint is not None else None,
                logprobs=wanted.logprobs,
                banned=self._end_tokens if wanted.ignore_eos else (),
            )
            text = TextStream(self._driver.vocabulary, wanted.stop)
            task.sequences.append(Sequence(task, choice, max_tokens=max_tokens, sampler=sampler, text=text))
        return task

    @cached_property
    def _end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer; only benchmarks ask for them (`ignore_eos`)."""
        vocabulary = self._driver.vocabulary
        return tuple(token for token in range(vocabulary.size) if vocabulary.ends_generation(token))

"""The engine: the driver's thread runs `EngineCore` while there is something to do.

Other threads put commands into a queue and are sent events through the sink. The thread never waits for
network or disk.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from functools import cached_property
from typing import Literal

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
from stockpot.requests import Generation

_log = logging.getLogger(__name__)

HEADROOM_CELLS = 128
"""Cells no single request may claim: the driver needs a free run for a batch beside a full sequence."""

State = Literal["new", "running", "draining", "stopping", "stopped", "failed"]


class Engine:
    """Runs requests on a driver. All methods may be called from any thread.

    `thread` is the one the driver was opened on (see `DriverThread`); None starts one.
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
    ) -> None:
        self._driver = driver
        self._limits = limits
        self._sink = sink
        self._observers = tuple(observers)
        self._clock = clock or SystemClock()
        self._core = EngineCore(
            driver, limits, sink=self._deliver, observers=self._observers, clock=self._clock
        )
        self._wake = threading.Condition()
        self._commands: deque[tuple[Literal["submit", "cancel", "clear"], Task | None]] = deque()
        self._open_tasks = 0  # submitted and not completed: bounds queue and commands alike
        self._state: State = "new"
        self._failure: str | None = None
        self._thread = thread or DriverThread()
        self._ended: Future[None] | None = None

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

    def submit(self, prompt: NDArray[np.int32], wanted: Generation, constraint: Constraint | None) -> Task:
        """Queue a request; its events go to the sink, `Queued` first.

        Raises ContextLengthExceeded, QueueFull, ShuttingDown, EngineFailed.
        """
        task = self._task(prompt, wanted, constraint)
        with self._wake:
            self._check_open()
            self._sink([(task, Queued(self._open_tasks))])
            self._open_tasks += 1
            self._commands.append(("submit", task))
            self._wake.notify()
        return task

    def cancel(self, task: Task) -> None:
        """End a request; its place is free within one step. Harmless for one that is over."""
        self._command("cancel", task)

    def clear_cache(self) -> None:
        """Drop every block of the store that no request stands on, before the next step."""
        self._command("clear", None)

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
            while not self._commands and not self._core.tasks and self._state == "running":
                if self._limits.check_integrity:
                    self._core.check_integrity()
                self._wake.wait()
            commands, self._commands = self._commands, deque()
            state = self._state
        for kind, task in commands:
            if task is None:
                self._core.clear_cache()
            elif kind == "submit":
                self._core.submit(task)
            else:
                self._core.end(task, "cancelled")
        if state == "stopping":
            for task in self._core.tasks:
                self._core.end(task, "cancelled")
        self._core.expire()
        self._core.step()
        if state != "running" and not self._core.tasks:
            with self._wake:
                if not self._commands:
                    self._state = "stopped"
                    return False
        return True

    def _fail(self, reason: str) -> None:
        """The driver cannot be used any more: every request ends with an error, new ones are refused."""
        with self._wake:
            self._failure = reason
            self._state = "failed"
            commands, self._commands = self._commands, deque()
        for kind, task in commands:
            if kind == "submit" and task is not None:
                self._core.submit(task)
        self._core.abandon(f"The engine failed: {reason} Restart the server.")

    def _deliver(self, events: list[tuple[Task, Event]]) -> None:
        completed = sum(isinstance(event, Completed) for _, event in events)
        if completed:
            with self._wake:
                self._open_tasks -= completed
        self._sink(events)

    def _command(self, kind: Literal["cancel", "clear"], task: Task | None) -> None:
        with self._wake:
            if self._state in ("running", "draining", "stopping"):
                self._commands.append((kind, task))
                self._wake.notify()

    def _check_open(self) -> None:
        if self._state == "failed":
            raise EngineFailed(f"The engine has stopped: {self._failure} Restart the server.")
        if self._state != "running":
            raise ShuttingDown("The server is stopping and takes no new requests.", retry_after_s=5)
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

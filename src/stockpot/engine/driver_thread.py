"""The thread a driver lives on, from the first library call to the last."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class DriverThread:
    """Runs what it is given, one after the other, on one daemon thread.

    A driver must be opened and used on the same thread. OpenMP keeps a team of workers for every thread
    that ever computed, and once the teams together have more threads than there are processors, workers no
    longer spin at barriers but sleep: a decode step of the default model took 24 ms instead of 7 when the
    model had been opened elsewhere (2 processors, GCC's libgomp).
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stockpot-engine", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """Run `function` after everything submitted before it."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  handed to whoever waits for the result
                future.set_exception(error)

        self._work.put(run)
        return future

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run `function` there and wait for its result."""
        return self.submit(lambda: function(*arguments)).result()

    def close(self) -> None:
        """End the thread after what was submitted; does not wait."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

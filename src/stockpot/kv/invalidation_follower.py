"""Follows a log of invalidations: what any node or process invalidates takes effect here within a second."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence

from stockpot.clock import Clock, SystemClock
from stockpot.kv.invalidation import Invalidation, InvalidationLog, Invalidations, Kind, LogUnavailable

MAX_BACKOFF_S = 5.0
_CLOSE_S = 5.0

_log = logging.getLogger(__name__)


class Follower:
    """A thread that brings records from the log into the view, and tells the store of them.

    `on_records` is told of new records and `on_gap` of lost ones, on the thread, after the view knows: both
    are to drop what `view.stale` now says. They only free room early; that nothing stale is served is the
    view's part. The log is asked every `poll_s` and whenever it says that there is something new. A shared
    log that fails is asked again after a growing, jittered time; its local part goes on being read.
    """

    def __init__(
        self,
        log: InvalidationLog,
        view: Invalidations,
        *,
        on_records: Callable[[Sequence[Invalidation]], None],
        on_gap: Callable[[], None],
        clock: Clock | None = None,
        poll_s: float = 1.0,
    ) -> None:
        self._source = log
        self._view = view
        self._on_records = on_records
        self._on_gap = on_gap
        self._clock = clock or SystemClock()
        self._poll_s = poll_s
        self._wake = threading.Event()
        self._caught_up = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        # Held from asking the log to telling the view, so that a pending record never reaches the view behind
        # the shared one that was made of it.
        self._order = threading.Lock()
        self._position = 0
        self._failures = 0
        self._ask_at_s = self._clock.monotonic()
        self._synced_at_s = self._clock.monotonic()

    @property
    def connected(self) -> bool:
        """Whether the log was reached the last time it was asked."""
        return self._caught_up.is_set() and self._failures == 0

    @property
    def lag_s(self) -> float:
        """Seconds since this node last knew all that every other had invalidated."""
        return max(0.0, self._clock.monotonic() - self._synced_at_s)

    def start(self) -> None:
        """Take in what the machine's own log knows, then start the thread. Idempotent."""
        if self._thread is None and not self._closing:
            self._take_news()
            self._thread = threading.Thread(target=self._run, name="stockpot-invalidation", daemon=True)
            self._thread.start()

    def wait_caught_up(self, timeout_s: float) -> bool:
        """Wait until all was read that happened while this node was away; False when time is up. Until then
        blocks that lasted (disk) may have been invalidated by another node."""
        return self._caught_up.wait(timeout_s)

    def append(
        self,
        kind: Kind,
        value: str = "",
        *,
        tokens: int = 0,
        tenant: str | None = None,
        by: str = "",
        reason: str = "",
    ) -> Invalidation:
        """Invalidate: in force here when this returns, on all nodes within a second; or, where the record
        comes back `pending`, as soon as the shared log can be reached. Takes a second at most when it cannot.
        Raises ValueError for fields that do not fit together."""
        with self._order:
            record = self._source.append(kind, value, tokens=tokens, tenant=tenant, by=by, reason=reason)
            self._view.add(record)
        self._wake.set()
        return record

    def close(self) -> None:
        """End the thread. Idempotent; the log stays open."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                self._sync()
                records, lost = self._take_news()
                if lost:
                    self._on_gap()
                if records:
                    self._on_records(records)
            except Exception:  # noqa: BLE001  without this thread no invalidation would arrive any more
                _log.exception("Following the invalidations failed; going on with the next")
            if not self._closing:
                self._source.wait(self._wake, self._poll_s)

    def _sync(self) -> None:
        if self._clock.monotonic() < self._ask_at_s:
            return
        asked_at_s = self._clock.monotonic()
        try:
            self._source.sync()
        except LogUnavailable as error:
            if not self._failures:
                _log.warning("%s Invalidations of other nodes arrive when it is back.", error)
            self._failures += 1
            backoff_s = min(MAX_BACKOFF_S, self._poll_s * 2 ** min(self._failures - 1, 10))
            self._ask_at_s = asked_at_s + backoff_s * random.uniform(0.5, 1.0)
            return
        if self._failures:
            _log.info("Invalidations are shared with other nodes again.")
        self._failures = 0
        self._synced_at_s = asked_at_s

    def _take_news(self) -> tuple[list[Invalidation], bool]:
        with self._order:
            news = self._source.since(self._position)
            self._position = news.position
            lost = self._view.forget(news.forgotten_before)
            for record in news.records:
                self._view.add(record)
        if not self._failures and self._thread is not None:
            self._caught_up.set()
        return list(news.records), lost

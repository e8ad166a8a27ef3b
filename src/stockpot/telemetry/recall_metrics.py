"""Prometheus metrics of recall: what the caches of answers gave, why not, what it saved; `stockpot_recall_*`.

What happens is tallied from the record of each request, on the event loop. Where several requests shared one
answer, one of them looked for a kept one: only that one counts, and what it saved is saved once. What is, is
read when somebody scrapes. Labels are words of the program and names of models that answered, and are bounded
even so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric

from stockpot.events import Recalled
from stockpot.records import RequestRecord
from stockpot.telemetry.families import counter, gauge, histogram
from stockpot.telemetry.tally import Counts, Histograms

if TYPE_CHECKING:
    from stockpot.recall.stores.store import StoreStats

_GIVEN_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5)
"""From 2 ms on those of `gateway_time_to_first_token`, so that one can be taken off the other."""
_SERIES_MAX = 512


@dataclass(frozen=True, slots=True)
class Audited:
    """`wrong` of the `audited` answers given by meaning did not agree with the one made again. `error` is the
    estimated share of wrong ones among all that were given so, `error_upper` its upper bound; None without
    evidence."""

    audited: int = 0
    wrong: int = 0
    error: float | None = None
    error_upper: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallFigures:
    """Where that is read which recall counts itself; each is called at a scrape, on any thread.

    `unkept`: answers that were not kept, by reason; a copy, as it is read there. `audited`: None where
    nothing is given by meaning.
    """

    stored: Callable[[], StoreStats]
    capacity_bytes: Callable[[], int]
    unkept: Callable[[], Mapping[str, int]]
    audited: Callable[[], Audited] | None = None


class RecallMetrics:
    """A `records.RecordObserver` whose `families` go to `telemetry.metrics.Metrics` as one of `more`."""

    def __init__(self, figures: RecallFigures) -> None:
        self._figures = figures
        self._lookups = Counts()
        self._misses = Counts()
        self._bypasses = Counts()
        self._would = 0
        self._saved_tokens = Counts(_SERIES_MAX)
        self._saved_nanousd = Counts(_SERIES_MAX)
        self._saved_s = Counts(_SERIES_MAX)
        self._given_s = {"exact": Histograms(_GIVEN_S), "semantic": Histograms(_GIVEN_S)}

    def observe_request(self, record: RequestRecord) -> None:
        """Tally one request."""
        recalled = record.recalled
        if recalled is None or record.shared:
            return
        self._lookups.add(recalled.outcome)
        if recalled.would:
            self._would += 1
        if recalled.is_hit:
            self._given(record, recalled)
        elif recalled.outcome == "miss":
            self._misses.add(recalled.reason)
        else:
            self._bypasses.add(recalled.reason)

    def families(self) -> Iterable[Metric]:
        """All families, at a scrape."""
        yield from self._lookup_families()
        yield from self._saved_families()
        yield from _store_families(self._figures)
        if self._figures.audited is not None:
            yield from _audit_families(self._figures.audited())

    def _given(self, record: RequestRecord, recalled: Recalled) -> None:
        model = record.model
        for kind, count in (
            ("prompt", recalled.saved_prompt_tokens),
            ("output", recalled.saved_completion_tokens),
        ):
            self._saved_tokens.add(model, kind, by=count)
        self._saved_nanousd.add(model, by=recalled.saved_nanousd)
        self._saved_s.add(model, by=recalled.saved_s)
        if record.ttft_s is not None:
            self._given_s[recalled.outcome].observe(model, record.ttft_s)

    def _lookup_families(self) -> Iterable[Metric]:
        yield counter(
            "recall_lookups",
            "Requests by what was found: exact (the same request), semantic (one that means the same), miss;"
            " bypass: nothing was looked for.",
            ("outcome",),
            self._lookups.totals(),
        )
        yield counter("recall_misses", "Why no kept answer was given.", ("reason",), self._misses.totals())
        yield counter("recall_bypasses", "Why none was looked for.", ("reason",), self._bypasses.totals())
        yield counter("recall_shadow_hits", "Answers shadow mode would have given.", (), [((), self._would)])
        yield histogram(
            "recall_time_to_first_token_seconds",
            "From arrival to the first token, where an answer was kept.",
            ("model", "outcome"),
            [
                ((*labels, outcome), tally)
                for outcome, tallies in self._given_s.items()
                for labels, tally in tallies.labelled()
            ],
        )

    def _saved_families(self) -> Iterable[Metric]:
        yield counter(
            "recall_saved_tokens",
            "Tokens it took to make the answers that were given again.",
            ("model", "kind"),
            self._saved_tokens.totals(),
        )
        yield counter(
            "recall_saved_usd",
            "US dollars it took, as the ledger reckons them.",
            ("model",),
            [(labels, nanousd / 1e9) for labels, nanousd in self._saved_nanousd.totals()],
        )
        yield counter(
            "recall_saved_seconds",
            "Seconds of waiting it took, less what giving them took.",
            ("model",),
            self._saved_s.totals(),
        )


def _store_families(figures: RecallFigures) -> Iterable[Metric]:
    stored = figures.stored()
    yield gauge("recall_entries", "Answers kept.", (), [((), stored.entries)])
    yield gauge("recall_bytes", "Bytes of answers kept.", (), [((), stored.size_bytes)])
    yield gauge(
        "recall_capacity_bytes", "Bytes of answers there is room for.", (), [((), figures.capacity_bytes())]
    )
    yield gauge(
        "recall_store_up",
        "0: the store is out of reach, and every lookup a miss.",
        (),
        [((), float(stored.reachable))],
    )
    yield counter(
        "recall_entries_gone",
        "Answers that are no longer kept: evicted for want of room, expired, lost (could not be written).",
        ("cause",),
        [
            (("evicted",), stored.evicted),
            (("expired",), stored.expired),
            (("lost",), stored.lost),
        ],
    )
    yield counter(
        "recall_answers_unkept",
        "Answers that were made and not kept, by reason.",
        ("reason",),
        [((reason,), count) for reason, count in figures.unkept().items()],
    )


def _audit_families(found: Audited) -> Iterable[Metric]:
    yield counter(
        "recall_audits",
        "Answers given by meaning that were made again, by whether both agree.",
        ("verdict",),
        [(("same",), found.audited - found.wrong), (("wrong",), found.wrong)],
    )
    yield gauge(
        "recall_error_ratio",
        "Share of wrong answers among those given by meaning: the estimate, and its upper bound.",
        ("bound",),
        [
            ((bound,), share)
            for bound, share in (("estimate", found.error), ("upper", found.error_upper))
            if share is not None
        ],
    )

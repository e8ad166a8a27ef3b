"""Prometheus metrics of the KV cache: where prompt tokens came from, and what each tier holds and does.

Counts that a tier keeps itself are read from the engine's snapshot at the scrape. Tallied here is what only
reports tell: on the engine's thread what RAM lets go and uses again, on those of the tiers (one at a time)
what is read and written behind RAM. A tally of one is never written by the other.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.metrics_core import Metric

from stockpot.engine.reports import EngineStats, ReuseReport
from stockpot.kv.prefetch import ReadReport
from stockpot.kv.residents import Eviction
from stockpot.kv.write_behind import WriteReport
from stockpot.telemetry.families import Values, counter, gauge, histogram
from stockpot.telemetry.tally import Counts, Histogram

_READ_S = (0.0001, 0.0003, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.5, 10.0)
_AGE_S = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0, 604800.0)
_STATES = ("up", "open", "half-open")
_MOST_TENANTS = 64
_NEVER_KEPT = "refused_"
"""How the cause of an `Eviction` begins whose blocks never came to RAM."""


class CacheMetrics:
    """The cache's share of `telemetry.metrics.Metrics`."""

    def __init__(self) -> None:
        # Written on the engine's thread.
        self._evicted_blocks = Counts()
        self._evicted_bytes = Counts()
        self._unkept_in_ram = Counts()
        self._lifetime_s = Histogram(_AGE_S)
        self._idle_s = Histogram(_AGE_S)
        self._reuse_gap_s = Histogram(_AGE_S)
        # Written on the tiers' threads.
        self._unkept_behind = Counts()
        self._not_used = Counts()
        # By tier, of which there are as many as the cache was opened with.
        self._locate_s: dict[str, Histogram] = {}
        self._read_s: dict[str, Histogram] = {}

    def observe(self, report: Eviction | ReuseReport | ReadReport | WriteReport) -> None:
        """Tally a report, on the thread it comes on."""
        match report:
            case Eviction():
                self._evicted(report)
            case ReuseReport():
                for gap_s in report.gaps_s:
                    self._reuse_gap_s.observe(gap_s)
            case ReadReport():
                self._read(report)
            case WriteReport():
                for cause, blocks in report.unkept.items():
                    self._unkept_behind.add(report.tier, cause, by=blocks)

    def families(self, stats: EngineStats) -> Iterable[Metric]:
        """All families, at a scrape."""
        yield from _prompts(stats)
        yield from _places(stats)
        yield from self._blocks(stats)
        yield from self._behind(stats)
        yield from self._ages()
        yield from _shares(stats)

    def _evicted(self, report: Eviction) -> None:
        if report.cause.startswith(_NEVER_KEPT):
            self._unkept_in_ram.add("ram", report.cause.removeprefix(_NEVER_KEPT), by=report.blocks)
            return
        self._evicted_blocks.add("ram", report.cause, by=report.blocks)
        self._evicted_bytes.add("ram", report.cause, by=report.size_bytes)
        for age_s in report.ages_s:
            self._lifetime_s.observe(age_s)
        for idle_s in report.idle_s:
            self._idle_s.observe(idle_s)

    def _read(self, report: ReadReport) -> None:
        was_read = report.blocks > 0 or report.read_s > 0
        if was_read:
            self._read_s.setdefault(report.tier, Histogram(_READ_S)).observe(report.read_s)
        if was_read or report.refused != "down":  # the rest was not asked: no time of the tier's
            self._locate_s.setdefault(report.tier, Histogram(_READ_S)).observe(report.locate_s)
        if report.refused == "invalidated":
            # A tier does not know of it, and counts a hit. All other refusals are in its own misses.
            self._not_used.add(report.tier, report.refused)

    def _blocks(self, stats: EngineStats) -> Iterable[Metric]:
        tiers = {name: tier.counts for name, tier in stats.tiers.items()}
        yield gauge(
            "kv_blocks",
            "Blocks a tier holds; of Redis, those this node wrote.",
            ("tier",),
            [(("ram",), stats.ram_blocks), *(((name,), tier.blocks) for name, tier in tiers.items())],
        )
        yield counter(
            "kv_block_hits",
            "Blocks a tier gave, each verified; of RAM, those that prompts used.",
            ("tier",),
            [(("ram",), self._reuse_gap_s.count), *(((name,), tier.hits) for name, tier in tiers.items())],
        )
        misses = [
            ((name, cause), count) for name, tier in tiers.items() for cause, count in tier.misses.items()
        ]
        yield counter(
            "kv_block_misses",
            "Blocks a tier was asked for that were not there or not used, by cause.",
            ("tier", "cause"),
            _summed(misses, self._not_used.totals()),
        )
        yield counter(
            "kv_blocks_unkept",
            "New blocks that a tier did not take, by cause.",
            ("tier", "cause"),
            [*self._unkept_in_ram.totals(), *self._unkept_behind.totals()],
        )
        evicted = [
            ((name, cause), count) for name, tier in tiers.items() for cause, count in tier.evicted.items()
        ]
        labels = ("tier", "cause")
        yield counter(
            "evicted_blocks", "Blocks that left a tier.", labels, [*self._evicted_blocks.totals(), *evicted]
        )
        yield counter("evicted_bytes", "Bytes that left RAM.", labels, self._evicted_bytes.totals())

    def _behind(self, stats: EngineStats) -> Iterable[Metric]:
        """The tiers behind RAM."""
        tiers = stats.tiers.items()
        label = ("tier",)
        yield counter(
            "kv_read_bytes",
            "Bytes of blocks read from a tier.",
            label,
            [((name,), tier.counts.read_bytes) for name, tier in tiers],
        )
        yield counter(
            "kv_written_bytes",
            "Bytes of blocks written to a tier.",
            label,
            [((name,), tier.counts.written_bytes) for name, tier in tiers],
        )
        yield gauge(
            "kv_latency_seconds",
            "Finding out what a tier has: a running mean, an assumption before it was measured.",
            label,
            [((name,), tier.speed.latency_s) for name, tier in tiers],
        )
        yield gauge(
            "kv_read_bandwidth_bytes_per_second",
            "What a tier gives, verified: a running mean, an assumption before it was measured.",
            label,
            [((name,), tier.speed.bytes_per_s) for name, tier in tiers],
        )
        yield gauge(
            "kv_tier_state",
            "1 for the state a tier is in: up, open (not asked, after failures), half-open (probed).",
            ("tier", "state"),
            [((name, state), float(state == tier.counts.state)) for name, tier in tiers for state in _STATES],
        )
        yield histogram(
            "kv_locate_seconds",
            "Finding out what a tier has of one prompt.",
            label,
            [((name,), tally) for name, tally in self._locate_s.copy().items()],
        )
        yield histogram(
            "kv_read_seconds",
            "Reading and verifying what one prompt loads from a tier.",
            label,
            [((name,), tally) for name, tally in self._read_s.copy().items()],
        )

    def _ages(self) -> Iterable[Metric]:
        for name, text, tally in (
            ("kv_block_lifetime_seconds", "How long evicted blocks had been in RAM.", self._lifetime_s),
            (
                "kv_block_idle_before_eviction_seconds",
                "How long evicted blocks had not been used.",
                self._idle_s,
            ),
            ("kv_block_reuse_gap_seconds", "Between two uses of a block in RAM.", self._reuse_gap_s),
        ):
            yield histogram(name, text, (), [((), tally)])


def _prompts(stats: EngineStats) -> Iterable[Metric]:
    sources = {"computed": stats.prompt_tokens_computed, **stats.prompt_tokens_cached}
    yield counter(
        "prompt_tokens",
        "Prompt tokens by where they came from: computed, or cached in a tier.",
        ("source",),
        [((source,), value) for source, value in sources.items()],
    )
    yield gauge("cache_hit_ratio", "Share of prompt tokens not computed.", (), [((), stats.hit_ratio)])
    yield gauge(
        "prefill_seconds_per_token",
        "Computing a prompt token: a running mean, an assumption before it was measured.",
        (),
        [((), stats.prefill_s_per_token)],
    )


def _places(stats: EngineStats) -> Iterable[Metric]:
    """How much there is room for, and how much is taken."""
    tiers = {name: tier.counts for name, tier in stats.tiers.items()}
    cell_bytes = stats.kv_bytes_per_token
    yield gauge("kv_cells", "Cells (tokens) the context holds.", (), [((), stats.cells)])
    yield gauge("kv_cells_used", "Cells in use.", (), [((), stats.cells_used)])
    yield gauge(
        "kv_bytes",
        "Bytes of keys and values held, by tier; of Redis, the server's memory, whatever is in it.",
        ("tier",),
        [
            (("context",), stats.cells_used * cell_bytes),
            (("ram",), stats.ram_used_bytes),
            *(((name,), tier.used_bytes) for name, tier in tiers.items()),
        ],
    )
    yield gauge(
        "kv_capacity_bytes",
        "Bytes of keys and values a tier can hold, where it has a bound.",
        ("tier",),
        [
            (("context",), stats.cells * cell_bytes),
            (("ram",), stats.ram_capacity_bytes),
            *(
                ((name,), tier.capacity_bytes)
                for name, tier in tiers.items()
                if tier.capacity_bytes is not None
            ),
        ],
    )
    yield gauge("kv_ram_blocks", "Blocks in the RAM tier.", (), [((), stats.ram_blocks)])
    yield gauge(
        "kv_ram_pinned_blocks", "Blocks of the RAM tier in use now.", (), [((), stats.ram_pinned_blocks)]
    )


def _shares(stats: EngineStats) -> Iterable[Metric]:
    """Who has what of RAM, and what waits to leave it."""
    # The store never forgets a tenant, so their order stays, and with it which have a series of their own.
    tenants = Counts(limit=_MOST_TENANTS)
    for tenant, size_bytes in stats.tenant_bytes.items():
        tenants.add(tenant, by=size_bytes)
    yield gauge(
        "kv_tenant_bytes",
        f"Bytes of RAM by tenant, the first {_MOST_TENANTS} by name; no name: what belongs to nobody.",
        ("tenant",),
        tenants.totals(),
    )
    yield gauge("kv_promised_bytes", "Bytes of RAM promised to clients.", (), [((), stats.promised_bytes)])
    yield counter(
        "kv_promises_refused",
        "Promises not given: too much was promised already.",
        (),
        [((), stats.promises_refused)],
    )
    yield gauge(
        "kv_write_behind_bytes",
        "Bytes that wait to be written behind RAM.",
        (),
        [((), stats.write_behind_bytes)],
    )


def _summed(*parts: Values) -> Values:
    """The values of all parts, those of the same labels added up."""
    totals: dict[tuple[str, ...], float] = {}
    for part in parts:
        for labels, value in part:
            totals[labels] = totals.get(labels, 0) + value
    return list(totals.items())

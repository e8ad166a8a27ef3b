"""What a gateway costs: requests a second, time added, delay of streamed chunks, memory; beside LiteLLM."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import psutil

from stockpot.bench.charts import Bars, Chart
from stockpot.bench.gateway_server import GatewayPeer, StockpotGateway
from stockpot.bench.load_generator import LoadPlan, LoadReading, Times, run_load
from stockpot.bench.machine import measure_idleness
from stockpot.bench.memory import MemorySample, growth_of_last_half
from stockpot.bench.mock_provider import MOCK_MODEL, mock_command
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.results import Cell, Result, Table, Verdict
from stockpot.bench.server import RunningServer, running_server
from stockpot.bench.statistics import median
from stockpot.errors import ServerUnreachable

DIRECT = "direct"
"""No gateway: the load goes to the provider itself."""
_OURS, _LITELLM = "stockpot", "litellm"
_MIB = 2**20
_OPEN_CONNECTIONS = 64

# Floors of the project.
_TIMES_LITELLM = 20.0
_ADDED_P50_MS = 1.0
_ADDED_P99_MS = 5.0
_CHUNK_P99_MS = 20.0
_GROWTH_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class OverheadPlan:
    """Each of `rounds` measures direct, ours and the others in turn, with servers that run all the time and
    work one at a time. `memory_requests` go to ours alone, in `memory_samples` portions; 0: not measured."""

    rounds: int = 5
    connections: int = 16
    seconds: float = 5.0
    rate_per_s: float = 500.0
    rate_seconds: float = 10.0
    streams: int = 100
    chunks: int = 500
    chunk_interval_s: float = 0.02
    memory_requests: int = 200_000
    memory_samples: int = 40

    @classmethod
    def quick(cls) -> OverheadPlan:
        """Enough to see that everything works."""
        return cls(
            rounds=1,
            seconds=0.5,
            rate_per_s=50.0,
            rate_seconds=0.5,
            streams=4,
            chunks=10,
            memory_requests=400,
            memory_samples=4,
        )


@dataclass(frozen=True, slots=True)
class Target:
    """Something that answers: a gateway, or the provider itself."""

    name: str
    url: str
    key: str
    server: RunningServer


@dataclass(frozen=True, slots=True)
class Reading:
    """One target under one kind of load. `cpu_s` is processor time of its processes meanwhile."""

    target: str
    load: str
    seen: LoadReading
    cpu_s: float

    @property
    def cpu_us_per_request(self) -> float:
        return self.cpu_s * 1e6 / max(1, self.seen.answered)


async def measure_overhead(
    plan: OverheadPlan, others: Sequence[GatewayPeer], *, progress: BenchProgress = silent
) -> Result:
    """Measure ours and `others`, which are prepared. Raises ServerUnreachable where a server does not come up
    or a load fails as a whole."""
    idleness = measure_idleness()
    peers: tuple[GatewayPeer, ...] = (StockpotGateway(), *others)
    progress("start the servers", 0, None)
    async with _targets(plan, peers) as targets:
        progress("start the servers", 1, 1)
        readings = await _rounds(plan, targets, progress)
        ours = next(target for target in targets if target.name == _OURS)
        samples = await _memory(plan, ours, progress)
    medians = _medians(readings)
    return Result(
        name="gateway",
        parameters=asdict(plan),
        tables=_tables(medians, samples),
        figures={
            "peers": {peer.name: dict(peer.facts()) for peer in peers},
            "readings": [
                {"target": each.target, "load": each.load, "cpu_s": round(each.cpu_s, 3)}
                | msgspec.to_builtins(each.seen)
                for each in readings
            ],
            "memory": [[sample.requests, sample.rss_bytes] for sample in samples],
        },
        idleness=idleness,
        verdicts=_verdicts(medians, readings, samples),
        notes=_notes(medians, others),
        chart=_chart(medians),
    )


@asynccontextmanager
async def _targets(plan: OverheadPlan, peers: Sequence[GatewayPeer]) -> AsyncGenerator[list[Target]]:
    """All servers: an idle one costs the others next to nothing, and all are as warm as they get."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stockpot-bench-")))
        command = mock_command(chunks=plan.chunks, interval_s=plan.chunk_interval_s)
        provider = await stack.enter_async_context(running_server(command))
        targets = [Target(DIRECT, provider.url, "none", provider)]
        for peer in peers:
            served = peer.serve(provider.url, MOCK_MODEL, folder)
            running = await stack.enter_async_context(running_server(served.command))
            targets.append(Target(peer.name, running.url, served.key, running))
        yield targets


def _loads(plan: OverheadPlan) -> dict[str, LoadPlan]:
    """The kinds of load by name; url and key are put in for each target."""
    common = LoadPlan("", "", MOCK_MODEL, connections=1)
    change = msgspec.structs.replace
    return {
        "one": change(common, seconds=plan.seconds),
        "many": change(common, connections=plan.connections, seconds=plan.seconds),
        "rate": change(
            common, connections=_OPEN_CONNECTIONS, seconds=plan.rate_seconds, rate_per_s=plan.rate_per_s
        ),
        "streams": change(common, connections=plan.streams, stream=True),
    }


async def _rounds(plan: OverheadPlan, targets: Sequence[Target], progress: BenchProgress) -> list[Reading]:
    """All readings. A gateway that cannot carry the rate is not asked to: its queue would be measured."""
    loads = _loads(plan)
    readings: list[Reading] = []
    for target in targets:  # warm up
        await _read(target, "many", msgspec.structs.replace(loads["many"], seconds=min(1.0, plan.seconds)))
    total = plan.rounds * len(loads)
    for number in range(plan.rounds):
        for place, (name, load) in enumerate(loads.items()):
            for target in targets:
                if name != "rate" or _carries(readings, target.name, plan.rate_per_s):
                    readings.append(await _read(target, name, load))
            progress("rounds", number * len(loads) + place + 1, total)
    return readings


def _carries(readings: Sequence[Reading], target: str, rate_per_s: float) -> bool:
    return max(each.seen.per_s for each in readings if each.target == target) > rate_per_s


async def _read(target: Target, name: str, load: LoadPlan) -> Reading:
    before_s = _cpu_s(target.server)
    seen = await run_load(msgspec.structs.replace(load, url=target.url, key=target.key))
    return Reading(target.name, name, seen, _cpu_s(target.server) - before_s)


def _cpu_s(server: RunningServer) -> float:
    process = psutil.Process(server.pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


async def _memory(plan: OverheadPlan, ours: Target, progress: BenchProgress) -> list[MemorySample]:
    """Resident memory after each portion of the requests."""
    if not plan.memory_requests:
        return []
    portion = max(1, plan.memory_requests // plan.memory_samples)
    load = LoadPlan(ours.url, ours.key, MOCK_MODEL, connections=plan.connections, requests=portion)
    samples = [MemorySample(0, ours.server.rss_bytes())]
    while samples[-1].requests < plan.memory_requests:
        seen = await run_load(load)
        if seen.failed:
            raise ServerUnreachable(f"{seen.failed} requests failed, the first one: {seen.failure}")
        samples.append(MemorySample(samples[-1].requests + seen.answered, ours.server.rss_bytes()))
        progress("memory", samples[-1].requests, plan.memory_requests)
    return samples


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians over the rounds; None: not measured."""

    per_s: float
    cpu_us_per_request: float
    latency: Times | None
    delay: Times | None


Medians = Mapping[tuple[str, str], Summary]
"""By target and load."""


def _medians(readings: Sequence[Reading]) -> Medians:
    groups: dict[tuple[str, str], list[Reading]] = {}
    for each in readings:
        groups.setdefault((each.target, each.load), []).append(each)
    return {
        key: Summary(
            median([each.seen.per_s for each in group]),
            median([each.cpu_us_per_request for each in group]),
            _median_times([each.seen.latency for each in group]),
            _median_times([each.seen.delay for each in group]),
        )
        for key, group in groups.items()
    }


def _median_times(times: Sequence[Times | None]) -> Times | None:
    seen = [each for each in times if each is not None]
    if not seen:
        return None
    return Times(*(median([getattr(each, name) for each in seen]) for name in Times.__struct_fields__))


def _tables(medians: Medians, samples: Sequence[MemorySample]) -> tuple[Table, ...]:
    titles = {
        "many": "Closed loop, many connections",
        "one": "Closed loop, one connection",
        "rate": "Open loop: latency from when each request was due",
    }
    columns = ("server", "requests/s", "CPU us/request", "P50 ms", "P95 ms", "P99 ms", "max ms")
    tables: list[Table] = []
    for load, title in titles.items():
        rows: list[tuple[Cell, ...]] = []
        for (target, of), summary in medians.items():
            if of == load:
                rows.append((target, summary.per_s, summary.cpu_us_per_request, *_cells(summary.latency)))
        tables.append(Table(title, columns, tuple(rows)))
    streamed = tuple(
        (target, *_cells(summary.delay)) for (target, of), summary in medians.items() if of == "streams"
    )
    tables.append(
        Table("Streams: delay of a chunk, provider to reader", (columns[0], *columns[3:]), streamed)
    )
    if samples:
        rows = [(each.requests, round(each.rss_bytes / _MIB, 1)) for each in samples]
        tables.append(Table("Resident memory of ours", ("requests", "RSS MiB"), tuple(rows)))
    return tuple(tables)


def _cells(times: Times | None) -> tuple[Cell, ...]:
    return (None,) * 4 if times is None else (times.p50_ms, times.p95_ms, times.p99_ms, times.max_ms)


def _verdicts(
    medians: Medians, readings: Sequence[Reading], samples: Sequence[MemorySample]
) -> tuple[Verdict, ...]:
    one = _added(medians, "one", "latency", "p50_ms")
    rate = _added(medians, "rate", "latency", "p99_ms")
    delay = medians[_OURS, "streams"].delay
    verdicts = [
        Verdict("P50 added at one connection, ms", one, _ADDED_P50_MS),
        Verdict("P99 added at the fixed rate, ms", rate, _ADDED_P99_MS),
        Verdict("P99 of a chunk's delay, ms", None if delay is None else delay.p99_ms, _CHUNK_P99_MS),
        Verdict("our requests that failed", sum(e.seen.failed for e in readings if e.target == _OURS), 0),
    ]
    if (_LITELLM, "many") in medians:
        share = medians[_LITELLM, "many"].per_s * _TIMES_LITELLM / medians[_OURS, "many"].per_s
        verdicts.insert(0, Verdict(f"{_TIMES_LITELLM:g} x LiteLLM's requests/s over ours", share, 1.0))
    if samples:
        growth = growth_of_last_half(samples) / samples[-1].rss_bytes
        verdicts.append(Verdict("growth over the last half, share of RSS", growth, _GROWTH_SHARE))
    return tuple(verdicts)


def _added(medians: Medians, load: str, what: str, name: str) -> float | None:
    """Ours less direct, milliseconds."""
    times = [getattr(medians[who, load], what) if (who, load) in medians else None for who in (_OURS, DIRECT)]
    if None in times:
        return None
    return getattr(times[0], name) - getattr(times[1], name)


def _notes(medians: Medians, others: Sequence[GatewayPeer]) -> tuple[str, ...]:
    ours = medians[_OURS, "many"]
    notes: list[str] = []
    for peer in others:
        theirs = medians[peer.name, "many"]
        notes.append(
            f"Beside {peer.name}: {ours.per_s / theirs.per_s:.1f} x the requests/s, with"
            f" 1/{theirs.cpu_us_per_request / ours.cpu_us_per_request:.1f} of the processor time for each."
        )
    missing = [peer.name for peer in others if (peer.name, "rate") not in medians]
    if missing:
        notes.append(f"Could not carry the fixed rate, so it was not sent to: {', '.join(missing)}.")
    return tuple(notes)


def _chart(medians: Medians) -> Chart:
    names = [target for target, load in medians if load == "many"]
    per_s = [medians[name, "many"].per_s for name in names]
    delays = [(medians[name, "streams"].delay, name) for name in names]
    p99 = [0.0 if delay is None else delay.p99_ms for delay, _ in delays]
    return Chart(
        (
            Bars("Requests a second", "", "1/s", names, {"median": per_s}, logarithmic=True),
            Bars("Delay of a chunk, P99", "", "ms", names, {"median": p99}, logarithmic=True),
        )
    )

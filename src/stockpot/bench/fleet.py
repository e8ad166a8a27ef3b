"""Chats through the gateway to several real engines: what each way of routing finds cached again."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from stockpot.bench.charts import Bars, Chart
from stockpot.bench.chat_run import ChatRun, run_chat
from stockpot.bench.client import BenchClient
from stockpot.bench.fleet_servers import CHAT, Worker, running_gateway
from stockpot.bench.machine import Idleness, measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.results import Result, Table, Verdict
from stockpot.bench.statistics import median
from stockpot.bench.workload import ChatShape, write_script
from stockpot.errors import ServerUnreachable
from stockpot.settings_gateway import Policy

_SHAPE = ChatShape(
    sessions=9, turns=5, concurrency=3, system_words=400, user_words=200, answer_tokens=24, seed=61
)
"""An odd number of sessions: with an even one, round robin brings each back to the same of two workers."""
_POLICIES: tuple[Policy, ...] = ("round-robin", "least-load", "prefix")
_COMPUTED_RATIO_MAX = 0.8
_LEDGER_S = 20.0
_LEDGER_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """Each round plays the same script once by every policy, in turn."""

    rounds: int = 3
    shape: ChatShape = _SHAPE
    policies: tuple[Policy, ...] = _POLICIES

    @classmethod
    def quick(cls) -> FleetPlan:
        """Enough to see that everything works."""
        shape = ChatShape(
            sessions=5, turns=3, concurrency=2, system_words=200, user_words=120, answer_tokens=8
        )
        return cls(rounds=1, shape=shape, policies=("round-robin", "prefix"))


class LedgerRow(msgspec.Struct, frozen=True):
    """What /admin/usage says of one backend."""

    backend: str
    requests: int
    failures: int
    fresh_tokens: int
    cached_tokens: int
    output_tokens: int


class _Ledger(msgspec.Struct, frozen=True):
    rows: list[LedgerRow]


@dataclass(frozen=True, slots=True)
class FleetReading:
    """One run of the script by one policy. `requests` by backend and `ledger_off_tokens` (how far its sums
    of prompt, cached and output tokens are from what clients were told, all in all) are of the ledger."""

    policy: Policy
    round: int
    run: ChatRun
    requests: Mapping[str, int]
    ledger_off_tokens: int
    idleness: Idleness

    @property
    def cached_tokens(self) -> int:
        return self.run.prompt_tokens - self.run.computed_tokens


async def measure_fleet(
    plan: FleetPlan,
    workers: Sequence[Worker],
    *,
    facts: Mapping[str, object] | None = None,
    progress: BenchProgress = silent,
) -> Result:
    """Play the script by each policy through a gateway of its own; the workers' prefix caches are emptied
    before each. `facts` of the workers go into the result."""
    before = measure_idleness()
    readings = [
        await _read(policy, number, plan, workers, progress)
        for number in range(1, plan.rounds + 1)
        for policy in plan.policies
    ]
    return Result(
        name="fleet",
        parameters=asdict(plan),
        tables=(_summary(plan, readings), _all_readings(readings, workers)),
        figures={"workers": dict(facts or {}), "readings": [_json(reading) for reading in readings]},
        idleness=before,
        verdicts=_verdicts(readings),
        notes=tuple(
            f"Before {reading.policy} round {reading.round}: {reading.idleness.sentence()}"
            for reading in readings
            if not reading.idleness.quiet
        ),
        chart=_chart(plan, readings),
    )


async def _read(
    policy: Policy, number: int, plan: FleetPlan, workers: Sequence[Worker], progress: BenchProgress
) -> FleetReading:
    label = f"round {number}, {policy}"
    for worker in workers:
        await worker.reset_cache()
    idleness = measure_idleness()
    with tempfile.TemporaryDirectory() as folder:
        async with running_gateway(workers, Path(folder), policy=policy) as gateway:
            client = BenchClient(gateway.url, CHAT)
            run = await run_chat(client, write_script(plan.shape), label=label, progress=progress)
            rows = await ledger_rows(gateway.url, requests=len(run.all_answers))
    sums = (
        sum(row.fresh_tokens + row.cached_tokens for row in rows) - run.prompt_tokens,
        sum(row.fresh_tokens for row in rows) - run.computed_tokens,
        sum(row.output_tokens for row in rows) - run.completion_tokens,
    )
    requests = {row.backend: row.requests for row in rows}
    return FleetReading(policy, number, run, requests, sum(map(abs, sums)), idleness)


async def ledger_rows(url: str, *, requests: int) -> list[LedgerRow]:
    """The ledger of the gateway at `url` by backend, as soon as it has so many requests; what it has after a
    while otherwise (it is up to a second behind). Raises ServerUnreachable."""
    import httpx2

    deadline_s = time.monotonic() + _LEDGER_S
    async with httpx2.AsyncClient(base_url=url) as client:
        while True:
            answer = await client.get("/admin/usage", params={"by": "backend"})
            if answer.status_code != 200:
                raise ServerUnreachable(
                    f"{url}/admin/usage answered {answer.status_code}: {answer.text[:200]}"
                )
            rows = msgspec.json.decode(answer.content, type=_Ledger).rows
            if sum(row.requests for row in rows) >= requests or time.monotonic() > deadline_s:
                return rows
            await asyncio.sleep(_LEDGER_POLL_S)


def _of(readings: Sequence[FleetReading], policy: Policy) -> list[FleetReading]:
    return [reading for reading in readings if reading.policy == policy]


def _computed(readings: Sequence[FleetReading], policy: Policy) -> float | None:
    some = _of(readings, policy)
    return median([reading.run.computed_tokens for reading in some]) if some else None


def _verdicts(readings: Sequence[FleetReading]) -> tuple[Verdict, ...]:
    prefix, in_turn = _computed(readings, "prefix"), _computed(readings, "round-robin")
    ratio = prefix / in_turn if prefix is not None and in_turn else None
    return (
        Verdict("prompt tokens computed, prefix over round-robin", ratio, _COMPUTED_RATIO_MAX),
        Verdict(
            "tokens by which ledger and clients differ, all runs",
            sum(reading.ledger_off_tokens for reading in readings),
            0,
        ),
    )


def _summary(plan: FleetPlan, readings: Sequence[FleetReading]) -> Table:
    columns = (
        *("policy", "TTFT mean s", "P50 s", "P95 s", "wall s"),
        *("prompt tokens", "cached", "computed", "cached %"),
    )
    rows = tuple(
        (
            policy,
            *(
                round(median([getattr(r.run.ttft, name) for r in some]), 4)
                for name in ("mean_s", "p50_s", "p95_s")
            ),
            round(median([r.run.wall_s for r in some]), 2),
            round(median([r.run.prompt_tokens for r in some])),
            round(median([r.cached_tokens for r in some])),
            round(median([r.run.computed_tokens for r in some])),
            round(median([100 * r.cached_tokens / r.run.prompt_tokens for r in some]), 1),
        )
        for policy in plan.policies
        if (some := _of(readings, policy))
    )
    return Table(f"{plan.shape.name}, medians over all rounds", columns, rows)


def _all_readings(readings: Sequence[FleetReading], workers: Sequence[Worker]) -> Table:
    columns = (
        *("round", "policy", "TTFT mean s", "wall s", "prompt tokens", "cached", "answer tokens"),
        *(f"requests to {worker.name}" for worker in workers),
    )
    rows = tuple(
        (
            *(r.round, r.policy, round(r.run.ttft.mean_s, 4), round(r.run.wall_s, 2)),
            *(r.run.prompt_tokens, r.cached_tokens, r.run.completion_tokens),
            *(r.requests.get(worker.name, 0) for worker in workers),
        )
        for r in readings
    )
    return Table("Every reading", columns, rows)


def _json(reading: FleetReading) -> dict[str, object]:
    return {
        "policy": reading.policy,
        "round": reading.round,
        "ttft": asdict(reading.run.ttft),
        "ttft_by_turn_s": [[round(a.ttft_s, 4) for a in turn] for turn in reading.run.answers],
        "cached_by_turn": [sum(a.cached_tokens or 0 for a in turn) for turn in reading.run.answers],
        "wall_s": reading.run.wall_s,
        "prompt_tokens": reading.run.prompt_tokens,
        "cached_tokens": reading.cached_tokens,
        "completion_tokens": reading.run.completion_tokens,
        "requests_by_backend": dict(reading.requests),
        "ledger_off_tokens": reading.ledger_off_tokens,
        "cpu_percent_before": reading.idleness.cpu_percent,
    }


def _chart(plan: FleetPlan, readings: Sequence[FleetReading]) -> Chart:
    """By turn: the first is cold for every policy, what follows is what routing decides."""
    turns = tuple(str(turn) for turn in range(1, plan.shape.turns + 1))

    def by_turn(policy: Policy, of: str) -> list[float]:
        some = _of(readings, policy)
        return [
            median(
                [
                    sum(getattr(answer, of) for answer in r.run.answers[turn]) / len(r.run.answers[turn])
                    for r in some
                ]
            )
            for turn in range(plan.shape.turns)
        ]

    return Chart(
        tuple(
            Bars(title, "turn", unit, turns, {policy: by_turn(policy, of) for policy in plan.policies})
            for title, unit, of in (
                ("Mean time to first token", "s", "ttft_s"),
                ("Prompt tokens computed for a request", "tokens", "computed_tokens"),
            )
        )
    )

"""Plays shuffles of a labelled stream under every policy, in a process of its own.

`python -m stockpot.bench.recall.stream_worker FOLDER` takes a plan as JSON on stdin and writes a reading as a
line of JSON for each shuffle; `play_shuffles` does that with several at a time.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.recall import policies
from stockpot.bench.recall.labelled import LabelledTexts
from stockpot.bench.recall.tally import Tally
from stockpot.errors import ServerUnreachable
from stockpot.settings_recall import Refusable, SemanticSettings

_LINE_BYTES_MAX = 2**26


class Play(msgspec.Struct, frozen=True):
    """`shuffles` are seeds. `hits_of` is the one of which the hits are told too (None: of none)."""

    shuffles: tuple[int, ...]
    deltas: tuple[float, ...]
    thresholds: tuple[float, ...]
    allow: tuple[Refusable, ...] = ()
    requests: int | None = None
    hits_of: tuple[int, float] | None = None


class Played(msgspec.Struct, frozen=True):
    """One shuffle. By delta: ours and vCache's; by threshold: the static one's."""

    shuffle: int
    ours: list[policies.Outcome]
    ours_of_all: list[policies.Outcome]
    vcache: list[policies.Outcome]
    static: list[policies.Outcome]


def settings_for(
    delta: float, allow: Sequence[Refusable], error_of: Literal["given", "requests"] = "given"
) -> SemanticSettings:
    """As an operator would have it who accepts `delta`."""
    return SemanticSettings(mode="on", max_error=delta, error_of=error_of, allow=tuple(allow))


def order_of(shuffle: int, count: int, requests: int | None) -> list[int]:
    """The order of a shuffle, the same on every machine."""
    return np.random.Generator(np.random.PCG64(shuffle)).permutation(count)[:requests].tolist()


async def play_shuffles(
    plan: Play, data_folder: Path, *, processes: int = 2, progress: BenchProgress = silent
) -> list[Played]:
    """All shuffles, shared among processes. Raises ServerUnreachable where one fails."""
    played: list[Played] = []

    async def run(shuffles: tuple[int, ...]) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, str(data_folder)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
            # Each process has one core: threads of the linear algebra would only disturb the other's.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        words = asyncio.create_task(process.stderr.read())
        try:
            process.stdin.write(msgspec.json.encode(msgspec.structs.replace(plan, shuffles=shuffles)))
            process.stdin.write_eof()
            async for line in process.stdout:
                played.append(msgspec.json.decode(line, type=Played))
                progress("shuffles", len(played), len(plan.shuffles))
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if code:
            said = (await words).decode(errors="replace")
            raise ServerUnreachable(f"A process that plays shuffles ended with code {code}: {said}")

    async with asyncio.TaskGroup() as group:
        for share in (plan.shuffles[first::processes] for first in range(processes)):
            if share:
                group.create_task(run(share))
    return sorted(played, key=lambda each: plan.shuffles.index(each.shuffle))


def play(plan: Play, data: LabelledTexts, reader: policies.Reader, shuffle: int) -> Played:
    """One shuffle under every policy."""
    order = order_of(shuffle, len(data), plan.requests)
    ours: list[policies.Outcome] = []
    of_all = [
        policies.ours(data, order, settings_for(delta, plan.allow, "requests"), reader, shuffle)
        for delta in plan.deltas
    ]
    for delta in plan.deltas:
        outcome = policies.ours(data, order, settings_for(delta, plan.allow), reader, shuffle)
        wanted = plan.hits_of == (shuffle, delta)
        ours.append(outcome if wanted else policies.without_hits(outcome))
    vcache = [policies.without_hits(policies.vcache(data, order, delta, shuffle)) for delta in plan.deltas]
    static = [policies.without_hits(policies.static(data, order, at)) for at in plan.thresholds]
    return Played(shuffle, ours, list(map(policies.without_hits, of_all)), vcache, static)


def best_static(outcomes: Sequence[policies.Outcome], delta: float) -> Tally | None:
    """Of the thresholds that kept the error of the given answers, the one that answered most: nobody could
    have known it beforehand. None: none kept it."""
    good = [each.tally for each in outcomes if each.tally.error_of_given <= delta]
    return max(good, key=lambda tally: tally.hit_share, default=None)


def _main(folder: Path) -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Play)
    data = LabelledTexts.load(folder)
    reader = policies.Reader(data)
    for shuffle in plan.shuffles:
        sys.stdout.buffer.write(msgspec.json.encode(play(plan, data, reader, shuffle)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

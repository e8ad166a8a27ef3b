"""A million requests through `stockpot doctor`: how long it takes, and whether its memory stays flat."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from stockpot.bench.progress import BenchProgress
from stockpot.errors import BuildFailed

Json = dict[str, Any]

_LIVE = 2_000
_TURNS = 8
_BROKEN_SHARE = 0.1
_SAMPLE_S = 0.5
_MIB = 2**20
_CLI = "from stockpot.cli.main import main; main()"
_START_S = 1_763_978_400.0


@dataclass(frozen=True, slots=True)
class MillionRun:
    """One run. `rss_mib` are samples over time; `half_mib` and `end_mib` the medians of the third and the
    last quarter of them."""

    requests: int
    file_bytes: int
    seconds: float
    rss_mib: tuple[float, ...]
    half_mib: float
    end_mib: float

    @property
    def peak_mib(self) -> float:
        return max(self.rss_mib)


def write_requests(path: Path, count: int, progress: BenchProgress) -> None:
    """Interleaved conversations of 8 turns of 200 programs, 2,000 under way at a time; a tenth of the
    programs has a time in the system prompt."""
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(_lines(count)):
            file.write(line)
            if number % 20_000 == 0:
                progress("write the requests", number, count)
    progress("write the requests", count, count)


def run_doctor(path: Path, count: int, progress: BenchProgress) -> MillionRun:
    """`stockpot doctor FILE --json` as a process of its own. Raises BuildFailed where it fails."""
    command = [sys.executable, "-c", _CLI, "doctor", str(path), "--json"]
    progress("examine them", 0, None)
    started_s = time.perf_counter()
    samples: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                samples.append(watched.memory_info().rss / _MIB)
            except psutil.Error:
                break
            time.sleep(_SAMPLE_S)
        output, errors = process.communicate()
    seconds = time.perf_counter() - started_s
    if process.returncode != 0:
        raise BuildFailed(f"stockpot doctor ended with {process.returncode}: {errors.decode()[-300:]}")
    found = json.loads(output)
    if found["requests"] != count:
        raise BuildFailed(f"stockpot doctor read {found['requests']} of {count} requests.")
    progress("examine them", 1, 1)
    quarter = max(1, len(samples) // 4)
    return MillionRun(
        requests=count,
        file_bytes=path.stat().st_size,
        seconds=seconds,
        rss_mib=tuple(round(each, 1) for each in samples),
        half_mib=sorted(samples[-2 * quarter : -quarter] or samples)[quarter // 2],
        end_mib=sorted(samples[-quarter:])[quarter // 2],
    )


def _lines(count: int) -> Iterator[str]:
    chance = random.Random(3)
    words = ("cached", "prompt", "tokens", "read", "again", "another", "request", "long", "prefix", "block")
    live: list[Json] = []
    at_s = _START_S
    for number in range(count):
        at_s += chance.random() * 0.02
        if len(live) < _LIVE:
            program = chance.randrange(200)
            live.append({"program": program, "id": number, "messages": []})
        place = chance.randrange(len(live))
        one = live[place]
        one["messages"].append({"role": "user", "content": " ".join(chance.choices(words, k=14))})
        body = {"model": "gpt-5", "messages": [_system(one["program"], at_s), *one["messages"]]}
        line = {"at": round(at_s, 3), "request_id": f"r{number}", "shape": "openai-chat", "body": body}
        yield json.dumps(line) + "\n"
        one["messages"].append({"role": "assistant", "content": " ".join(chance.choices(words, k=24))})
        if len(one["messages"]) >= 2 * _TURNS:
            live[place] = live[-1]
            live.pop()


def _system(program: int, at_s: float) -> Json:
    rules = f"You are program {program}. " + "Follow the rules of the house and be exact. " * 25
    if program < 200 * _BROKEN_SHARE:
        rules = f"Time: {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(at_s))}\n{rules}"
    return {"role": "system", "content": rules}

"""Lesson 4: session consistency. Several workers, and each has a cache of its own.

Round robin sends the turns of a conversation to one worker after the other, and each computes the whole
conversation. A worker chosen by the session's id has all but the last turn already. (Stockpot's gateway does
this by itself, and looks for the longest cached prefix, too: `routing.policy`.)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import blake2b
from pathlib import Path

import platformdirs

from stockpot.bench.client import BenchClient
from stockpot.bench.progress import silent
from stockpot.bench.workload import WordSource
from stockpot.context import Context
from stockpot.lessons.lesson import Lesson, Outcome, Size, Stage, Way, ask, run_alone

WORKERS = 3
_SESSIONS = 5
"""Not a multiple of the workers: round robin would send each session to one of them by chance."""
_ONE_THREAD = {"engine": {"threads": 1}}


async def measure(stage: Stage, size: Size) -> Outcome:
    """Some sessions, whose turns alternate; the same conversations both ways."""
    words = WordSource(4)
    questions = [[f"Tell me of {words.text(20)}." for _ in range(_SESSIONS)] for _ in range(size.turns)]
    ways = {"A": Way("round robin"), "B": Way("by session id")}
    async with _workers(stage) as workers:
        sessions = {
            (way, session): Context(system=f"{way}{session}: {words.text(size.words // 2)}")
            for session in range(_SESSIONS)
            for way in ways
        }
        asked = 0
        for turn in range(size.turns):
            for session in range(_SESSIONS):
                # Wrong: whose turn it is.
                await _turn(
                    workers[asked % len(workers)],
                    ways["A"],
                    sessions["A", session],
                    questions[turn][session],
                    size,
                )
                # Right: always the same for a session.
                await _turn(
                    worker_of(f"session-{session}", workers),
                    ways["B"],
                    sessions["B", session],
                    questions[turn][session],
                    size,
                )
                asked += 1
    return Outcome(ways["A"], ways["B"])


def worker_of(session: str, workers: Sequence[BenchClient]) -> BenchClient:
    """By rendezvous (Thaler and Ravishankar 1998): where a worker goes, only its sessions move."""
    return max(workers, key=lambda worker: blake2b(f"{session} {worker.url}".encode()).digest())


async def _turn(client: BenchClient, way: Way, context: Context, question: str, size: Size) -> None:
    context.user(question)
    context.assistant(await ask(client, way, context.openai(client.model), size))


@asynccontextmanager
async def _workers(stage: Stage) -> AsyncGenerator[Sequence[BenchClient]]:
    """Servers with an engine each, or with `--fleet` two vLLM servers (their first set-up takes minutes)."""
    async with AsyncExitStack() as stack:
        if stage.fleet:
            from stockpot.bench.fleet_servers import VllmWorkers, running_workers
            from stockpot.lessons.lesson import client_at

            vllm = VllmWorkers(Path(platformdirs.user_cache_dir("stockpot")))
            vllm.prepare(silent)
            servers = await stack.enter_async_context(running_workers(vllm, count=2, progress=silent))
            yield [await client_at(server.running.url) for server in servers]
        else:
            yield [await stack.enter_async_context(stage.client(_ONE_THREAD)) for _ in range(WORKERS)]


LESSON = Lesson(
    4,
    "session_affinity",
    "session consistency: several workers, each with its own cache",
    "requests go to the workers in turn (round robin)",
    "a session's requests go to one worker, chosen by its id",
    measure,
    own_server=True,
)

if __name__ == "__main__":
    run_alone(LESSON)

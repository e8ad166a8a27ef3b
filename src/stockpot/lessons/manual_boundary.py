"""Lesson 3: a manual cache boundary, where nothing is cached by itself.

Some providers cache only what they are told to: what precedes a boundary in the request. Here the engine is
made to behave like that (`cache.automatic = false`). Without a boundary every prompt is computed whole; with
one behind the stable part, that part is computed once.
"""

from __future__ import annotations

from stockpot.bench.workload import WordSource
from stockpot.context import Context
from stockpot.lessons.lesson import Lesson, Outcome, Size, Stage, Way, ask, run_alone

_MANUAL = {"cache": {"automatic": False}}


async def measure(stage: Stage, size: Size) -> Outcome:
    """Single questions about one handbook, in turn, without and with a boundary behind the handbook."""
    words = WordSource(3)
    handbook = words.text(size.words)
    wrong, right = Way("no boundary"), Way("boundary")
    async with stage.client(_MANUAL) as client:
        for _ in range(size.turns):
            question = f"What does it say about {words.text(3)}?"

            # Wrong: nothing says what is worth keeping.
            plain = Context(system="A: Answer from the handbook.", documents={"handbook": handbook})
            plain.user(question)
            await ask(client, wrong, plain.openai(client.model, server="stockpot"), size)

            # Right: a boundary behind the handbook (`cache_control` in the request).
            marked = Context(system="B: Answer from the handbook.", documents={"handbook": handbook})
            marked.boundary(ttl="5m")
            marked.user(question)
            await ask(client, right, marked.openai(client.model, server="stockpot"), size)
    return Outcome(wrong, right)


LESSON = Lesson(
    3,
    "manual_boundary",
    "a manual cache boundary where nothing is cached by itself",
    "nothing says what is worth keeping",
    'a boundary stands behind the stable part (Context.boundary, "cache_control")',
    measure,
    own_server=True,
)

if __name__ == "__main__":
    run_alone(LESSON)

"""Lesson 1: a stable prefix against a timestamp.

A model reads a prompt from its beginning, and what it has computed of it can be used again up to the first
token that differs. A time of day in the first line therefore makes every prompt new, however long the rest.
The same fact at the end costs nothing: all before it stays the same.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from stockpot.bench.workload import WordSource
from stockpot.context import Context
from stockpot.lessons.lesson import Lesson, Outcome, Size, Stage, Way, ask, run_alone


async def measure(stage: Stage, size: Size) -> Outcome:
    """The same questions at the same times, in turn; each way has rules of its own, so that neither finds
    what the other left."""
    words = WordSource(1)
    rules = {name: f"You are assistant {name}. " + words.text(size.words) for name in ("A", "B")}
    wrong, right = Way("time first"), Way("time last")
    context = Context(system=rules["B"])
    history: list[dict[str, str]] = []
    async with stage.client() as client:
        for turn in range(size.turns):
            now = (datetime(2026, 11, 25, 8, 0) + timedelta(seconds=37 * turn)).isoformat()
            question = f"What about {words.text(4)}?"

            # Wrong: the time stands before everything else.
            system = {"role": "system", "content": f"Current time: {now}\n{rules['A']}"}
            history.append({"role": "user", "content": question})
            answer = await ask(client, wrong, {"messages": [system, *history]}, size)
            history.append({"role": "assistant", "content": answer})

            # Right: it is told with the question, at the end.
            context.fact("time", now)
            context.user(question)
            context.assistant(await ask(client, right, context.openai(client.model), size))
    return Outcome(wrong, right)


LESSON = Lesson(
    1,
    "stable_prefix",
    "a stable prefix against a timestamp",
    "the system prompt begins with the current time",
    "the time is told with the question, at the end (Context.fact)",
    measure,
)

if __name__ == "__main__":
    run_alone(LESSON)

"""Lesson 2: an append-only log against JSON that is rewritten in place.

An agent that keeps the state of its task as JSON in the prompt and rewrites it in each turn changes the
middle of the prompt: all that follows, the whole conversation, is computed again. A log that is only
appended to says the same in more tokens, and nearly all of them are read from the cache.
"""

from __future__ import annotations

import json

from stockpot.bench.workload import WordSource
from stockpot.context import Context
from stockpot.lessons.lesson import Lesson, Outcome, Size, Stage, Way, ask, run_alone

_RULES = "You work through a list of tasks. The state of the work is given as JSON."


async def measure(stage: Stage, size: Size) -> Outcome:
    """The same tasks in turn. The state has as many entries as there are turns, one of which changes each
    time."""
    words = WordSource(2)
    tasks = {f"task-{n}": {"title": words.text(6), "done": False} for n in range(size.turns)}
    notes = words.text(size.words)
    wrong, right = Way("rewritten in place"), Way("append-only")
    context = Context(system=f"B: {_RULES}\n{notes}", state={"tasks": tasks})
    history: list[dict[str, str]] = []
    async with stage.client() as client:
        for turn in range(size.turns):
            question = f"Go on with {words.text(3)}."
            if turn:
                tasks[f"task-{turn - 1}"]["done"] = True
                context.state.set(f"tasks.task-{turn - 1}.done", True)

            # Wrong: the state stands before the conversation, pretty and up to date.
            state = json.dumps({"turn": turn, "tasks": tasks}, indent=2)
            system = {"role": "system", "content": f"A: {_RULES}\nState:\n{state}\n{notes}"}
            history.append({"role": "user", "content": question})
            answer = await ask(client, wrong, {"messages": [system, *history]}, size)
            history.append({"role": "assistant", "content": answer})

            # Right: it is told once, then what has changed.
            context.user(question)
            context.assistant(await ask(client, right, context.openai(client.model), size))
    return Outcome(wrong, right)


LESSON = Lesson(
    2,
    "append_only",
    "an append-only log against JSON rewritten in place",
    "the state of the task stands at the top, and is rewritten in each turn",
    "the state is told once, and then what has changed, at the end (Context.state)",
    measure,
)

if __name__ == "__main__":
    run_alone(LESSON)

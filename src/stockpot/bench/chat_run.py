"""The chat workload, run against one server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from stockpot.bench.client import Answer, BenchClient, ChatMessage
from stockpot.bench.gather import run_all
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.statistics import Spread
from stockpot.bench.workload import ChatScript


@dataclass(frozen=True, slots=True)
class ChatRun:
    """All answers in the order [turn][session], and every prompt that was sent."""

    answers: tuple[tuple[Answer, ...], ...]
    prompts: tuple[tuple[ChatMessage, ...], ...]
    wall_s: float

    @property
    def all_answers(self) -> tuple[Answer, ...]:
        return tuple(answer for turn in self.answers for answer in turn)

    @property
    def ttft(self) -> Spread:
        return Spread.of([answer.ttft_s for answer in self.all_answers])

    @property
    def prompt_tokens(self) -> int:
        return sum(answer.prompt_tokens for answer in self.all_answers)

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens the server says it computed."""
        return sum(answer.computed_tokens for answer in self.all_answers)

    @property
    def completion_tokens(self) -> int:
        return sum(answer.completion_tokens for answer in self.all_answers)


async def run_chat(
    client: BenchClient, script: ChatScript, *, label: str = "chat", progress: BenchProgress = silent
) -> ChatRun:
    """Play the script: turn by turn all sessions in order, `concurrency` requests at a time; a turn begins
    when the one before is answered everywhere."""
    shape = script.shape
    histories: list[list[ChatMessage]] = [
        [{"role": "system", "content": script.system_text}] for _ in range(shape.sessions)
    ]
    prompts: list[tuple[ChatMessage, ...]] = []
    places = asyncio.Semaphore(shape.concurrency)
    total, done = shape.sessions * shape.turns, 0

    async def take_turn(session: int, text: str) -> Answer:
        nonlocal done
        async with places:
            history = histories[session]
            history.append({"role": "user", "content": text})
            prompts.append(tuple(history))
            answer = await client.chat(history, max_tokens=shape.answer_tokens)
            history.append({"role": "assistant", "content": answer.text or "ok"})
        done += 1
        progress(label, done, total)
        return answer

    answers: list[tuple[Answer, ...]] = []
    start_s = time.perf_counter()
    for texts in script.user_texts:
        turn = await run_all(take_turn(session, text) for session, text in enumerate(texts))
        answers.append(tuple(turn))
    return ChatRun(tuple(answers), tuple(prompts), time.perf_counter() - start_s)

"""What the lessons have in common: where they are measured, and how the two ways are compared."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from stockpot.bench.client import Answer, BenchClient, ChatMessage
from stockpot.bench.statistics import median
from stockpot.bench.stockpot_server import stockpot_server
from stockpot.errors import ConfigurationError, ServerUnreachable

_BAR = 40


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked: turns of a conversation, words of instructions, tokens of an answer."""

    turns: int = 8
    words: int = 700
    answer_tokens: int = 12

    @classmethod
    def quick(cls) -> Size:
        """Enough to see that it works."""
        return cls(turns=3, words=150, answer_tokens=4)


@dataclass(slots=True)
class Way:
    """One of two ways to do the same, and its answers in order."""

    name: str
    answers: list[Answer] = field(default_factory=list[Answer])

    @property
    def prompt_tokens(self) -> int:
        return sum(answer.prompt_tokens for answer in self.answers)

    @property
    def cached_tokens(self) -> int:
        """0 where the server does not say."""
        return sum(answer.cached_tokens or 0 for answer in self.answers)

    @property
    def hit_ratio(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def ttft_s(self) -> float:
        """The median over all requests but the first, which finds nothing either way."""
        return median([answer.ttft_s for answer in self.answers[1:] or self.answers])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a lesson measured."""

    wrong: Way
    right: Way


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a lesson is measured: the engine of this package, in servers that are started for it, or a server
    at `base_url`, whose model is `model` ("": its first). `fleet`: workers are real vLLM servers."""

    base_url: str = ""
    model: str = ""
    fleet: bool = False

    @asynccontextmanager
    async def client(
        self, settings: Mapping[str, Mapping[str, object]] | None = None
    ) -> AsyncGenerator[BenchClient]:
        """A client of a server, with these settings where it is one of ours. Raises ServerUnreachable."""
        if self.base_url:
            yield await client_at(self.base_url, self.model)
            return
        async with stockpot_server(settings or {}) as server:
            await server.client.chat([{"role": "user", "content": "Hello."}], max_tokens=1)  # it is warm
            yield server.client


@dataclass(frozen=True, slots=True)
class Lesson:
    """One lesson. `own_server`: it needs settings of a server of ours, and says nothing about others."""

    number: int
    name: str
    title: str
    wrong: str
    right: str
    measure: Callable[[Stage, Size], Awaitable[Outcome]]
    own_server: bool = False


async def client_at(url: str, model: str = "") -> BenchClient:
    """Of a server somebody else runs. Raises ServerUnreachable where it names no model."""
    root = url.rstrip("/").removesuffix("/v1")
    if not model:
        found: Any = await BenchClient(root, "").get("/v1/models")
        models = cast("Sequence[Mapping[str, Any]]", found.get("data") or ())
        if not models:
            raise ServerUnreachable(f"{url} serves no model.")
        model = str(models[0]["id"])
    return BenchClient(root, model)


async def ask(client: BenchClient, way: Way, request: Mapping[str, Any], size: Size) -> str:
    """Send what `Context.openai` rendered, or a body of one's own; the answer's text."""
    messages = cast("Sequence[ChatMessage]", request["messages"])
    answer = await client.chat(messages, max_tokens=size.answer_tokens)
    way.answers.append(answer)
    return answer.text


def show(lesson: Lesson, outcome: Outcome, console: Console) -> None:
    """The figures, and a bar for each request: what was read from a cache, and what was computed."""
    console.rule(f"Lesson {lesson.number}: {lesson.title}", align="left")
    console.print(f"Wrong: {lesson.wrong}\nRight: {lesson.right}", markup=False)
    table = Table()
    for name in ("way", "TTFT, median ms", "cached tokens", "prompt tokens", "hit ratio"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in (outcome.wrong, outcome.right):
        table.add_row(
            way.name,
            f"{1e3 * way.ttft_s:,.1f}",
            f"{way.cached_tokens:,}",
            f"{way.prompt_tokens:,}",
            f"{100 * way.hit_ratio:.1f}%",
        )
    console.print(table)
    for way in (outcome.wrong, outcome.right):
        console.print(f"{way.name}:", markup=False)
        most = max(answer.prompt_tokens for answer in way.answers) or 1
        for number, answer in enumerate(way.answers, 1):
            cached = round(_BAR * (answer.cached_tokens or 0) / most)
            computed = max(0, round(_BAR * answer.prompt_tokens / most) - cached)
            console.print(
                f"  {number:2} [green]{'█' * cached}[/green][red]{'░' * computed}[/red]"
                f" {1e3 * answer.ttft_s:,.0f} ms",
                highlight=False,
            )
    console.print("green: read from a cache; red: computed", style="dim")


def run_alone(lesson: Lesson) -> None:
    """`python -m stockpot.lessons.NAME [--base-url URL] [--model NAME] [--quick]`."""
    parser = argparse.ArgumentParser(description=f"Lesson {lesson.number}: {lesson.title}.")
    parser.add_argument("--base-url", default="", help="a server to measure on; left out: one is started")
    parser.add_argument("--model", default="", help="its model; left out: the first it names")
    parser.add_argument("--fleet", action="store_true", help="real vLLM servers as workers (lesson 4)")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    stage = Stage(given.base_url, given.model, given.fleet)
    show(lesson, asyncio.run(measured(lesson, stage, Size.quick() if given.quick else Size())), Console())


async def measured(lesson: Lesson, stage: Stage, size: Size) -> Outcome:
    """Raises ConfigurationError for a lesson that cannot be measured there, ServerUnreachable."""
    if lesson.own_server and stage.base_url:
        raise ConfigurationError(
            f"Lesson {lesson.number} needs settings of its own server, or several; leave --base-url out."
        )
    return await lesson.measure(stage, size)

"""Load on a Q&A API whose answers are kept: hits and misses apart, with eviction and invalidation on the way.

    stockpot serve --config benchmarks/cached-qa/stockpot.toml
    locust -f benchmarks/cached-qa/locustfile.py --headless -u 8 -r 4 -t 60s --host http://127.0.0.1:8000 \
        --csv benchmarks/cached-qa/last

Each user asks questions about one handbook; a few are asked again and again (Zipf), the others once.
Requests are listed by what the server says of them (`x-stockpot-recall`): exact, semantic, miss. One user
takes answers out by their tag every few seconds, and looks at what the cache holds. The cache is small, so it
evicts, too.
"""

# pyright: basic, reportMissingImports=false
# Locust is in no environment of this project.

from __future__ import annotations

import itertools
import random
from typing import Any

from locust import HttpUser, between, task

HANDBOOK = "You answer from the handbook of a bicycle shop, in one sentence. " + (
    "Goods that are unused may be returned within 30 days. Bells cost 4 euros. Repairs take two days. " * 12
)
TOPICS = ("bells", "returns", "repairs", "lights", "helmets", "tyres", "brakes", "chains")
POPULAR = [f"How much do {topic} of kind {n} cost?" for topic in TOPICS for n in range(4)]
ONCE = itertools.count()


def question(chance: random.Random) -> str:
    """Three of four are popular ones, the first of them most."""
    if chance.random() < 0.75:
        return POPULAR[min(int(chance.paretovariate(0.8)) - 1, len(POPULAR) - 1)]
    return f"What does note {next(ONCE)} say about {chance.choice(TOPICS)}?"


class Asker(HttpUser):
    """Asks, with little time to think."""

    weight = 20
    wait_time = between(0.05, 0.3)

    def on_start(self) -> None:
        self.chance = random.Random()
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    @task
    def ask(self) -> None:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": HANDBOOK},
                {"role": "user", "content": question(self.chance)},
            ],
            "temperature": 0,
            "max_tokens": 64,
            "stop": [".", "\n"],  # an answer that is cut off is not kept
        }
        headers = {"x-stockpot-recall-tags": self.chance.choice(TOPICS)}
        with self.client.post(
            "/v1/chat/completions", json=body, headers=headers, catch_response=True
        ) as answer:
            outcome = answer.headers.get("x-stockpot-recall", "none")
            answer.request_meta["name"] = f"answer: {outcome}"
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")


class Operator(HttpUser):
    """Takes answers out by their tag, and looks."""

    fixed_count = 1
    wait_time = between(3, 5)

    @task
    def invalidate(self) -> None:
        self.client.post("/admin/recall/invalidate", json={"tag": random.choice(TOPICS)}, name="invalidate")

    @task
    def look(self) -> None:
        self.client.get("/admin/recall", name="report")

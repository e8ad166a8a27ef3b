"""Recall in front of the real model, by the official client: what is replayed is what was made."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import openai
from tests.integration.conftest import StartServer
from tests.integration.servers import Server

ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Name three fruits, one on each line."}],
    "temperature": 0,
    "max_tokens": 200,
}


def _serve(start: StartServer, folder: Path) -> Server:
    return start(folder, STOCKPOT_RECALL__EXACT="true", STOCKPOT_DATA_DIR=str(folder / "data"))


def _generations(server: Server) -> int:
    """Requests the engine has had."""
    lines = server.client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("stockpot_requests_total{")]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in found))


def test_a_replayed_stream_says_the_same_event_for_event(tmp_path: Path, start_server: StartServer) -> None:
    server = _serve(start_server, tmp_path)
    client: Any = openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="unused")

    def streamed(**extra: Any) -> list[Any]:
        with client.chat.completions.create(
            model=server.model, stream=True, stream_options={"include_usage": True}, **ASK, **extra
        ) as stream:
            return [chunk.model_dump() for chunk in stream]

    made, replayed = streamed(), streamed()
    assert [chunk["choices"] for chunk in made] == [chunk["choices"] for chunk in replayed]
    assert len(made) > 5
    usage = replayed[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    assert replayed[-1]["stockpot"]["recall"]["outcome"] == "exact"
    plain = client.chat.completions.create(model=server.model, **ASK)
    said = "".join(choice["delta"].get("content") or "" for chunk in made for choice in chunk["choices"])
    assert plain.choices[0].message.content == said

    time.sleep(1.0)  # what is older than a second is not lost
    server.kill()
    second = _serve(start_server, tmp_path)
    after = second.client.post("/v1/chat/completions", json={"model": second.model, **ASK})
    assert after.headers["x-stockpot-recall"] == "exact"
    assert after.json()["choices"][0]["message"]["content"] == said


async def test_a_thousand_at_once_are_one_generation(tmp_path: Path, start_server: StartServer) -> None:
    server = _serve(start_server, tmp_path)
    before = _generations(server)
    limits: Any = {"max_retries": 0, "timeout": 120}
    async with openai.AsyncOpenAI(
        base_url=f"{server.client.base_url}/v1", api_key="unused", **limits
    ) as typed:
        client: Any = typed
        answers = await asyncio.gather(
            *(client.chat.completions.create(model=server.model, **ASK) for _ in range(1_000))
        )
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert _generations(server) == before + 1

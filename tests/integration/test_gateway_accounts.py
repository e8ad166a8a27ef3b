"""Keys, limits, budgets and the ledger over HTTP: what clients saw is what the accounts add up to."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.integration.gateway_harness import ADMIN, NEVER_S, Process, backends, bearer, gateway
from tests.mock_upstream import MockUpstream, Script

TEN_WORDS = "one two three four five six seven eight nine ten"


async def test_keys_are_made_changed_and_revoked_while_requests_run(tmp_path: Path) -> None:
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        assert (await gw.client.post("/admin/keys", json={"name": "k"})).status_code == 401
        made = await gw.client.post("/admin/keys", json={"name": "k", "team": "red"}, headers=ADMIN)
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        key, key_id = made.json()["key"], made.json()["id"]
        assert (await gw.chat()).status_code == 401
        assert (await gw.chat(headers=bearer(key))).status_code == 200
        assert (await gw.chat(headers={"x-api-key": key})).status_code == 200
        # An admin's key administers and no more; a user's does everything else.
        assert (await gw.chat(headers=ADMIN)).status_code == 403
        assert (await gw.client.get("/admin/keys", headers=bearer(key))).status_code in (401, 403)
        listed = await gw.client.get("/admin/keys", headers=ADMIN)
        assert key not in listed.text
        rotated = await gw.client.post(f"/admin/keys/{key_id}/rotate", json={"grace": "1h"}, headers=ADMIN)
        assert rotated.status_code == 200
        new = rotated.json()["key"]
        assert [(await gw.chat(headers=bearer(each))).status_code for each in (key, new)] == [200, 200]
        assert rotated.json()["id"] == key_id
        gone = await gw.client.delete(f"/admin/keys/{key_id}", headers=ADMIN)
        assert gone.status_code == 200, gone.text
        for each in (key, new):  # known to all gateways within two seconds
            answer = await gw.chat(headers=bearer(each))
            while answer.status_code == 200:
                answer = await gw.chat(headers=bearer(each))
            assert answer.json()["error"]["code"] == "key_revoked"
        assert {record.caller.team for record in gw.records} == {"red"}


async def test_a_key_may_use_its_models_alone(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        sections = backends(a={"mock": mock, "models": ["m", "secret"]})
        async with gateway(tmp_path, backends=sections) as gw:
            key = bearer((await gw.create_key(models=["m"]))["key"])
            assert (await gw.chat(headers=key)).status_code == 200
            refused = await gw.chat(headers=key, model="secret")
            assert refused.status_code == 403
            assert "'m'" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("limits", "status", "word"),
    [
        ({"requests_per_minute": 3}, 429, "requests_per_minute"),
        ({"tokens_per_minute": 100}, 429, "tokens_per_minute"),
        ({"tokens_per_day": 100}, 429, "tokens_per_day"),
        ({"tokens_per_month": 100}, 429, "tokens_per_month"),
        ({"usd_per_day": 0.0001}, 402, "usd_per_day"),
        ({"usd_per_month": 0.0001}, 402, "usd_per_month"),
    ],
)
async def test_a_limit_names_itself_and_is_never_passed(
    tmp_path: Path, limits: dict[str, float], status: int, word: str
) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(text=TEN_WORDS)
        async with gateway(tmp_path, backends=backends(a=mock)) as gw:
            headers = bearer((await gw.create_key(limits=limits))["key"])
            asked = [gw.chat("a b c", headers=headers, max_tokens=10, temperature=1) for _ in range(20)]
            answers = await asyncio.gather(*asked)
            refused = [answer for answer in answers if answer.status_code != 200]
            assert {answer.status_code for answer in refused} == {status}
            assert 0 < len(answers) - len(refused) < 20
            for answer in refused:
                message = answer.json()["error"]["message"]
                assert any(part in message for part in (word, word.replace("_", " "))), message
                assert int(answer.headers["retry-after"]) >= 1
            [row] = await gw.usage(cause="")
            used = {
                "requests_per_minute": row["requests"],
                "usd_per_day": row["cost_usd"],
                "usd_per_month": row["cost_usd"],
            }.get(word, row["fresh_tokens"] + row["output_tokens"])
            assert used <= next(iter(limits.values()))


async def test_concurrency_is_given_back(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(text="fine", first_delay_s=0.2)
        async with gateway(tmp_path, backends=backends(a=mock)) as gw:
            headers = bearer((await gw.create_key(limits={"concurrency": 2}))["key"])
            answers = await asyncio.gather(*(gw.chat(f"{number}", headers=headers) for number in range(5)))
            assert Counter(answer.status_code for answer in answers) == {200: 2, 429: 3}
            assert (await gw.chat(headers=headers)).status_code == 200


async def test_a_team_shares_its_limits(tmp_path: Path) -> None:
    teams = {"red": {"limits": {"requests_per_minute": 3}}}
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock), teams=teams) as gw:
        keys = [bearer((await gw.create_key(team="red"))["key"]) for _ in range(2)]
        alone = bearer((await gw.create_key())["key"])
        statuses = [(await gw.chat(headers=keys[number % 2])).status_code for number in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        assert (await gw.chat(headers=alone)).status_code == 200


async def test_a_cheaper_model_answers_when_a_budget_runs_low(tmp_path: Path) -> None:
    routes = {"chat": {"targets": [{"model": "m"}], "degrade": {"to": "cheap", "below": 0.5}}}
    prices = {"m": {"input": 1.0, "output": 100.0}, "cheap": {"input": 0.0, "output": 0.0}}
    async with MockUpstream() as mock:
        mock.default = Script(text=TEN_WORDS)
        sections = backends(a={"mock": mock, "models": ["m", "cheap"], "prices": prices})
        async with gateway(tmp_path, backends=sections, routes=routes) as gw:
            # An answer costs a thousandth of a dollar.
            headers = bearer((await gw.create_key(limits={"usd_per_day": 0.004}))["key"])
            asked: list[Any] = []
            for number in range(8):
                asked.append(await gw.chat(f"{number}", model="chat", headers=headers, max_tokens=10))
            assert {answer.status_code for answer in asked} == {200}
            used = [answer.headers["x-stockpot-model"] for answer in asked]
            assert used[0] == "m"
            assert used[-1] == "cheap"
            assert used == sorted(used, reverse=True)
            [notice] = asked[-1].json()["stockpot"]["notices"][:1]
            assert "budget" in notice["detail"]


async def test_the_ledger_knows_whose_and_what_for(tmp_path: Path) -> None:
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        made = await gw.create_key(team="red", tags=["blue"])
        headers = {
            **bearer(made["key"]),
            "x-stockpot-session": "s1",
            "x-stockpot-task": "t/1",
            "x-stockpot-tags": "green, yellow",
            "x-request-id": "mine",
        }
        assert (await gw.chat(headers=headers, user="ann")).status_code == 200
        record = await gw.record()
        caller = record.caller
        assert (caller.key_id, caller.team, caller.tags) == (made["id"], "red", ("blue", "green", "yellow"))
        assert (record.session, record.task, record.user) == ("s1", "t/1", "ann")
        assert record.client_request_id == "mine"
        for by, values in (("team", {"red"}), ("tag", {"blue", "green", "yellow"}), ("session", {"s1"})):
            assert {row[by] for row in await gw.usage(by)} == values
        said = await gw.client.post(
            "/v1/tasks/t/1/outcome", json={"outcome": "success"}, headers=bearer(made["key"])
        )
        assert said.status_code == 200, said.text
        stranger = bearer((await gw.create_key())["key"])
        foreign = await gw.client.post("/v1/tasks/t/1/outcome", json={"outcome": "failure"}, headers=stranger)
        assert foreign.status_code == 404
        [task] = await gw.usage(tasks="true")
        assert (task["tasks"], task["succeeded"], task["failed"]) == (1, 1, 0)
        assert task["usd_per_success"] == pytest.approx(record.cost.nanousd / 1e9)


async def test_usage_adds_up_to_what_clients_saw(tmp_path: Path) -> None:
    """Through the command, from the database of a server that has ended."""
    seen: Counter[str] = Counter()
    async with MockUpstream() as mock:
        mock.default = Script(cached_tokens=2)
        async with gateway(tmp_path, backends=backends(a=mock)) as gw:

            async def one(number: int) -> None:
                text = " ".join(["word"] * (3 + number))
                if number % 2:
                    stream = await gw.stream(text, stream_options={"include_usage": True})
                    usage = stream.events[-1]["usage"]
                    seen["cost"] += round(stream.events[-1]["stockpot"]["cost_usd"] * 1e9)
                else:
                    answer = (await gw.chat(text)).json()
                    usage = answer["usage"]
                    seen["cost"] += round(answer["stockpot"]["cost_usd"] * 1e9)
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                seen["requests"] += 1
                seen["cached"] += cached
                seen["fresh"] += usage["prompt_tokens"] - cached
                seen["output"] += usage["completion_tokens"]

            await asyncio.gather(*(one(number) for number in range(30)))
        command = Process(tmp_path, backends=backends(a=mock))
        [total] = json.loads(await command.command("usage", "--format", "json"))
        assert total["requests"] == seen["requests"] == 30
        assert (total["fresh_tokens"], total["cached_tokens"]) == (seen["fresh"], seen["cached"])
        assert total["output_tokens"] == seen["output"]
        assert round(total["cost_usd"] * 1e9) == seen["cost"] > 0


async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    async with (
        MockUpstream() as mock,
        Process(tmp_path, backends=backends(a=mock)) as server,
        httpx2.AsyncClient(base_url=server.url, timeout=NEVER_S) as http,
    ):
        hello = {"model": "m", "messages": [{"role": "user", "content": "hello there"}]}
        mock.scripts.extend([Script(status=400), Script(text="a b c")])
        for status in (400, 200):
            answer = await http.post("/v1/chat/completions", json=hello)
            assert answer.status_code == status
        lines = (await http.get("/metrics")).text.splitlines()
        counted = [line for line in lines if line.startswith("stockpot_")]
        assert any('cause="invalid_request"' in line and line.endswith(" 1.0") for line in counted), lines
        assert any('backend="a"' in line for line in counted)

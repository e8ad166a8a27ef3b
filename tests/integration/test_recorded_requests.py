"""Requests are kept as they were sent, for administrators alone: in memory, and in a file if one is set."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
from tests.integration.gateway_harness import ADMIN, backends, bearer, gateway, until
from tests.mock_upstream import MockUpstream, Script

from stockpot.accounts.audit import AuditLog

CACHED = {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


async def test_a_request_is_kept_as_it_was_sent(tmp_path: Path) -> None:
    file = tmp_path / "asked" / "requests.jsonl"
    body = '{ "messages" : [{"content":"caf\\u00e9","role":"user"}],\n "model":"m" }'
    async with (
        MockUpstream() as mock,
        gateway(tmp_path, backends=backends(a=mock), telemetry={"recording": {"path": str(file)}}) as gw,
    ):
        mock.default = Script(text="yes", usage=CACHED)
        async with httpx2.AsyncClient() as client:
            headers = {"content-type": "application/json", "x-stockpot-session": "s1"}
            url = f"{gw.url}/v1/chat/completions"
            answer = (await client.post(url, content=body, headers=headers)).json()
            await client.post(url, content="{}", headers=headers)  # was not understood: is not kept
            await gw.record()
            told = (await client.get(f"{gw.url}/admin/requests", headers=ADMIN)).content
        recording = gw.serving.recording
        assert recording is not None
        await until(lambda: recording.stats.written == 1)
    assert body.encode() in told
    (kept,) = json.loads(told)["requests"]
    assert kept["request_id"] == answer["id"]
    assert (kept["shape"], kept["backend"], kept["session"]) == ("openai-chat", "a", "s1")
    assert (kept["prompt_tokens"], kept["cached_tokens"]) == (10, 4)
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["body"] == json.loads(body)
    assert body.replace("\n", " ") in line
    assert file.stat().st_mode & 0o077 == 0


async def test_others_neither_read_nor_are_recorded_by_default(tmp_path: Path) -> None:
    access = {"admin_key": "the-admin-key", "tenants": {"ann": {"key": "the-key-of-ann"}}}
    async with MockUpstream() as mock, httpx2.AsyncClient() as client:
        async with gateway(tmp_path, backends=backends(a=mock), access=access) as gw:
            url = f"{gw.url}/admin/requests"
            assert (await client.get(url)).status_code == 401
            assert (await client.get(url, headers=bearer("the-key-of-ann"))).status_code == 403
            answer = await client.get(url, headers=ADMIN)
            assert answer.status_code == 501
            assert "telemetry.recording.mode" in answer.json()["error"]["message"]
        recording = {"mode": "on"}
        async with gateway(
            tmp_path, backends=backends(a=mock), access=access, telemetry={"recording": recording}
        ) as gw:
            await gw.chat("hello", headers=bearer("the-key-of-ann"))
            await gw.record()
            url = f"{gw.url}/admin/requests"
            (kept,) = (await client.get(f"{url}?tenant=ann", headers=ADMIN)).json()["requests"]
            assert kept["tenant"] == "ann"
            assert (await client.get(f"{url}?tenant=bob", headers=ADMIN)).json() == {"requests": []}
            assert (await client.get(f"{url}?limit=0", headers=ADMIN)).status_code == 400
            accounts = gw.serving.accounts
            assert accounts is not None
            assert isinstance(accounts.audit, AuditLog)
            assert "requests.read" in {entry.action for entry in accounts.audit.entries()}

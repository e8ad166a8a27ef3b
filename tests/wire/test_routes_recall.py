"""/v1/feedback and /admin/recall/...: what is told, taken out and learnt, by whom, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.integration.gateway_harness import ADMIN, Gateway, backends, bearer, gateway, until
from tests.mock_upstream import MockUpstream
from tests.recall.kept import make_entry

from stockpot.backends.fake import FakeBackend
from stockpot.recall.recall import Recall

ACCESS = {
    "admin_key": "the-admin-key",
    "tenants": {"ann": {"key": "the-key-of-ann"}, "bob": {"key": "the-key-of-bob"}},
}
ANN, BOB = bearer("the-key-of-ann"), bearer("the-key-of-bob")
EXACT: dict[str, Any] = {"exact": True}
MEANING: dict[str, Any] = {"sampled": True, "semantic": {"mode": "on", "audit_share": 0}}
ASKED, AGAIN = "How do I reset my password?", "how do i reset my password"


@asynccontextmanager
async def served(folder: Path, recall: dict[str, Any], **sections: Any) -> AsyncGenerator[Gateway]:
    """A gateway whose tenants are ann and bob."""
    async with MockUpstream() as mock:
        sections.setdefault("access", ACCESS)
        async with gateway(folder, recall=recall, backends=backends(a=mock), **sections) as gw:
            yield gw


def recall_of(gw: Gateway) -> Recall:
    assert gw.serving.recall is not None
    return gw.serving.recall


async def asked(gw: Gateway, text: str, headers: dict[str, str], **fields: Any) -> tuple[str, str, str]:
    """What recall did of a request, the entry that has its answer, and the request's id."""
    answer = await gw.chat(text, headers=headers, **fields)
    assert answer.status_code == 200, answer.text
    told = answer.json()["stockpot"]["recall"]
    return told["outcome"], told.get("entry", ""), answer.json()["id"]


async def hit_by_meaning(gw: Gateway, headers: dict[str, str]) -> tuple[str, str]:
    """The entry and the id of a request that was answered with it, though it is put in other words."""
    semantic = recall_of(gw).semantic
    assert semantic is not None
    await asked(gw, ASKED, headers)
    await until(lambda: len(semantic.index) > 0)
    outcome, entry, request_id = await asked(gw, AGAIN, headers)
    assert outcome == "semantic"
    return entry, request_id


def answered(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx2.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code
    return response.json()["error"]["message"]


async def say(gw: Gateway, headers: dict[str, str], verdict: str, **about: str) -> httpx2.Response:
    return await gw.client.post("/v1/feedback", json={"verdict": verdict, **about}, headers=headers)


async def admin(gw: Gateway, path: str = "") -> httpx2.Response:
    return await gw.client.get(f"/admin/recall{path}", headers=ADMIN)


async def invalidate(gw: Gateway, **what: Any) -> httpx2.Response:
    return await gw.client.post("/admin/recall/invalidate", json=what, headers=ADMIN)


async def test_the_report_counts(tmp_path: Path) -> None:
    async with served(tmp_path, EXACT) as gw:
        for _ in range(3):
            await asked(gw, "hello", ANN, temperature=0)
        await asked(gw, "hello", ANN)  # drawn at random
        report = answered(await admin(gw))
    assert report["hits"] == {"exact": 2, "semantic": 0}
    assert (report["lookups"], report["misses"], report["bypassed"]) == (3, 1, 1)
    assert report["hit_share"] == pytest.approx(2 / 3)
    assert report["reasons"] == {"not_kept": 1, "sampled": 1}
    assert report["kept"] == 1
    assert report["saved"]["prompt_tokens"] > 0
    assert report["saved"]["usd"] > 0
    assert report["store"]["reachable"]
    assert report["semantic"] is None
    assert report["since"] <= report["now_s"]


async def test_entries_are_listed_and_shown(tmp_path: Path) -> None:
    async with served(tmp_path, EXACT) as gw:
        _, of_ann, _ = await asked(gw, "one", {**ANN, "x-stockpot-recall-tags": "b,a"}, temperature=0)
        _, of_bob, _ = await asked(gw, "two", BOB, temperature=0)
        listed = answered(await admin(gw, "/entries"))["entries"]
        assert [(each["id"], each["tenant"]) for each in listed] == [(of_bob, "bob"), (of_ann, "ann")]
        assert listed[1]["tags"] == ["a", "b"]
        assert len(answered(await admin(gw, "/entries?limit=1"))["entries"]) == 1
        (only,) = answered(await admin(gw, "/entries?tenant=ann"))["entries"]
        assert only["id"] == of_ann
        shown = answered(await admin(gw, f"/entries/{of_ann}"))
        assert shown["answer"] == "one"
        assert shown["writer"] == "ann"
        assert 0 < shown["expires_in_s"] <= 86_400
        for unknown in ("0" * 32, "nonsense", "A" * 32):
            refused(await admin(gw, f"/entries/{unknown}"), 404, "unknown_entry")


async def test_a_damaged_answer_is_said_to_be_one(tmp_path: Path) -> None:
    async with served(tmp_path, EXACT) as gw:
        store = recall_of(gw).store
        entry = make_entry(1, gw.serving.clock.wall(), answer=b"forty-two")
        store.put(entry)
        assert answered(await admin(gw, f"/entries/{entry.id}"))["answer"].startswith("(")


async def test_invalidation_takes_what_fits_and_nothing_else(tmp_path: Path) -> None:
    async with served(tmp_path, EXACT) as gw:

        async def fill() -> str:
            await asked(gw, "one", {**ANN, "x-stockpot-recall-tags": "law"}, temperature=0)
            await asked(gw, "two", ANN, temperature=0)
            return (await asked(gw, "three", BOB, temperature=0))[1]

        entry = await fill()
        for what, removed in (
            ({"tag": "law"}, 1),
            ({"tag": "law", "tenant": "bob"}, 0),
            ({"id": entry}, 1),
            ({"model": "m", "tenant": "ann"}, 2),
            ({"writer": "bob"}, 1),
            ({"before": 1.0}, 0),
            ({"tenant": ""}, 0),
            ({"everything": True}, 3),
        ):
            await fill()
            assert answered(await invalidate(gw, **what)) == {"removed": removed}, what
        assert gw.serving.accounts is not None
        log = [each for each in gw.serving.accounts.audit.entries() if each.action == "recall.invalidate"]
        assert len(log) == 8
        assert '{"everything":true}' in [each.detail for each in log]


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"everything": False},
        {"everything": True, "tag": "law"},
        {"tags": "law"},
        {"id": "short"},
        {"tag": ""},
        {"before": -1},
        {"before": "yesterday"},
        {"tenant": "No Such Name"},
    ],
)
async def test_half_of_what_was_meant_is_not_done(tmp_path: Path, what: dict[str, Any]) -> None:
    async with served(tmp_path, EXACT) as gw:
        await asked(gw, "one", ANN, temperature=0)
        assert (await invalidate(gw, **what)).status_code == 400
        assert (await asked(gw, "one", ANN, temperature=0))[0] == "exact"


async def test_administration_is_for_administrators(tmp_path: Path) -> None:
    async with served(tmp_path, EXACT) as gw:
        _, entry, _ = await asked(gw, "one", ANN, temperature=0)
        for path in ("", "/entries", f"/entries/{entry}"):
            assert (await gw.client.get(f"/admin/recall{path}", headers=ANN)).status_code == 403
        body = {"everything": True}
        told = await gw.client.post("/admin/recall/invalidate", json=body, headers=ANN)
        assert told.status_code == 403
        assert (await say(gw, ADMIN, "wrong", entry=entry)).status_code == 403
        assert (await asked(gw, "one", ANN, temperature=0))[0] == "exact"


async def test_a_wrong_answer_is_given_no_more(tmp_path: Path) -> None:
    async with served(tmp_path, EXACT) as gw:
        _, entry, made = await asked(gw, "one", ANN, temperature=0)
        _, _, request_id = await asked(gw, "one", ANN, temperature=0)
        refused(await say(gw, ANN, "wrong", request_id=made), 404, "unknown_entry")  # made, not given
        done = answered(await say(gw, ANN, "right", request_id=request_id))
        assert done == {"entry": entry, "removed": False, "learnt": False}
        done = answered(await say(gw, ANN, "wrong", request_id=request_id))
        assert done == {"entry": entry, "removed": True, "learnt": False}
        refused(await say(gw, ANN, "wrong", request_id=request_id), 404, "unknown_entry")
        assert (await asked(gw, "one", ANN, temperature=0))[0] == "miss"
        assert answered(await admin(gw))["feedback"] == {"right": 1, "wrong": 1}


async def test_others_answers_are_not_known(tmp_path: Path) -> None:
    async with served(tmp_path, EXACT) as gw:
        await asked(gw, "one", ANN, temperature=0)
        _, entry, request_id = await asked(gw, "one", ANN, temperature=0)
        unknown = refused(await say(gw, BOB, "wrong", entry="0" * 32), 404, "unknown_entry")
        assert refused(await say(gw, BOB, "wrong", entry=entry), 404, "unknown_entry") == unknown
        assert refused(await say(gw, BOB, "wrong", request_id=request_id), 404, "unknown_entry") == unknown
        assert (await asked(gw, "one", ANN, temperature=0))[0] == "exact"


async def test_an_untrusted_key_cannot_take_out_what_the_tenant_has(tmp_path: Path) -> None:
    recall = {**EXACT, "untrusted_tags": ["guest"]}
    async with served(tmp_path, recall, access={"admin_key": "the-admin-key"}) as gw:
        staff = bearer((await gw.create_key(team="red"))["key"])
        guest = bearer((await gw.create_key(team="red", tags=["guest"]))["key"])
        _, shared, _ = await asked(gw, "one", staff, temperature=0)
        outcome, entry, request_id = await asked(gw, "one", guest, temperature=0)
        assert (outcome, entry) == ("exact", shared)
        for about in ({"entry": shared}, {"request_id": request_id}):
            assert not answered(await say(gw, guest, "wrong", **about))["removed"]
        assert (await asked(gw, "one", staff, temperature=0))[0] == "exact"
        _, own, _ = await asked(gw, "two", guest, temperature=0)
        refused(await say(gw, staff, "wrong", entry=own), 404, "unknown_entry")
        assert answered(await say(gw, guest, "wrong", entry=own))["removed"]
        assert answered(await admin(gw))["feedback"]["wrong"] == 3


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"verdict": "wrong"},
        {"verdict": "wrong", "entry": "0" * 32, "request_id": "chatcmpl-1"},
        {"verdict": "bad", "entry": "0" * 32},
        {"verdict": "wrong", "entry": "0" * 31},
        {"verdict": "wrong", "request_id": ""},
        {"verdict": "wrong", "request_id": 7},
        {"verdict": "wrong", "entry": "0" * 32, "scope": "bob"},
    ],
)
async def test_feedback_that_says_nothing_is_refused(tmp_path: Path, body: dict[str, Any]) -> None:
    async with served(tmp_path, EXACT) as gw:
        told = await gw.client.post("/v1/feedback", json=body, headers=ANN)
        assert told.status_code == 400, told.text


async def test_feedback_on_an_answer_given_by_meaning_teaches(tmp_path: Path) -> None:
    async with served(tmp_path, MEANING) as gw:
        entry, request_id = await hit_by_meaning(gw, ANN)
        done = answered(await say(gw, ANN, "right", request_id=request_id))
        assert done == {"entry": entry, "removed": False, "learnt": True}
        # Who says that an answer was right chose to: the calibration does not count it.
        report = answered(await admin(gw))
        assert report["semantic"]["observations"] == 0
        assert report["hits"] == {"exact": 0, "semantic": 1}
        done = answered(await say(gw, ANN, "wrong", request_id=request_id))
        assert done == {"entry": entry, "removed": True, "learnt": True}
        told = answered(await admin(gw))["semantic"]
        assert told["mode"] == "on"
        assert told["given"] == 1
        assert 0 < told["estimated_error"] < 0.01
        kept = await recall_of(gw).store.observations()
        assert [(each.same, each.source, each.writer) for each in kept] == [
            (True, "feedback", "ann"),
            (False, "feedback", "ann"),
        ]
        assert (await asked(gw, AGAIN, ANN))[0] == "miss"


async def test_with_a_writers_entries_goes_what_was_learnt_from_it(tmp_path: Path) -> None:
    async with served(tmp_path, MEANING) as gw:
        _, request_id = await hit_by_meaning(gw, ANN)
        answered(await say(gw, ANN, "wrong", request_id=request_id))
        assert answered(await admin(gw))["semantic"]["observations"] == 1
        answered(await invalidate(gw, writer="bob"))
        assert answered(await admin(gw))["semantic"]["observations"] == 1
        answered(await invalidate(gw, writer="ann"))
        assert answered(await admin(gw))["semantic"]["observations"] == 0
        assert not await recall_of(gw).store.observations()


async def test_where_nothing_is_kept_that_is_said(tmp_path: Path) -> None:
    async with gateway(tmp_path, engine=FakeBackend()) as gw:
        for path in ("", "/entries", f"/entries/{'0' * 32}"):
            assert "recall.exact" in refused(await admin(gw, path), 501, "no_recall")
        refused(await invalidate(gw, everything=True), 501, "no_recall")
        refused(await say(gw, {}, "wrong", entry="0" * 32), 501, "no_recall")


async def test_a_query_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, EXACT) as gw:
        for query in ("?what=1", "/entries?limit=0", "/entries?limit=1&limit=2", "/entries?tenant=A%20B"):
            assert (await admin(gw, query)).status_code == 400, query

"""`stockpot recall` as a person types it, against a gateway that keeps answers, and against others."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.integration.gateway_harness import NEVER_S, Gateway, backends, bearer, gateway, until
from tests.mock_upstream import MockUpstream, Script
from typer.testing import CliRunner

from stockpot.backends.fake import FakeBackend
from stockpot.cli import recall
from stockpot.cli.admin_client import AdminRefused
from stockpot.errors import ServerUnreachable

SECTIONS: dict[str, Any] = {
    "recall": {"exact": True, "sampled": True, "semantic": {"mode": "on", "audit_share": 1.0}},
    "access": {"admin_key": "the-admin-key", "tenants": {"ann": {"key": "the-key-of-ann"}}},
}
ANN = bearer("the-key-of-ann")
ASKED, AGAIN = "How do I use the \x1b[31mtag [/bold]?", "how do i use the \x1b[31mtag [/bold]"
Does = Callable[[Gateway], Coroutine[Any, Any, None]]


@contextmanager
def serving(folder: Path, first: Does | None = None, **sections: Any) -> Generator[str]:
    """The address of a gateway in a thread, for which `first` has been done. Without sections it keeps
    nothing. The first answer echoes its question, those after it say something else."""
    address: list[str] = []
    ready, over = threading.Event(), threading.Event()

    async def run() -> None:
        async with MockUpstream() as mock:
            mock.scripts.append(Script())
            mock.default = Script(text="There are 42 of them, and none is blue.")
            with_engine = "recall" not in sections
            more: dict[str, Any] = {} if with_engine else {"backends": backends(a=mock)}
            engine = FakeBackend() if with_engine else None
            async with gateway(folder, engine=engine, **sections, **more) as gw:
                if first is not None:
                    await first(gw)
                address.append(gw.url)
                ready.set()
                await asyncio.to_thread(over.wait)

    def main() -> None:
        try:
            asyncio.run(run())
        finally:
            ready.set()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    try:
        assert ready.wait(NEVER_S)
        assert address, "the gateway did not start"
        yield address[0]
    finally:
        over.set()
        thread.join(NEVER_S)
        assert not thread.is_alive()


async def one_wrong_hit(gw: Gateway) -> None:
    """An answer is kept, given to the same request, and by meaning; an audit finds that wrong."""
    kept = gw.serving.recall
    assert kept is not None
    assert kept.semantic is not None
    assert kept.learner is not None
    semantic, learner = kept.semantic, kept.learner
    await gw.chat(ASKED, headers={**ANN, "x-stockpot-recall-tags": "law"})
    await until(lambda: len(semantic.index) > 0)
    await gw.chat(ASKED, headers=ANN)
    hit = await gw.chat(AGAIN, headers=ANN)
    assert hit.headers["x-stockpot-recall"] == "semantic"
    await learner.settled()
    assert learner.counts.audited == 1


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("STOCKPOT_ADMIN_KEY", "the-admin-key")
    monkeypatch.setenv("STOCKPOT_API_KEY", "the-key-of-ann")
    app = typer.Typer()
    recall.register(app)
    app.command("other")(lambda: None)
    return app


def said(app: typer.Typer, url: str, *arguments: str, code: int = 0, keyboard: str = "") -> str:
    result = CliRunner().invoke(app, ["recall", *arguments, "--url", url], input=keyboard)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def refused(app: typer.Typer, url: str, *arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, ["recall", *arguments, "--url", url]).exception


def test_a_report_for_people_and_for_programs(app: typer.Typer, tmp_path: Path) -> None:
    with serving(tmp_path, one_wrong_hit, **SECTIONS) as url:
        output = said(app, f"{url}/v1", "report")
        figures = json.loads(said(app, url, "report", "--json"))
    for words in (
        "3 requests; not looked up: 0",  # what recall itself asks (an audit) is not counted
        "2 (66.7%): 1 to the same request, 1 by meaning",
        "1 answer, ",
        "Not given, because: nothing_near 1",
        "accepted",
        "1.00% wrong, with 95% confidence",
        "1 of 1 wrong, 100.00% (",
        "Decided by meaning: equal_form 1",
        "Wrong most often",
        "How do I use the \\x1b[31mtag [/bold]?",
    ):
        assert words in output, (words, output)
    assert "\x1b" not in output
    assert figures["hits"] == {"exact": 1, "semantic": 1}
    assert figures["semantic"]["worst"][0]["wrong"] == 1


def test_ids_are_whole_on_a_narrow_screen(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with serving(tmp_path, one_wrong_hit, **SECTIONS) as url:
        for command in ("entries", "report"):
            assert re.search(r"\b[0-9a-f]{32}\b", said(app, url, command)), command


def test_entries_listed_shown_and_taken_out(app: typer.Typer, tmp_path: Path) -> None:
    with serving(tmp_path, one_wrong_hit, **SECTIONS) as url:
        output = said(app, url, "entries")
        (entry,) = json.loads(said(app, url, "entries", "--json", "--tenant", "ann"))
        for words in (entry["id"], "ann", "How do I use the \\x1b[31mtag [/bold]?"):
            assert words in output
        assert "No answers of 'bob'" in said(app, url, "entries", "--tenant", "bob")
        shown = said(app, url, "show", entry["id"])
        for words in (f"id: {entry['id']}", "tags: law", "question:\nHow do I use", "answer:\nHow do I use"):
            assert words in shown
        assert "\x1b" not in shown
        assert json.loads(said(app, url, "show", entry["id"], "--json"))["answer"] == ASKED
        assert "0 answers taken out" in said(app, url, "invalidate", "--tag", "law", "--tenant", "bob")
        assert "1 answer taken out" in said(app, url, "invalidate", "--tag", "law")
        assert "No answers are kept." in said(app, url, "entries")
        unknown = refused(app, url, "show", entry["id"])
        assert isinstance(unknown, AdminRefused)
        assert unknown.exit_code == 1


def test_all_is_taken_out_only_when_that_is_meant(app: typer.Typer, tmp_path: Path) -> None:
    with serving(tmp_path, one_wrong_hit, **SECTIONS) as url:
        said(app, url, "invalidate", code=2)
        said(app, url, "invalidate", "--all", "--tag", "law", code=2)
        said(app, url, "invalidate", "--all", code=1, keyboard="n\n")
        assert json.loads(said(app, url, "report", "--json"))["store"]["entries"] == 1
        assert json.loads(said(app, url, "invalidate", "--all", "--yes", "--json")) == {"removed": 1}


def test_feedback_by_request_and_by_entry(app: typer.Typer, tmp_path: Path) -> None:
    requests: list[str] = []

    async def given(gw: Gateway) -> None:
        await one_wrong_hit(gw)
        answer = await gw.chat(ASKED, headers=ANN)
        requests.append(answer.json()["id"])

    with serving(tmp_path, given, **SECTIONS) as url:
        output = said(app, url, "feedback", requests[0], "right")
        entry = re.findall(r"[0-9a-f]{32}", output)[0]
        assert output == f"The answer {entry} is kept.\n"
        said(app, url, "feedback", entry, "perhaps", code=2)
        done = json.loads(said(app, url, "feedback", entry, "wrong", "--json"))
        assert done == {"entry": entry, "removed": True, "learnt": False}
        unknown = refused(app, url, "feedback", entry, "wrong")
        assert isinstance(unknown, AdminRefused)
        assert "No kept answer of yours" in str(unknown)
        nobody = refused(app, url, "feedback", entry, "wrong", "--api-key", "no-such-key")
        assert "STOCKPOT_API_KEY, or with --api-key" in str(nobody)
        assert "kept answer" not in str(nobody)


def test_a_server_that_keeps_nothing_says_how_to(app: typer.Typer, tmp_path: Path) -> None:
    with serving(tmp_path) as url:
        error = refused(app, url, "report")
    assert isinstance(error, AdminRefused)
    assert "recall.exact" in str(error)
    assert isinstance(refused(app, url, "report"), ServerUnreachable)  # it has ended

"""`stockpot doctor` as a person types it: files, a running server, all outputs, and hostile prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_recall_command import serving
from tests.integration.gateway_harness import Gateway
from typer.testing import CliRunner

from stockpot.cli.main import build
from stockpot.errors import StockpotError

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m[/bold] {{time}}"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setenv("STOCKPOT_ADMIN_KEY", "the-admin-key")


def broken_file(folder: Path, turns: int = 5) -> Path:
    """One conversation with a time on top, one without."""
    lines: list[str] = []
    for broken in (True, False):
        history: list[dict[str, str]] = []
        for turn in range(turns):
            time = f"Current time: 2026-11-25T08:{turn:02}:11Z\n" if broken else ""
            system = (
                f"{time}You are {HOSTILE if broken else 'kind'}. " + "Follow the policy of the house. " * 200
            )
            history.append({"role": "user", "content": f"{broken} question {turn}"})
            body = {"model": "gpt-5", "messages": [{"role": "system", "content": system}, *history]}
            at = 1764000000 + 60 * turn + broken
            lines.append(json.dumps({"at": at, "request_id": f"r{broken}{turn}", "body": body}))
            history.append({"role": "assistant", "content": f"answer {turn}"})
    file = folder / "requests.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def said(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(build(), ["doctor", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_table_for_people_shows_the_cause_the_place_and_the_patch(tmp_path: Path) -> None:
    output = said(broken_file(tmp_path))
    for words in (
        "10 requests in 2 conversations",
        "timestamp",
        "messages[].content",
        "context.fact('time', ...)",
        "-Current time: {time}",
        "+Current time: {time}",
        "requests.jsonl:",
    ):
        assert words in output, words
    assert "\x1b" not in output
    assert "$" in output


def test_json_and_each_break_as_a_line(tmp_path: Path) -> None:
    breaks = tmp_path / "breaks.jsonl"
    report = json.loads(said(broken_file(tmp_path), "--json", "--breaks", breaks))
    assert report["requests"] == 10
    assert [each["cause"] for each in report["causes"]] == ["timestamp"]
    assert report["causes"][0]["count"] == 4
    assert 0.3 < report["hit_ratio"] < report["possible_ratio"] <= 1
    assert report["usd_lost"] > 0
    lines = [json.loads(line) for line in breaks.read_text().splitlines()]
    assert [line["cause"] for line in lines] == ["timestamp"] * 4
    assert lines[0]["path"] == "messages[0].content"
    assert lines[0]["character"] == len("Current time: 2026-11-25T08:0")


def test_a_page_that_runs_and_loads_nothing(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    said(broken_file(tmp_path), "--html", page)
    text = page.read_text()
    assert "<script" not in text.lower()
    assert "<img" not in text
    assert "default-src 'none'" in text
    assert text.count("<svg") == 2
    assert "&lt;/script&gt;" in text


def test_sarif_has_what_its_specification_requires(tmp_path: Path) -> None:
    file = tmp_path / "report.sarif"
    source = broken_file(tmp_path)
    said(source, "--sarif", file)
    log = json.loads(file.read_text())
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"]
    assert len({rule["id"] for rule in rules}) == len(rules) >= 20
    assert len(run["results"]) == 4
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == "timestamp"
        assert result["message"]["text"]
        (location,) = result["locations"]
        region = location["physicalLocation"]["region"]
        assert 1 <= region["startLine"] <= 10
        assert location["physicalLocation"]["artifactLocation"]["uri"] == str(source)


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("hit<0.9", 1),
        ("hit<90%", 1),
        ("hit<0.1", 0),
        ("timestamp>0", 1),
        ("uuid>0", 0),
        ("tokens_lost>=1", 1),
    ],
)
def test_a_check_fails_where_a_condition_holds(tmp_path: Path, condition: str, code: int) -> None:
    output = said(broken_file(tmp_path), "--fail-on", condition, code=code)
    assert ("failed: " in output) == bool(code)


def test_what_is_wrongly_asked_is_said(tmp_path: Path) -> None:
    said(code=2)
    said("--live", broken_file(tmp_path), code=2)
    for arguments, words in (
        (("--fail-on", "hits<1"), "is no condition"),
        (("--html", tmp_path / "absent" / "x.html"), "cannot be written"),
        (("--tokenizer", tmp_path / "absent.json"), "cannot be read"),
    ):
        result = CliRunner().invoke(build(), ["doctor", str(broken_file(tmp_path)), *map(str, arguments)])
        assert isinstance(result.exception, StockpotError), result.output
        assert words in str(result.exception)
    empty = tmp_path / "empty"
    empty.write_text("nothing\n\n")
    assert "No request was found" in said(empty, code=1)


def test_the_last_requests_of_a_running_server(tmp_path: Path) -> None:
    async def talked(gw: Gateway) -> None:
        for turn in range(3):
            system: dict[str, Any] = {
                "role": "system",
                "content": f"Now: 08:{turn:02}:11. " + "Be kind and exact. " * 100,
            }
            messages = [system, {"role": "user", "content": "the same question"}]
            answer = await gw.client.post(
                "/v1/chat/completions", json={"model": "fake", "messages": messages}
            )
            assert answer.status_code == 200, answer.text

    with serving(tmp_path, talked) as url:
        output = said("--live", "--url", url, "--provider", "stockpot", "--json")
    report = json.loads(output)
    assert report["requests"] == 3
    assert [each["cause"] for each in report["causes"]] == ["timestamp"]

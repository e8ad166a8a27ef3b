"""`stockpot cache` against a server of a few lines, and against none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from typer.testing import CliRunner, Result

from stockpot.cli import cache
from stockpot.cli.admin_client import AdminRefused
from stockpot.cli.cache_words import size, span, visible
from stockpot.errors import ServerUnreachable

FIGURES: dict[str, Any] = {
    "hit_ratio": 0.75,
    "ram_used_bytes": 3 * 2**20,
    "prompt_tokens_cached": {"context": 10, "ram": 12345, "disk": 77, "redis": 0},
    "something_new": 7,
    "tenant_bytes": {"": 2048, "ann": 4096},
    "prefill_s_per_token": 0.0015,
    "tiers": {
        "disk": {
            "counts": {"name": "disk", "capacity_bytes": 2**30, "misses": {"checksum": 2}, "state": "up"},
            "speed": {"latency_s": 0.0004, "bytes_per_s": 2.0 * 2**30},
        },
        "redis": {
            "counts": {"name": "redis", "capacity_bytes": None, "misses": {}, "state": "half-open"},
            "speed": {"latency_s": 0.002, "bytes_per_s": 5.0 * 2**20},
        },
    },
}

EXPLANATION: dict[str, Any] = {
    "now_s": 1_700_000_100.0,
    "request": "chatcmpl-1",
    "client_request": "mine",
    "tenant": "ann",
    "at_s": 1_700_000_000.0,
    "prompt_tokens": 1000,
    "found_tokens": 640,
    "found": [{"start": 0, "end": 512, "tier": "ram"}, {"start": 512, "end": 640, "tier": "disk"}],
    "divergence": {
        "position": 700,
        "request": "chatcmpl-0",
        "used_s": 1_699_999_958.0,
        "before": "What is the\n",
        "ours": " \x1b[31mcapital",
        "ours_after": " of France",
        "theirs": " population",
        "theirs_after": " of Spain",
        "our_token": 11,
        "their_token": 12,
    },
    "gaps": [
        {
            "start": 640,
            "end": 700,
            "cause": "invalidated",
            "detail": "tag law by Bea (admin key)",
            "at_s": 1_699_999_990.0,
        },
        {"start": 700, "end": 999, "cause": "never seen", "detail": "", "at_s": None},
    ],
    "tiers": [
        {
            "tier": "disk",
            "decision": "load",
            "located_tokens": 128,
            "located_bytes": 2**20,
            "loaded_tokens": 128,
            "locate_s": 0.0004,
            "load_s": 0.001,
            "compute_s": 0.1,
            "took_s": 0.0011,
            "cause": None,
            "detail": "",
        },
        {
            "tier": "redis",
            "decision": "failed",
            "located_tokens": 0,
            "located_bytes": 0,
            "loaded_tokens": 0,
            "locate_s": 0.05,
            "load_s": 0.0,
            "compute_s": 0.0,
            "took_s": 0.0,
            "cause": "timeout",
            "detail": "no answer within 50 ms",
        },
    ],
    "waited_s": 0.0517,
    "preemptions": 0,
}

LISTED = {
    "request": "chatcmpl-1",
    "client_request": "",
    "tenant": "ann",
    "at_s": 1_700_000_000.0,
    "prompt_tokens": 1000,
    "found_tokens": 640,
    "first_cause": "evicted: capacity",
}

ENTRY: dict[str, Any] = {
    "id": "00ff",
    "tokens": 1234,
    "bytes": 5 * 2**20,
    "tenant": "ann",
    "tags": ["document:handbook"],
    "used_s": 1_700_000_040.0,
    "created_s": 1_700_000_000.0,
    "kept_until_s": 1_700_000_400.0,
    "pins": 0,
    "hits": 3,
    "request": "chatcmpl-1",
    "begins": "Once upon\na time",
    "ends": "ever after.",
}
PIN = {"pin": "ab12", "owner": "Bea", "tokens": 512, "bytes": 2**20, "expires_s": 1_700_007_300.0}

ANSWERS: dict[str, Any] = {
    "GET stats": FIGURES,
    "GET entries?limit=20": {"now_s": 1_700_000_100.0, "entries": [ENTRY]},
    "GET entries?limit=5&tenant=": {"now_s": 1_700_000_100.0, "entries": []},
    "GET explain?count=20": {"now_s": 1_700_000_100.0, "requests": [LISTED]},
    "GET explain?count=3": {"now_s": 1_700_000_100.0, "requests": []},
    "GET explain/chatcmpl-1": EXPLANATION,
    "GET pins": {"now_s": 1_700_000_100.0, "pins": [PIN]},
    "POST pins": {"now_s": 1_700_000_100.0, "prefix_tokens": 600, **PIN},
    "DELETE pins/ab12": {"pin": "ab12", "unpinned": True},
    "POST invalidate": {"epoch": 42, "pending": True, "blocks": 3, "kind": "tag"},
    "POST warm": {"prompt_tokens": 100, "cached_tokens": 40, "seconds": 0.5},
    "POST verify": {"checked": 4, "sound": 2, "refused": {"checksum": 1, "invalidated": 1}, "seconds": 0.01},
    "POST export": {"folder": "/exported", "blocks": 4, "bytes": 2**21, "not_written": 1},
}


@dataclass
class Recorder:
    """What reached the server: (method and path, key, body)."""

    calls: list[tuple[str, str, Any]] = field(default_factory=list[tuple[str, str, Any]])
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict[str, tuple[int, Any]])
    """Answers of one test, instead of the usual ones."""

    @property
    def bodies(self) -> list[Any]:
        return [body for _, _, body in self.calls]


class _Server(HTTPServer):
    recorder: Recorder


class _Handler(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        recorder = cast(_Server, self.server).recorder
        size_bytes = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(size_bytes)) if size_bytes else None
        prefix = "/admin/cache/"
        call = f"{self.command} {self.path.removeprefix(prefix)}" if self.path.startswith(prefix) else ""
        recorder.calls.append((call, self.headers.get("authorization", ""), body))
        status, answer = recorder.answers.get(call, (200, ANSWERS.get(call)))
        if answer is None:
            status, text = 404, b"nothing here"
        else:
            text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - the names http.server looks for

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Generator[_Server, None, None]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def recorder(server: _Server) -> Recorder:
    server.recorder = Recorder()
    return server.recorder


@pytest.fixture
def url(server: _Server, recorder: Recorder) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setenv("COLUMNS", "180")
    app = typer.Typer()
    cache.register(app)
    # With another command beside it, `cache` is spelled out, as in the whole command line.
    app.command("other")(lambda: None)
    return app


def run(app: typer.Typer, url: str, *arguments: str, keyboard: str = "") -> Result:
    return CliRunner().invoke(app, ["cache", *arguments, "--url", url], input=keyboard)


def said(app: typer.Typer, url: str, *arguments: str, code: int = 0) -> str:
    result = run(app, url, *arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_table_explains_the_figures(app: typer.Typer, url: str) -> None:
    output = said(app, f"{url}/v1", "stats")
    for words in ("75.0%", "3.0 MiB", "12,345", "brought back from RAM", "something_new", "1.5 ms"):
        assert words in output
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert "disk: blocks it did not give, because: checksum" in lines["tiers.disk.counts.misses.checksum"]
    assert "2.00 GiB/s" in lines["tiers.disk.speed.bytes_per_s"]
    assert "half-open" in lines["tiers.redis.counts.state"]
    assert "4.0 KiB" in lines["tenant_bytes.ann"]
    assert "of the tenant ann" in lines["tenant_bytes.ann"]
    assert "nobody" in lines["tenant_bytes."]
    # A tier's figures stand together.
    tiers = [name.split(".")[1] for name in lines if name.startswith("tiers.")]
    assert tiers == sorted(tiers)


@pytest.mark.parametrize(
    ("command", "figures"),
    [
        (["stats"], FIGURES),
        (["list"], [ENTRY]),
        (["explain"], [LISTED]),
        (["explain", "chatcmpl-1"], EXPLANATION),
        (["pins"], [PIN]),
        (["unpin", "ab12"], ANSWERS["DELETE pins/ab12"]),
        (["pin", "--text", "a"], ANSWERS["POST pins"]),
        (["invalidate", "tag", "law"], ANSWERS["POST invalidate"]),
        (["export", "/exported"], ANSWERS["POST export"]),
    ],
)
def test_json_is_what_the_server_said(app: typer.Typer, url: str, command: list[str], figures: Any) -> None:
    assert json.loads(said(app, url, *command, "--json")) == figures


def test_a_list_of_prefixes(app: typer.Typer, url: str) -> None:
    output = said(app, url, "list")
    for words in ("1,234", "5.0 MiB", "60 s ago", "5 min", "handbook", "Once upon⏎a time", "ever after."):
        assert words in output
    assert "Nothing is in RAM" in said(app, url, "list", "--limit", "5", "--tenant", "")


def test_a_list_of_requests(app: typer.Typer, url: str) -> None:
    output = said(app, url, "explain")
    for words in ("chatcmpl-1", "100 s ago", "640", "evicted because the tier was full"):
        assert words in output
    assert "No request" in said(app, url, "explain", "--count", "3")


def test_an_explanation_is_a_story(app: typer.Typer, url: str) -> None:
    output = said(app, url, "explain", "chatcmpl-1")
    for words in (
        "chatcmpl-1 (its client calls it mine), of the tenant ann",
        "Of 1,000 prompt tokens 640 were found (64.0%), 360 had to be computed.",
        "It waited 51.7 ms",
        "0 to 511",
        "brought back from RAM",
        "512 to 639",
        "brought back from disk",
        "was invalidated (tag law by Bea (admin key)), 10 s before",
        "never seen here before",
        "the last token is always computed",
        "stands at position 700",
        "that of chatcmpl-0, last used 42 s before",
        "…What is the⏎[ \\x1b[31mcapital] of France…",
        "…What is the⏎[ population] of Spain…",
        "loading, estimated",
        "100.0 ms",
        "could not be loaded (timeout: no answer within 50 ms)",
    ):
        assert words in output, words
    bar = next(line for line in output.splitlines() if "▓▓" in line)
    assert (bar.count("▓"), bar.count("▒"), bar.count("·")) == (33, 8, 23)
    assert "\x1b" not in output


def test_pins(app: typer.Typer, url: str, recorder: Recorder, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text('{"messages": [{"role": "system", "content": "Be kind."}]}')
    output = said(app, url, "pin", "--messages", str(chat), "--owner", "Bea", "--for", "2h")
    assert recorder.bodies[-1] == {
        "messages": [{"role": "system", "content": "Be kind."}],
        "tenant": "",
        "owner": "Bea",
        "for": "2h",
    }
    for words in ("ab12 keeps 512 tokens, 1.0 MiB, for 2 h", "has 600", "stockpot cache unpin ab12"):
        assert words in output
    text = tmp_path / "text"
    text.write_text("Once upon a time\n")
    said(app, url, "pin", "--file", str(text), "--tenant", "ann")
    assert recorder.bodies[-1]["text"] == "Once upon a time\n"
    assert recorder.bodies[-1]["owner"]
    assert "Bea" in said(app, url, "pins")
    assert "ab12 is given back" in said(app, url, "unpin", "ab12")


def test_invalidating(app: typer.Typer, url: str, recorder: Recorder) -> None:
    output = said(app, url, "invalidate", "tag", "law", "--tenant", "ann", "--reason", "new law")
    body = recorder.bodies[-1]
    assert body.pop("by")
    assert body == {"kind": "tag", "value": "law", "tenant": "ann", "reason": "new law"}
    assert "3 blocks dropped from RAM here" in output
    assert "other servers will be told" in output
    said(app, url, "invalidate", "prefix", "--text", "Once")
    assert recorder.bodies[-1]["text"] == "Once"


def test_everything_is_invalidated_only_when_that_is_meant(
    app: typer.Typer, url: str, recorder: Recorder
) -> None:
    for keyboard in ("n\n", ""):
        assert run(app, url, "invalidate", "all", keyboard=keyboard).exit_code == 1
    assert not recorder.calls
    assert run(app, url, "invalidate", "all", keyboard="y\n").exit_code == 0
    said(app, url, "invalidate", "all", "--yes")
    assert [body["kind"] for body in recorder.bodies] == ["all", "all"]


def test_warming_goes_on_behind_a_bad_line(
    app: typer.Typer, url: str, recorder: Recorder, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "one"}', "", "nonsense", "[1]", "{}", '{"messages": [], "tenant": "bob"}']
    file.write_text("\n".join(lines))
    output = said(app, url, "warm", str(file), "--tenant", "ann", code=1)
    assert recorder.bodies == [{"tenant": "ann", "prompt": "one"}, {"tenant": "bob", "messages": []}]
    for words in (
        "Line 3 is not warmed: it is not JSON",
        "Line 4",
        "Line 5",
        "2 prompts warmed",
        "120 tokens",
    ):
        assert words in output
    found = json.loads(CliRunner().invoke(app, ["cache", "warm", str(file), "--url", url, "--json"]).stdout)
    assert (found["prompts"], found["prompt_tokens"], found["cached_tokens"]) == (2, 200, 80)
    assert [each["line"] for each in found["failed"]] == [3, 4, 5]


def test_warming_reports_what_the_server_does_not_take(
    app: typer.Typer, url: str, recorder: Recorder, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    recorder.answers["POST warm"] = (400, {"error": {"message": "Too long.", "code": "context_length"}})
    assert "Line 2 is not warmed: Too long." in said(app, url, "warm", str(file), code=1)
    recorder.calls.clear()
    recorder.answers["POST warm"] = (401, {"error": {"message": "No key.", "code": "invalid_api_key"}})
    assert isinstance(run(app, url, "warm", str(file)).exception, AdminRefused)
    assert len(recorder.calls) == 1  # the next line would be refused as well


def test_warming_a_plain_text(app: typer.Typer, url: str, recorder: Recorder, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("line one\nline two\n")
    assert "1 prompt warmed" in said(app, url, "warm", str(file), "--text")
    assert recorder.bodies == [{"tenant": "", "prompt": "line one\nline two\n"}]


def test_verifying_tells_by_its_exit_code(app: typer.Typer, url: str, recorder: Recorder) -> None:
    output = said(app, url, "verify", code=1)
    for words in ("4 blocks on disk read in 10.0 ms: 2 sound", "refused: checksum, 1 block"):
        assert words in output
    stale = {"checked": 2, "sound": 1, "refused": {"invalidated": 1}, "seconds": 0.01}
    recorder.answers["POST verify"] = (200, stale)
    said(app, url, "verify")  # what somebody invalidated is not broken


def test_exporting(app: typer.Typer, url: str, recorder: Recorder) -> None:
    output = said(app, url, "export", "/exported")
    assert "4 blocks, 2.0 MiB, are in /exported" in output
    assert "1 block could not be written" in output
    assert recorder.bodies == [{"folder": "/exported"}]


@pytest.mark.parametrize(
    "arguments",
    [
        ["pin"],
        ["pin", "--text", "a", "--file", __file__],
        ["pin", "--file", "missing"],
        ["pin", "--messages", __file__],
        ["invalidate"],
        ["invalidate", "some"],
        ["invalidate", "tag"],
        ["invalidate", "all", "value"],
        ["invalidate", "prefix"],
        ["invalidate", "prefix", "value", "--text", "a"],
        ["invalidate", "tag", "law", "--text", "a"],
        ["warm", "missing"],
        ["list", "--limit", "0"],
        ["stats", "--admin-key", "two words"],
    ],
)
def test_wrong_usage_asks_no_server(
    app: typer.Typer, url: str, recorder: Recorder, arguments: list[str]
) -> None:
    said(app, url, *arguments, code=2)
    assert not recorder.calls


def test_the_admin_key_is_sent_and_never_shown(
    app: typer.Typer, url: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    said(app, url, "stats")
    said(app, url, "stats", "--admin-key", "sesame")
    monkeypatch.setenv("STOCKPOT_ADMIN_KEY", "from-env")
    said(app, url, "pins")
    assert [key for _, key, _ in recorder.calls] == ["", "Bearer sesame", "Bearer from-env"]
    assert "from-env" not in said(app, url, "pins", "--help")
    recorder.answers["GET pins"] = (401, {"error": {"message": "Wrong key.", "code": "invalid_api_key"}})
    assert "from-env" not in str(run(app, url, "pins").exception)


@pytest.mark.parametrize(
    ("status", "exit_code", "words"),
    [
        (401, 2, "Its own words. Here: in the environment as STOCKPOT_ADMIN_KEY"),
        (403, 2, "--admin-key"),
        (404, 1, "Its own words."),
        (400, 2, "Its own words."),
        (429, 69, "Its own words."),
        (501, 69, "Its own words."),
    ],
)
def test_what_the_server_refuses(  # noqa: PLR0917 - fixtures and cases
    app: typer.Typer, recorder: Recorder, url: str, status: int, exit_code: int, words: str
) -> None:
    answer = {"error": {"message": "Its own words.", "code": "a_code"}}
    recorder.answers["DELETE pins/a%2Fb"] = (status, answer)
    error = run(app, url, "unpin", "a/b").exception
    assert isinstance(error, AdminRefused)
    assert (error.exit_code, error.status) == (exit_code, status)
    assert words in str(error)


def test_nobody_answers(app: typer.Typer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = run(app, f"http://127.0.0.1:{port}", "stats")
    assert isinstance(result.exception, ServerUnreachable)
    assert "stockpot serve" in str(result.exception)


@pytest.mark.parametrize("address", ["nonsense", "http://[", "ftp://127.0.0.1"])
def test_an_address_that_is_none(app: typer.Typer, address: str) -> None:
    assert isinstance(run(app, address, "stats").exception, ServerUnreachable)


def test_a_server_that_is_another(app: typer.Typer, url: str, recorder: Recorder) -> None:
    result = run(app, f"{url}/elsewhere", "stats")
    assert isinstance(result.exception, ServerUnreachable)
    assert "404" in str(result.exception)
    recorder.answers["GET pins"] = (404, {"error": {"message": "Nothing.", "code": "not_found"}})
    assert isinstance(run(app, url, "pins").exception, ServerUnreachable)
    recorder.answers["GET pins"] = (200, ["no object"])
    assert isinstance(run(app, url, "pins").exception, ServerUnreachable)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0000004, "0 µs"), (0.0123, "12.3 ms"), (5.04, "5.0 s"), (90, "90 s"), (7199.9, "2 h"), (-3, "0 µs")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_sizes_and_texts_in_words() -> None:
    assert [size(n) for n in (512, 2048, 3 * 2**30)] == ["512 B", "2.0 KiB", "3.00 GiB"]
    assert visible("a\nb\t\x1b[2Jé日") == "a⏎b\\t\\x1b[2Jé日"

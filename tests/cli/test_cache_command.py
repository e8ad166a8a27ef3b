"""`stockpot cache stats` against a server of a few lines, and against none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stockpot.cli import cache
from stockpot.errors import ServerUnreachable

FIGURES: dict[str, Any] = {
    "hit_ratio": 0.75,
    "ram_used_bytes": 3 * 2**20,
    "prompt_tokens_cached": {"context": 10, "ram": 12345},
    "something_new": 7,
}


class _Stats(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/admin/cache/stats"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(FIGURES).encode() if known else b"nothing here")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def url() -> Generator[str, None, None]:
    with HTTPServer(("127.0.0.1", 0), _Stats) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    cache.register(app)
    # With another command beside it, `cache` is spelled out, as in the whole command line.
    app.command("other")(lambda: None)
    return app


def test_a_table_explains_the_figures(app: typer.Typer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    result = CliRunner().invoke(app, ["cache", "stats", "--url", f"{url}/v1"])
    assert result.exit_code == 0, result.output
    assert "75.0%" in result.output
    assert "3.0 MiB" in result.output
    assert "12,345" in result.output
    assert "brought back from RAM" in result.output
    assert "something_new" in result.output


def test_json_is_what_the_server_said(app: typer.Typer, url: str) -> None:
    result = CliRunner().invoke(app, ["cache", "stats", "--url", url, "--json"])
    assert json.loads(result.output) == FIGURES


def test_nobody_answers(app: typer.Typer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = CliRunner().invoke(app, ["cache", "stats", "--url", f"http://127.0.0.1:{port}"])
    assert isinstance(result.exception, ServerUnreachable)
    assert "stockpot serve" in str(result.exception)


@pytest.mark.parametrize("address", ["nonsense", "http://[", "ftp://127.0.0.1"])
def test_an_address_that_is_none(app: typer.Typer, address: str) -> None:
    result = CliRunner().invoke(app, ["cache", "stats", "--url", address])
    assert isinstance(result.exception, ServerUnreachable)


def test_a_server_that_is_another(app: typer.Typer, url: str) -> None:
    result = CliRunner().invoke(app, ["cache", "stats", "--url", f"{url}/elsewhere"])
    assert isinstance(result.exception, ServerUnreachable)
    assert "404" in str(result.exception)

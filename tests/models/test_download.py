"""Downloads from a hub of a few lines: whole, broken off, changed meanwhile, refused."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from stockpot.errors import DownloadFailed, ModelNotFound
from stockpot.models.download import MAX_ATTEMPTS, MAX_DELAY_S, Hub, HubFile, download
from stockpot.models.progress import silent
from stockpot.models.publish import CHUNK_BYTES

FILE = HubFile("kitchen/ladle", "ladle.gguf")
PATH = "/kitchen/ladle/resolve/main/ladle.gguf"
TOKEN = "hf_not_a_real_token"
BODY = b"soup" * (CHUNK_BYTES * 5 // 8)
"""Two and a half chunks."""
CUT = CHUNK_BYTES * 3 // 2


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@dataclass
class Stub:
    """One file behind one port. `cuts` are the bytes the next GETs send before they hang up; `elsewhere`
    is the storage host that requests are redirected to; `statuses` answer the next requests."""

    body: bytes = BODY
    etag: str = _sha256(BODY)
    cuts: list[int] = field(default_factory=list[int])
    statuses: list[int] = field(default_factory=list[int])
    retry_after: str | None = None
    elsewhere: str | None = None
    surplus: bytes = b""
    requests: list[tuple[str, str, Message]] = field(default_factory=list[tuple[str, str, Message]])

    def asked(self, name: str, method: str = "GET") -> list[str | None]:
        """The header `name` of all requests with `method`."""
        return [headers[name] for asked, _, headers in self.requests if asked == method]


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            stub.requests.append((self.command, self.path, self.headers))
            if stub.statuses:
                self.send_response(stub.statuses.pop(0))
                if stub.retry_after is not None:
                    self.send_header("Retry-After", stub.retry_after)
                self.end_headers()
            elif stub.elsewhere is not None:
                self.send_response(302)
                self.send_header("Location", stub.elsewhere + self.path)
                self.send_header("X-Linked-ETag", f'"{stub.etag}"')
                self.send_header("X-Linked-Size", str(len(stub.body)))
                self.end_headers()
            else:
                self._content(with_body=with_body)

        def _content(self, *, with_body: bool) -> None:
            start = self._start()
            body = stub.body[start:] + (stub.surplus if with_body else b"")
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{stub.etag}"')
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(stub.body) - 1}/{len(stub.body)}")
            self.end_headers()
            if with_body:
                self.wfile.write(body[: stub.cuts.pop(0)] if stub.cuts else body)

        def _start(self) -> int:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range", f'"{stub.etag}"') == f'"{stub.etag}"'
            return int(match[1]) if match and same else 0

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler


@contextmanager
def _served(stub: Stub) -> Generator[str]:
    """The address of `stub`."""
    with HTTPServer(("127.0.0.1", 0), _handler(stub)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[Stub]:
    """A hub that HF_ENDPOINT names, asked without a token."""
    stub = Stub()
    with _served(stub) as url:
        monkeypatch.setenv("HF_ENDPOINT", url + "/")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "*")
        yield stub


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "ladle.gguf"


def _parts(target: Path) -> list[Path]:
    return list(target.parent.glob(".*.part"))


def test_a_whole_file_arrives_and_is_not_fetched_again(hub: Stub, target: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []

    def progress(description: str, done_bytes: int, total_bytes: int | None) -> None:
        seen.append((description, done_bytes, total_bytes))

    download(FILE, target, progress=progress)
    assert target.read_bytes() == BODY
    assert [(method, path) for method, path, _ in hub.requests] == [("HEAD", PATH), ("GET", PATH)]
    assert hub.asked("Authorization") == [None]
    assert ("Downloading ladle.gguf", len(BODY), len(BODY)) in seen
    assert seen[-1] == ("Checking ladle.gguf", len(BODY), len(BODY))
    assert not _parts(target)
    download(FILE, target, progress=silent)
    assert len(hub.requests) == 2


@pytest.mark.parametrize("etag", [_sha256(BODY), "version-1"])
def test_a_cut_connection_is_taken_up_where_it_broke(hub: Stub, target: Path, etag: str) -> None:
    hub.etag, hub.cuts = etag, [CUT]
    delays: list[float] = []
    download(FILE, target, progress=silent, sleep=delays.append)
    assert target.read_bytes() == BODY
    # Every byte that came is kept, not whole chunks alone.
    assert hub.asked("Range") == [None, f"bytes={CUT}-"]
    # Without a checksum, only the ETag can tell that the rest belongs to what is kept.
    assert hub.asked("If-Range") == [None, None if etag == _sha256(BODY) else f'"{etag}"']
    assert len(delays) == 1


def test_a_download_that_was_given_up_goes_on_in_the_next_call(hub: Stub, target: Path) -> None:
    hub.cuts = [CUT] + [0] * (MAX_ATTEMPTS - 1)
    delays: list[float] = []
    with pytest.raises(DownloadFailed, match="the same command goes on from there"):
        download(FILE, target, progress=silent, sleep=delays.append)
    assert not target.exists()
    assert len(delays) == MAX_ATTEMPTS - 1
    (kept,) = _parts(target)
    resumed_at = kept.stat().st_size
    download(FILE, target, progress=silent)
    assert target.read_bytes() == BODY
    assert hub.asked("Range")[-1] == f"bytes={resumed_at}-"
    assert not _parts(target)


@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_changed_file_is_fetched_from_its_start(hub: Stub, target: Path, with_checksum: bool) -> None:
    changed = BODY[::-1]
    hub.cuts = [CUT]
    if not with_checksum:
        hub.etag = "version-1"

    def publish_another(_: float) -> None:
        hub.body, hub.etag = changed, _sha256(changed) if with_checksum else "version-2"

    download(FILE, target, progress=silent, sleep=publish_another)
    assert target.read_bytes() == changed
    assert hub.asked("Range") == [None, None]
    assert not _parts(target)


def test_bytes_with_a_wrong_checksum_are_thrown_away(hub: Stub, target: Path) -> None:
    hub.etag = _sha256(b"another soup")
    with pytest.raises(DownloadFailed, match=f"SHA-256 {_sha256(BODY)}, but the hub says {hub.etag}"):
        download(FILE, target, progress=silent)
    assert not target.exists()
    assert not _parts(target)


def test_more_bytes_than_promised_are_thrown_away(hub: Stub, target: Path) -> None:
    hub.body, hub.etag, hub.surplus = b"soup", _sha256(b"soup"), b" and more"
    with pytest.raises(DownloadFailed, match="more than the 4 bytes"):
        download(FILE, target, progress=silent)
    assert not target.exists()
    assert not _parts(target)


def test_a_missing_file_is_not_found_at_the_first_try(hub: Stub, target: Path) -> None:
    hub.statuses = [404]
    with pytest.raises(ModelNotFound, match=r"no ladle\.gguf of kitchen/ladle on .*HTTP 404"):
        download(FILE, target, progress=silent)
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    ("status", "token", "advice"),
    [
        (401, None, "set HF_TOKEN to an access token"),
        (401, TOKEN, "does not accept the token in HF_TOKEN"),
        (403, TOKEN, "Accept the conditions on"),
        (410, None, "answered HTTP 410"),
    ],
)
def test_a_refusal_says_what_to_do_and_keeps_the_token_to_itself(
    hub: Stub, target: Path, monkeypatch: pytest.MonkeyPatch, *, status: int, token: str | None, advice: str
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.statuses = [status]
    with pytest.raises(DownloadFailed, match=advice) as caught:
        download(FILE, target, progress=silent)
    assert f"HTTP {status}" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert len(hub.requests) == 1


def test_a_busy_hub_is_asked_again_after_the_time_it_names(hub: Stub, target: Path) -> None:
    hub.statuses, hub.retry_after = [429], "7"
    delays: list[float] = []
    download(FILE, target, progress=silent, sleep=delays.append)
    assert target.read_bytes() == BODY
    assert delays == [pytest.approx(7, rel=0.2)]


def test_a_hub_that_wants_a_long_pause_is_not_waited_for(hub: Stub, target: Path) -> None:
    hub.statuses, hub.retry_after = [503], str(int(MAX_DELAY_S) + 1)
    with pytest.raises(DownloadFailed, match="HTTP 503"):
        download(FILE, target, progress=silent)


def test_the_token_stays_with_the_hub_when_it_redirects_to_storage(
    hub: Stub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    storage = Stub(etag="storage-has-its-own", cuts=[CUT])
    with _served(storage) as url:
        hub.elsewhere = url
        download(FILE, target, progress=silent, sleep=lambda _: None)
    assert target.read_bytes() == BODY
    assert set(hub.asked("Authorization") + hub.asked("Authorization", "HEAD")) == {f"Bearer {TOKEN}"}
    assert [method for method, *_ in storage.requests] == ["GET", "GET"]
    assert storage.asked("Authorization") == [None, None]
    # Resuming works through the redirect, too.
    assert storage.asked("Range")[1] is not None
    assert not any(TOKEN in str(value) for *_, headers in storage.requests for value in headers.values())


def test_an_endpoint_that_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(DownloadFailed, match=r"HF_ENDPOINT is 'hub\.example'"):
        Hub.from_environment()


def test_the_token_is_not_in_the_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = Hub.from_environment()
    assert hub.token == TOKEN
    assert TOKEN not in repr(hub)

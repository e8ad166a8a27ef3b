"""Tenants by their keys, administration by the admin key or from this machine, secrets that stay secret."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from pydantic import SecretStr
from starlette.requests import Request

from stockpot.backends.fake import FakeBackend
from stockpot.errors import ConfigurationError, Forbidden, Unauthenticated
from stockpot.requests import ChatRequest, CompletionRequest
from stockpot.settings import AccessSettings, Settings, TenantSettings, load_settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import create_app
from stockpot.wire.identity import Identity

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

ANN, BOB, ADMIN = "ann-key-11", "bob-key-22", "admin-key-33"
ACCESS = AccessSettings(
    admin_key=SecretStr(ADMIN),
    tenants={"ann": TenantSettings(key=SecretStr(ANN)), "bob": TenantSettings(key=SecretStr(BOB))},
)
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
LOCAL = {"host": "127.0.0.1:8000"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def request_from(client: str | None, **headers: str) -> Request:
    """A request as a route sees it."""
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    peer = None if client is None else (client, 50_000)
    return Request({"type": "http", "method": "GET", "path": "/", "headers": raw, "client": peer})


def test_without_tenants_everybody_is_nobody_in_particular() -> None:
    identity = Identity(AccessSettings(admin_key=SecretStr(ADMIN)))
    assert identity.caller(request_from("192.0.2.1")).tenant == ""
    assert identity.caller(request_from("192.0.2.1", authorization="Bearer whatever")).tenant == ""


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({"authorization": f"Bearer {ANN}"}, "ann"),
        ({"authorization": f"bearer  {BOB} "}, "bob"),
        ({"x_api_key": BOB}, "bob"),
        ({"authorization": "Basic abc", "x_api_key": ANN}, "ann"),
    ],
)
def test_a_key_tells_the_tenant(headers: dict[str, str], tenant: str) -> None:
    assert Identity(ACCESS).caller(request_from("192.0.2.1", **headers)).tenant == tenant


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ANN},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {ANN}"},
        {"authorization": f"Bearer {ANN}x"},
        {"authorization": f"Bearer {ANN[:-1]}"},
        {"authorization": f"Bearer {ADMIN}"},
        {"authorization": "Bearer naïve"},
        {"authorization": "Bearer wrong", "x_api_key": ANN},
        {"x_api_key": ""},
    ],
)
def test_other_keys_are_no_keys(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Identity(ACCESS).caller(request_from("127.0.0.1", **headers))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert ANN not in str(caught.value)


class RecordingBackend(FakeBackend):
    """Remembers whose requests reached it."""

    def __init__(self) -> None:
        super().__init__()
        self.tenants: list[str] = []

    def generate(self, request: ChatRequest | CompletionRequest) -> Any:
        self.tenants.append(request.generation.tenant)
        return super().generate(request)

    async def tokenize(self, model: str, content: str | ChatRequest, **more: Any) -> list[int]:
        if isinstance(content, ChatRequest):
            self.tenants.append(content.generation.tenant)
        return await super().tokenize(model, content, **more)


def test_requests_reach_the_backend_under_their_tenant(serve: Serve) -> None:
    backend = RecordingBackend()
    with serve(backend, access=ACCESS) as client:
        assert client.post("/v1/chat/completions", json=CHAT, headers=bearer(ANN)).status_code == 200
        plain = {"model": "fake", "prompt": "x"}
        assert client.post("/v1/completions", json=plain, headers={"x-api-key": BOB}).status_code == 200
        assert client.post("/tokenize", json=CHAT, headers=bearer(BOB)).status_code == 200
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=ANN, max_retries=0) as official:
            assert [model.id for model in official.models.list()] == ["fake"]
        with (
            openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="sk-no", max_retries=0) as official,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            official.models.list()
    assert caught.value.code == "invalid_api_key"
    assert backend.tenants == ["ann", "bob", "bob"]


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID")  # GET and HEAD of a probe
def test_every_route_for_tenants_wants_a_key_before_it_reads_a_body(serve: Serve) -> None:
    backend = FakeBackend()
    app = create_app(backend, Settings(access=ACCESS), Metrics(backend.engine_stats))
    routes = [
        (method.upper(), path.replace("{model_id}", "fake"))
        for path, methods in app.openapi()["paths"].items()
        if path.startswith(("/v1/", "/tokenize"))
        for method in methods
    ]
    assert {("POST", "/v1/chat/completions"), ("GET", "/v1/models/fake")} < set(routes)
    with serve(backend, access=ACCESS) as client:
        for method, path in routes:
            response = client.request(method, path, content=b"nonsense")
            assert response.status_code == 401, path
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["x-request-id"]
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200


def test_with_an_admin_key_nothing_else_will_do() -> None:
    identity = Identity(ACCESS)
    assert identity.require_admin(request_from("192.0.2.1", **bearer(ADMIN))) == "admin key"
    assert identity.require_admin(request_from("192.0.2.1", x_api_key=ADMIN)) == "admin key"
    for headers in ({}, bearer(ANN), bearer(ADMIN.upper())):
        with pytest.raises(Unauthenticated):
            identity.require_admin(request_from("127.0.0.1", **LOCAL, **headers))


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"])
def test_without_an_admin_key_this_machine_administers(client: str, host: str) -> None:
    assert Identity(AccessSettings()).require_admin(request_from(client, host=host)) == "local"


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        ("192.0.2.1", LOCAL),
        ("::ffff:192.0.2.1", LOCAL),
        ("somewhere", LOCAL),
        (None, LOCAL),
        ("127.0.0.1", {**LOCAL, "x_forwarded_for": "127.0.0.1"}),
        ("127.0.0.1", {**LOCAL, "forwarded": "for=127.0.0.1"}),
        ("127.0.0.1", {**LOCAL, "x_real_ip": "127.0.0.1"}),
        ("127.0.0.1", {**LOCAL, "origin": "https://example.org"}),
        ("127.0.0.1", {"host": "rebound.example.org:8000"}),
        ("127.0.0.1", {"host": "[::2"}),
        ("127.0.0.1", {}),
    ],
)
def test_without_an_admin_key_nobody_else_does(client: str | None, headers: dict[str, str]) -> None:
    with pytest.raises(Forbidden, match=r"access\.admin_key") as caught:
        Identity(AccessSettings()).require_admin(request_from(client, **headers))
    assert caught.value.status == 403


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_secrets_may_stand_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANN_KEY", ANN)
    monkeypatch.setenv("STOCKPOT_ACCESS__TENANTS__CYD__KEY", "cyd-key")
    secret = write(tmp_path / "admin", f"{ADMIN}\n")
    config = write(
        tmp_path / "stockpot.toml",
        f'[access]\nadmin_key = "file:{secret}"\n'
        '[access.tenants.ann]\nkey = "env:ANN_KEY"\nram_quota_bytes = 1000\n'
        f'[access.tenants.bob]\nkey = "{BOB}"\n',
    )
    access = load_settings(config).access
    assert access.admin_key is not None
    assert access.admin_key.get_secret_value() == ADMIN
    assert {name: tenant.key.get_secret_value() for name, tenant in access.tenants.items()} == {
        "ann": ANN,
        "bob": BOB,
        "cyd": "cyd-key",
    }
    assert access.tenants["ann"].ram_quota_bytes == 1000
    for shown in (repr(access), str(access), access.model_dump_json()):
        assert not any(key in shown for key in (ANN, BOB, ADMIN))


@pytest.mark.parametrize(
    ("access", "words"),
    [
        ({"admin_key": "env:NO_SUCH_NAME"}, r"access\.admin_key.*NO_SUCH_NAME is not set"),
        ({"admin_key": "file:/no/such/file"}, r"access\.admin_key.*/no/such/file cannot be read"),
        ({"admin_key": ""}, "printable ASCII"),
        ({"admin_key": "two words-44"}, "printable ASCII"),
        ({"admin_key": ["list-44"]}, r"access\.admin_key"),
        ({"tenants": {"": {"key": "some-44"}}}, r"access\.tenants"),
        ({"tenants": {"Ann": {"key": "some-44"}}}, r"access\.tenants\.Ann"),
        ({"tenants": {"a" * 65: {"key": "some-44"}}}, r"access\.tenants"),
        ({"tenants": {"ann": {}}}, r"access\.tenants\.ann\.key"),
        ({"tenants": {"ann": {"key": "some-44", "ram_quota_bytes": -1}}}, "ram_quota_bytes"),
        ({"tenants": {"ann": {"key": "some-44"}, "bob": {"key": "some-44"}}}, "ann.*bob.*same key"),
        ({"admin_key": "some-44", "tenants": {"ann": {"key": "some-44"}}}, "admin_key.*ann.*same key"),
    ],
)
def test_access_that_does_not_fit_is_told_without_the_secret(access: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_settings(Path(__file__).parent.parent / "empty.toml", access=access)
    told: list[BaseException | None] = [caught.value]
    while (error := told[-1]) is not None:
        assert "-44" not in f"{error} {error!r}"
        told.append(error.__cause__)


def test_an_environment_that_is_no_json_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKPOT_ACCESS", "secret-44")
    with pytest.raises(ConfigurationError, match="environment") as caught:
        load_settings(Path(__file__).parent.parent / "empty.toml")
    assert "secret-44" not in str(caught.value)


def test_keys_are_not_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serve(FakeBackend(), access=ACCESS) as client:
        client.get("/v1/models", headers=bearer(ANN))
        client.get("/v1/models", headers=bearer("wrong-key-55"))
    assert "/v1/models" in caplog.text
    assert not any(key in caplog.text for key in (ANN, "wrong-key-55"))

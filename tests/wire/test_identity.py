"""Tenants by their keys, administration by the admin key or from this machine, secrets that stay secret."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from pydantic import SecretStr
from starlette.requests import Request

from stockpot.backends.fake import FakeBackend
from stockpot.caller import NOBODY, Limits
from stockpot.clock import VirtualClock
from stockpot.errors import ConfigurationError, Forbidden, Unauthenticated
from stockpot.identity.key import new_key, new_key_id
from stockpot.identity.key_admin import KeyAdmin, NewKey
from stockpot.identity.memory_keys import MemoryKeyStore
from stockpot.identity.resolver import Resolver
from stockpot.requests import ChatRequest, CompletionRequest
from stockpot.settings import AccessSettings, Settings, TenantSettings, load_settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import application
from stockpot.wire.identity import Identity, TooManyWrongKeys
from stockpot.wire.openapi import build_document
from stockpot.wire.service import Service

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

ANN, BOB, ADMIN = "ann-key-11", "bob-key-22", "admin-key-33"
ACCESS = AccessSettings(
    admin_key=SecretStr(ADMIN),
    tenants={"ann": TenantSettings(key=SecretStr(ANN)), "bob": TenantSettings(key=SecretStr(BOB))},
)
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
LOCAL = {"host": "127.0.0.1:8000"}


class NoTrail:
    def append(
        self, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None
    ) -> None: ...


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def request_from(client: str | None, **headers: str) -> Request:
    """A request as a route sees it."""
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    peer = None if client is None else (client, 50_000)
    return Request({"type": "http", "method": "GET", "path": "/", "headers": raw, "client": peer})


async def test_without_tenants_everybody_is_nobody_in_particular() -> None:
    identity = Identity(AccessSettings(admin_key=SecretStr(ADMIN)))
    assert await identity.caller(request_from("192.0.2.1")) is NOBODY
    assert await identity.caller(request_from("192.0.2.1", authorization="Bearer whatever")) is NOBODY


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({"authorization": f"Bearer {ANN}"}, "ann"),
        ({"authorization": f"bearer  {BOB} "}, "bob"),
        ({"x_api_key": BOB}, "bob"),
        ({"authorization": "Basic abc", "x_api_key": ANN}, "ann"),
    ],
)
async def test_a_key_tells_the_tenant(headers: dict[str, str], tenant: str) -> None:
    identity = Identity(ACCESS, teams={"ann": Limits(concurrency=2)})
    caller = await identity.caller(request_from("192.0.2.1", **headers))
    assert (caller.tenant, caller.key_id, caller.team) == (tenant, tenant, tenant)
    assert caller.team_limits == (Limits(concurrency=2) if tenant == "ann" else Limits())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ANN},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {ANN}"},
        {"authorization": f"Bearer {ANN}x"},
        {"authorization": f"Bearer {ANN[:-1]}"},
        {"authorization": "Bearer naïve"},
        {"authorization": "Bearer wrong", "x_api_key": ANN},
        {"x_api_key": ""},
    ],
)
async def test_other_keys_are_no_keys(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await Identity(ACCESS).caller(request_from("127.0.0.1", **headers))
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


def test_every_route_but_those_of_probes_wants_a_key_before_it_reads_a_body(serve: Serve) -> None:
    routes = [
        (method.upper(), re.sub(r"\{[a-z_]+\}", "fake", path))
        for path, methods in build_document()["paths"].items()
        if path.startswith(("/v1/", "/tokenize", "/admin/"))
        for method in methods
        if method in ("get", "post", "delete")
    ]
    assert {("POST", "/v1/chat/completions"), ("GET", "/v1/models/fake"), ("POST", "/admin/keys")} < set(
        routes
    )
    with serve(FakeBackend(), access=ACCESS) as client:
        for method, path in routes:
            response = client.request(method, path, content=b"nonsense")
            assert response.status_code == 401, path
            error = response.json()["error"]
            if path.startswith("/v1/messages"):
                assert error["type"] == "authentication_error"
            else:
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key"), path
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["x-request-id"]
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200


async def test_with_an_admin_key_nothing_else_will_do() -> None:
    identity = Identity(ACCESS)
    assert await identity.administrator(request_from("192.0.2.1", **bearer(ADMIN))) == "admin key"
    assert await identity.administrator(request_from("192.0.2.1", x_api_key=ADMIN)) == "admin key"
    for headers in ({}, bearer(ADMIN.upper())):
        with pytest.raises(Unauthenticated):
            await identity.administrator(request_from("127.0.0.1", **LOCAL, **headers))


async def test_administrators_do_not_generate_and_tenants_do_not_administer() -> None:
    identity = Identity(ACCESS)
    with pytest.raises(Forbidden, match="administers and does nothing else"):
        await identity.caller(request_from("192.0.2.1", **bearer(ADMIN)))
    with pytest.raises(Forbidden, match="may not administer"):
        await identity.administrator(request_from("127.0.0.1", **LOCAL, **bearer(ANN)))


async def test_thousands_of_wrong_keys_are_refused_before_they_cost_anything() -> None:
    """Whoever shares the address gets in with a key that was good before; a guess is not told it is right."""
    clock, store = VirtualClock(1_000.0), MemoryKeyStore()
    key, text = KeyAdmin(store, NoTrail(), clock).create(NewKey("ci"), actor="t")
    resolver = Resolver(store, clock)
    identity = Identity(ACCESS, resolver, clock=clock)
    good = [request_from("192.0.2.1", **bearer(each)) for each in (text, ANN)]
    for request in good:
        await identity.caller(request)
    refused = 0
    for number in range(2_000):
        wrong = new_key(new_key_id()) if number % 2 else f"guess-{number}"
        try:
            await identity.caller(request_from("192.0.2.1", **bearer(wrong)))
        except Unauthenticated:
            pass
        except TooManyWrongKeys as error:
            refused += 1
            assert (error.status, error.code) == (429, "too_many_wrong_keys")
            assert error.retry_after_s is not None
            assert wrong not in str(error)
    assert refused == 1_980
    assert store.lookups <= 21
    clock.advance(2)  # what is known of the key is asked for again
    assert [(await identity.caller(request)).key_id for request in good] == [key.id, "ann"]
    for guess in (BOB, ADMIN):
        with pytest.raises(TooManyWrongKeys):
            await identity.caller(request_from("192.0.2.1", **bearer(guess)))
        assert (await identity.caller(request_from("192.0.2.2", **bearer(BOB)))).tenant == "bob"
    with pytest.raises(TooManyWrongKeys):
        await identity.administrator(request_from("192.0.2.1", **bearer(ADMIN)))
    clock.advance(60)
    assert (await identity.caller(request_from("192.0.2.1", **bearer(BOB)))).tenant == "bob"
    resolver.close()


async def test_virtual_keys_beside_those_of_the_settings() -> None:
    clock, store = VirtualClock(1_000.0), MemoryKeyStore()
    admin = KeyAdmin(store, NoTrail(), clock)
    resolver = Resolver(store, clock)
    auto = Identity(AccessSettings(), resolver, clock=clock)
    required = Identity(AccessSettings(keys="required"), resolver, clock=clock)
    nobody = request_from("192.0.2.1")
    assert await auto.caller(nobody) is NOBODY
    assert await auto.administrator(request_from("127.0.0.1", **LOCAL)) == "local"
    with pytest.raises(Unauthenticated, match="needs an API key"):
        await required.caller(nobody)
    root, root_text = admin.create(NewKey("root", kind="admin"), actor="t")
    key, text = admin.create(NewKey("ci", team="search"), actor="t")
    clock.advance(2)
    for identity in (auto, required):
        with pytest.raises(Unauthenticated, match="needs an API key"):
            await identity.caller(nobody)
        assert (await identity.caller(request_from("192.0.2.1", x_api_key=text))).key_id == key.id
        with pytest.raises(Forbidden, match=f"{root.id} is an administrator's"):
            await identity.caller(request_from("192.0.2.1", **bearer(root_text)))
        assert await identity.administrator(request_from("192.0.2.1", **bearer(root_text))) == "root"
        with pytest.raises(Forbidden, match=f"{key.id} may not administer"):
            await identity.administrator(request_from("127.0.0.1", **LOCAL, **bearer(text)))
        with pytest.raises(Unauthenticated):
            await identity.administrator(request_from("127.0.0.1", **LOCAL, **bearer(new_key(root.id))))
        with pytest.raises(Forbidden, match="keys create --admin"):
            await identity.administrator(request_from("127.0.0.1", **LOCAL))
    admin.revoke(root.id, actor="t")
    clock.advance(2)
    with pytest.raises(Unauthenticated, match="revoked"):
        await auto.administrator(request_from("192.0.2.1", **bearer(root_text)))
    resolver.close()


def test_keys_are_made_and_ended_over_http() -> None:
    clock, store, trail = VirtualClock(1_000.0), MemoryKeyStore(), NoTrail()
    backend = FakeBackend()
    admin = KeyAdmin(store, trail, clock)
    settings = Settings(access=ACCESS)
    identity = Identity(settings.access, Resolver(store, clock), clock=clock)
    metrics = Metrics(backend.engine_stats)
    transport = httpx2.ASGITransport(
        application(Service(backend, settings, metrics, clock, identity, keys=admin))
    )

    async def visit() -> None:
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
            body = {"name": "ci", "team": "search", "limits": {"usd_per_day": 2}, "expires": "30d"}
            for headers, status in ((bearer(ANN), 403), ({}, 401), (bearer("x"), 401)):
                assert (await client.post("/admin/keys", json=body, headers=headers)).status_code == status
            client.headers.update(bearer(ADMIN))
            made = await client.post("/admin/keys", json=body)
            assert made.status_code == 201
            assert made.headers["cache-control"] == "no-store"
            key, key_id = made.json()["key"], made.json()["id"]
            assert (await identity.caller(request_from("192.0.2.1", **bearer(key)))).team == "search"
            listed = (await client.get("/admin/keys")).json()["keys"]
            assert [(each["id"], each["state"]) for each in listed] == [(key_id, "active")]
            assert listed[0]["limits"] == {"usd_per_day": 2.0}
            assert not {"key", "digest"} & listed[0].keys()
            rotated = await client.post(f"/admin/keys/{key_id}/rotate", json={"grace": "0s"})
            assert (rotated.json()["id"], rotated.json()["key"] != key) == (key_id, True)
            assert (await client.delete(f"/admin/keys/{key_id}")).json()["state"] == "revoked"
            wrong: Sequence[tuple[str, str, Any, int]] = (
                ("DELETE", "/admin/keys/nope", None, 404),
                ("POST", "/admin/keys/nope/rotate", {}, 404),
                ("POST", f"/admin/keys/{key_id}/rotate", {}, 400),
                ("POST", "/admin/keys", {"name": ""}, 400),
                ("POST", "/admin/keys", {"name": "a", "expires": "soon"}, 400),
                ("POST", "/admin/keys", {"name": "a", "limits": {"concurrency": 1.5}}, 400),
                ("POST", "/admin/keys", {"name": "a", "models": []}, 400),
            )
            for method, path, content, status in wrong:
                answer = await client.request(method, path, json=content)
                assert (answer.status_code, bool(answer.json()["error"]["message"])) == (status, True), path

    asyncio.run(visit())


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"])
async def test_without_an_admin_key_this_machine_administers(client: str, host: str) -> None:
    assert await Identity(AccessSettings()).administrator(request_from(client, host=host)) == "local"


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
async def test_without_an_admin_key_nobody_else_does(client: str | None, headers: dict[str, str]) -> None:
    with pytest.raises(Forbidden, match=r"access\.admin_key") as caught:
        await Identity(AccessSettings()).administrator(request_from(client, **headers))
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

"""/admin/cache/...: what reaches the backend, what is refused, and who may ask."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from stockpot.backends.cache_admin import CacheAdmin, Figures, InvalidationOrder, PrefixSelector
from stockpot.backends.fake import FakeBackend
from stockpot.errors import RequestError
from stockpot.requests import CacheBoundary, ChatRequest, Message
from stockpot.settings import AccessSettings, Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import create_app

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

ADMIN = "/admin/cache"
HELLO = [{"role": "user", "content": "hello"}]


class RecordingAdmin(CacheAdmin):
    """Remembers what it was asked; knows the request `known` and the pin `p1`."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def entries(self, *, limit: int, tenant: str | None) -> Sequence[Figures]:
        self.asked.append((limit, tenant))
        return [{"id": "00", "tokens": 3}]

    async def explain(self, request_id: str) -> Figures | None:
        self.asked.append(request_id)
        return {"request": request_id} if request_id.startswith("known") else None

    async def recent(self, count: int) -> Sequence[Figures]:
        self.asked.append(count)
        return [{"request": "known"}]

    async def pin(self, prefix: PrefixSelector, *, owner: str, for_s: float) -> Figures:
        self.asked.append((prefix, owner, for_s))
        if prefix.text == "nowhere":
            raise RequestError("Nothing of it is there.", code="prefix_not_cached")
        return {"pin": "p1", "tokens": 3, "expires_s": 5.0}

    async def unpin(self, pin: str) -> bool:
        self.asked.append(pin)
        return pin == "p1"

    async def pins(self) -> Sequence[Figures]:
        return [{"pin": "p1"}]

    async def invalidate(self, order: InvalidationOrder) -> Figures:
        self.asked.append(order)
        return {"epoch": 1, "pending": False, "blocks": 2}

    async def warm(self, prompt: ChatRequest | str, *, model: str, tenant: str) -> Figures:
        self.asked.append((prompt, model, tenant))
        return {"prompt_tokens": 5, "cached_tokens": 0, "seconds": 0.1}

    async def verify(self) -> Figures:
        return {"checked": 1, "sound": 1, "refused": {}, "seconds": 0.1}

    async def export(self, folder: str) -> Figures:
        self.asked.append(folder)
        return {"folder": folder, "blocks": 1, "bytes": 10}


class AdministeredBackend(FakeBackend):
    """A backend with a cache of its own, as far as the wire can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.admin = RecordingAdmin()

    def cache_admin(self) -> CacheAdmin | None:
        return self.admin


@pytest.fixture(scope="module")
def administered() -> AdministeredBackend:
    return AdministeredBackend()


@pytest.fixture(scope="module")
def admin(administered: AdministeredBackend, serve: Serve) -> Generator[httpx2.Client, None, None]:
    """A client of a server over `administered`, without an admin key: from this machine."""
    with serve(administered) as client:
        yield client


def refused(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def answered(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def test_looking(admin: httpx2.Client, administered: AdministeredBackend) -> None:
    asked = administered.admin.asked
    assert answered(admin.get(f"{ADMIN}/stats"))["kv_bytes_per_token"] == 64
    listed = answered(admin.get(f"{ADMIN}/entries?limit=7&tenant=ann"))
    assert listed["entries"] == [{"id": "00", "tokens": 3}]
    assert listed["now_s"] > 1e9
    assert asked[-1] == (7, "ann")
    answered(admin.get(f"{ADMIN}/entries?tenant="))
    assert asked[-1] == (50, "")
    answered(admin.get(f"{ADMIN}/entries"))
    assert asked[-1] == (50, None)
    assert answered(admin.get(f"{ADMIN}/explain?count=3"))["requests"] == [{"request": "known"}]
    assert asked[-1] == 3
    assert answered(admin.get(f"{ADMIN}/explain/known"))["request"] == "known"
    assert answered(admin.get(f"{ADMIN}/pins"))["pins"] == [{"pin": "p1"}]


def test_a_clients_own_request_id_may_hold_anything(
    admin: httpx2.Client, administered: AdministeredBackend
) -> None:
    assert answered(admin.get(f"{ADMIN}/explain/known%2Fa%3Fb%25"))["request"] == "known/a?b%"


def test_pinning(admin: httpx2.Client, administered: AdministeredBackend) -> None:
    asked = administered.admin.asked
    pinned = admin.post(f"{ADMIN}/pins", json={"text": "abc", "tenant": "ann", "owner": "Bea", "for": "2h"})
    assert answered(pinned)["pin"] == "p1"
    assert asked[-1] == (PrefixSelector(text="abc", tenant="ann"), "Bea", 7200)
    answered(admin.post(f"{ADMIN}/pins", json={"tokens": [1, 2], "owner": "Bea", "for_s": 1.5}))
    assert asked[-1] == (PrefixSelector(tokens=[1, 2]), "Bea", 1.5)
    answered(admin.post(f"{ADMIN}/pins", json={"messages": HELLO, "owner": "Bea", "for": "90s"}))
    prefix, _, for_s = asked[-1]
    assert prefix.chat.messages == (Message("user", "hello"),)
    assert for_s == 90
    assert answered(admin.delete(f"{ADMIN}/pins/p1"))["unpinned"]
    assert refused(admin.delete(f"{ADMIN}/pins/p2"), 404)["code"] == "unknown_pin"
    nowhere = {"text": "nowhere", "owner": "Bea", "for": "1d"}
    assert refused(admin.post(f"{ADMIN}/pins", json=nowhere))["code"] == "prefix_not_cached"


@pytest.mark.parametrize(
    ("body", "order"),
    [
        ({"kind": "all"}, InvalidationOrder("all", by="local")),
        ({"kind": "tenant", "value": "ann"}, InvalidationOrder("tenant", "ann", by="local")),
        ({"kind": "tenant", "value": ""}, InvalidationOrder("tenant", "", by="local")),
        (
            {"kind": "tag", "value": "law", "tenant": "ann", "reason": "new law", "by": "Bea"},
            InvalidationOrder("tag", "law", tenant="ann", by="Bea (local)", reason="new law"),
        ),
        ({"kind": "document", "value": "a b"}, InvalidationOrder("document", "a b", by="local")),
        ({"kind": "model", "value": "fake"}, InvalidationOrder("model", "fake", by="local")),
        (
            {"kind": "prefix", "text": "abc"},
            InvalidationOrder("prefix", prefix=PrefixSelector(text="abc"), by="local"),
        ),
        (
            {"kind": "prefix", "tokens": [7], "tenant": "ann"},
            InvalidationOrder(
                "prefix", prefix=PrefixSelector(tokens=[7], tenant="ann"), tenant="ann", by="local"
            ),
        ),
    ],
)
def test_invalidating(
    admin: httpx2.Client, administered: AdministeredBackend, body: dict[str, Any], order: InvalidationOrder
) -> None:
    assert answered(admin.post(f"{ADMIN}/invalidate", json=body))["blocks"] == 2
    assert administered.admin.asked[-1] == order


def test_warming_honours_boundaries(admin: httpx2.Client, administered: AdministeredBackend) -> None:
    asked = administered.admin.asked
    answered(admin.post(f"{ADMIN}/warm", json={"prompt": "once"}))
    assert asked[-1] == ("once", "fake", "")
    control = {"type": "ephemeral", "ttl": "1h", "tags": ["law"]}
    messages = [{**HELLO[0], "cache_control": control}]
    answered(admin.post(f"{ADMIN}/warm", json={"messages": messages, "tenant": "ann", "model": "other"}))
    chat, model, tenant = asked[-1]
    assert (model, tenant, chat.generation.tenant) == ("other", "ann", "ann")
    assert chat.boundaries == (CacheBoundary(0, None, 3600, tags=frozenset({"law"})),)


def test_verifying_and_exporting(admin: httpx2.Client, administered: AdministeredBackend) -> None:
    assert answered(admin.post(f"{ADMIN}/verify"))["sound"] == 1
    assert answered(admin.post(f"{ADMIN}/verify", json={}))["sound"] == 1
    assert refused(admin.post(f"{ADMIN}/verify", json={"deep": True}))["param"] == "deep"
    assert answered(admin.post(f"{ADMIN}/export", json={"folder": "/a b"}))["folder"] == "/a b"


PIN: dict[str, Any] = {"text": "abc", "owner": "Bea", "for": "1h"}
NO_PROMPT = {"owner": "Bea", "for": "1h"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("pins", NO_PROMPT, "text"),
        ("pins", {**PIN, "tokens": [1]}, "text"),
        ("pins", {**PIN, "text": ""}, "text"),
        ("pins", {**NO_PROMPT, "tokens": []}, "tokens"),
        ("pins", {**NO_PROMPT, "tokens": [-1]}, "tokens[0]"),
        ("pins", {**NO_PROMPT, "tokens": ["1"]}, "tokens[0]"),
        ("pins", {**NO_PROMPT, "messages": [{"role": "user"}]}, "messages[0].content"),
        ("pins", {"text": "abc", "for": "1h"}, "owner"),
        ("pins", {**PIN, "owner": " "}, "owner"),
        ("pins", {**PIN, "owner": "a\nb"}, "owner"),
        ("pins", {**PIN, "for_s": 5}, "for"),
        ("pins", {"text": "abc", "owner": "Bea"}, "for"),
        ("pins", {**PIN, "for": "soon"}, "for"),
        ("pins", {**PIN, "for": "0s"}, "for"),
        ("pins", {**PIN, "for": "31d"}, "for"),
        ("pins", {**PIN, "tenant": "Ann!"}, "tenant"),
        ("pins", {**PIN, "colour": "red"}, "colour"),
        ("invalidate", {}, "kind"),
        ("invalidate", {"kind": "some"}, "kind"),
        ("invalidate", {"kind": "all", "value": "x"}, "value"),
        ("invalidate", {"kind": "all", "tenant": "ann"}, "tenant"),
        ("invalidate", {"kind": "all", "text": "abc"}, "kind"),
        ("invalidate", {"kind": "tag"}, "value"),
        ("invalidate", {"kind": "tag", "value": ""}, "value"),
        ("invalidate", {"kind": "tenant"}, "value"),
        ("invalidate", {"kind": "tenant", "value": "ann", "tenant": "ann"}, "tenant"),
        ("invalidate", {"kind": "prefix"}, "text"),
        ("invalidate", {"kind": "prefix", "text": "a", "value": "b"}, "value"),
        ("invalidate", {"kind": "tag", "value": "a", "reason": "x" * 129}, "reason"),
        ("warm", {}, "messages"),
        ("warm", {"prompt": "a", "messages": HELLO}, "messages"),
        ("warm", {"prompt": [1, 2]}, "prompt"),
        ("warm", {"messages": []}, "messages"),
        ("warm", {"prompt": "a", "max_tokens": 5}, "max_tokens"),
        ("export", {}, "folder"),
        ("export", {"folder": 5}, "folder"),
    ],
)
def test_bodies_that_do_not_fit(
    admin: httpx2.Client, administered: AdministeredBackend, path: str, body: dict[str, Any], param: str
) -> None:
    before = len(administered.admin.asked)
    error = refused(admin.post(f"{ADMIN}/{path}", json=body))
    assert error["param"] == param, error
    assert len(administered.admin.asked) == before


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("entries?limit=0", "limit"),
        ("entries?limit=10001", "limit"),
        ("entries?limit=many", "limit"),
        ("entries?limit=-1", "limit"),
        ("entries?limit=%C2%B2", "limit"),  # a digit to str.isdigit, no number to int
        ("entries?limit=1&limit=2", "limit"),
        ("entries?tenant=Ann!", "tenant"),
        ("entries?count=1", "count"),
        ("explain?count=2049", "count"),
        ("explain/known?count=1", "count"),
        ("stats?tier=ram", "tier"),
        ("pins?owner=Bea", "owner"),
    ],
)
def test_queries_that_do_not_fit(admin: httpx2.Client, path: str, param: str) -> None:
    assert refused(admin.get(f"{ADMIN}/{path}"))["param"] == param


def test_a_request_that_is_not_known(admin: httpx2.Client) -> None:
    error = refused(admin.get(f"{ADMIN}/explain/gone"), 404)
    assert error["code"] == "unknown_request"
    assert "'gone'" in error["message"]


CALLS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/stats", None),
    ("GET", "/entries", None),
    ("GET", "/explain", None),
    ("GET", "/explain/{request_id}", None),
    ("GET", "/pins", None),
    ("POST", "/pins", PIN),
    ("DELETE", "/pins/{pin}", None),
    ("POST", "/invalidate", {"kind": "all"}),
    ("POST", "/warm", {"prompt": "a"}),
    ("POST", "/verify", None),
    ("POST", "/export", {"folder": "/x"}),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS[1:])
def test_a_backend_without_a_cache_of_its_own(
    client: httpx2.Client, method: str, path: str, body: dict[str, Any] | None
) -> None:
    error = refused(client.request(method, ADMIN + path, json=body), 501)
    assert error["code"] == "no_cache_admin"
    assert "cache.enabled" in error["message"]


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID")  # GET and HEAD of a probe
def test_every_route_wants_the_admin_key_before_it_reads_a_body(serve: Serve) -> None:
    backend = AdministeredBackend()
    access = AccessSettings(admin_key=SecretStr("sesame"))
    app = create_app(backend, Settings(access=access), Metrics(backend.engine_stats))
    routes = {
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        if path.startswith(ADMIN)
        for method in methods
    }
    assert routes == {(method, ADMIN + path) for method, path, _ in CALLS}
    with serve(backend, access=access) as client:
        for method, path in routes:
            error = refused(client.request(method, path, content=b"nonsense"), 401)
            assert error["code"] == "invalid_api_key"
        assert not backend.admin.asked
        key = {"authorization": "Bearer sesame"}
        answered(client.post(f"{ADMIN}/invalidate", json={"kind": "all"}, headers=key))
        assert backend.admin.asked == [InvalidationOrder("all", by="admin key")]


def test_without_a_key_pages_in_a_browser_are_kept_out(admin: httpx2.Client) -> None:
    origin = {"origin": "https://elsewhere.example"}
    response = admin.post(f"{ADMIN}/invalidate", json={"kind": "all"}, headers=origin)
    assert refused(response, 403)["code"] == "forbidden"

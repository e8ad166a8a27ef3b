"""Models, tokenisation, probes, metrics and cache figures over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import pytest

from stockpot.backends.fake import FakeBackend

Serve = Callable[..., AbstractContextManager[httpx2.Client]]


def test_models(client: httpx2.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert listed["data"] == [client.get("/v1/models/fake").json()]
    assert listed["data"][0]["context_tokens"] == 4096


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"text": "abc"}, 3), ({"text": ""}, 0), ({"messages": [{"role": "user", "content": "abc"}]}, 10)],
)
def test_tokenize(client: httpx2.Client, fields: dict[str, Any], count: int) -> None:
    body = client.post("/tokenize", json={"model": "fake", **fields}).json()
    assert body["count"] == len(body["tokens"]) == count
    assert body["context_tokens"] == 4096


@pytest.mark.parametrize("fields", [{}, {"text": "a", "messages": [{"role": "user", "content": "a"}]}])
def test_tokenize_wants_one_of_two(client: httpx2.Client, fields: dict[str, Any]) -> None:
    assert client.post("/tokenize", json={"model": "fake", **fields}).status_code == 400


def test_tokenize_of_an_unknown_model(client: httpx2.Client) -> None:
    assert client.post("/tokenize", json={"model": "other", "text": "a"}).status_code == 404


def test_probes_answer_head_too(client: httpx2.Client) -> None:
    assert client.head("/health").status_code == 200
    assert client.head("/ready").status_code == 200
    assert client.get("/ready").json() == {"status": "ready"}


def test_cache_stats(client: httpx2.Client) -> None:
    figures = client.get("/admin/cache/stats").json()
    assert figures["kv_bytes_per_token"] == 64
    assert 0 <= figures["hit_ratio"] <= 1


def test_metrics_count_requests_by_route_not_by_path(serve: Serve) -> None:
    with serve(FakeBackend()) as client:
        client.get("/v1/models/fake")
        client.get("/v1/models/other")
        client.get("/somewhere/else")
        client.delete("/health")
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    route = 'route="/v1/models/{model_id:path}"'
    assert f'stockpot_http_requests_total{{{route},method="GET",status="200"}} 1.0' in _sorted(lines)
    assert f'stockpot_http_requests_total{{{route},method="GET",status="404"}} 1.0' in _sorted(lines)
    assert 'stockpot_http_requests_total{route="unmatched",method="GET",status="404"} 1.0' in _sorted(lines)
    assert any('method="other",status="405"' in line for line in _sorted(lines))


def _sorted(lines: list[str]) -> list[str]:
    """Lines with their labels in the order route, method, status, whatever the library's order is."""
    ordered: list[str] = []
    for line in lines:
        if line.startswith("stockpot_http_requests_total{"):
            inside, _, value = line.removeprefix("stockpot_http_requests_total{").rpartition("}")
            labels = dict(label.split("=", 1) for label in inside.split(","))
            inside = ",".join(f"{name}={labels[name]}" for name in ("route", "method", "status"))
            ordered.append(f"stockpot_http_requests_total{{{inside}}}{value}")
    return ordered

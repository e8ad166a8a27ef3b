"""The way of a request: aliases, rollout, fallbacks, degrading, and who may ask for what."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from stockpot.caller import Caller
from stockpot.errors import ConfigurationError, Forbidden, UnknownModel
from stockpot.requests import ChatRequest, EmbeddingRequest, Generation, Message
from stockpot.routing.router import SURVIVABLE, Router
from stockpot.settings_gateway import RouteSettings

SERVED = {"small", "large", "other", "tiny"}


def router(**routes: dict[str, Any]) -> Router:
    return Router(
        {name.replace("_", "-"): RouteSettings.model_validate(route) for name, route in routes.items()},
        default_policy="prefix",
        serves=SERVED.__contains__,
        known=lambda: SERVED,
        chance=random.Random(1),
    )


def to(*models: str, **more: Any) -> dict[str, Any]:
    return {"targets": [{"model": model} for model in models], **more}


def ask(model: str, *, session: str = "", caller: Caller | None = None) -> ChatRequest:
    generation = Generation(model, "id", session=session, caller=caller or Caller())
    return ChatRequest(generation, (Message("user", "hello"),))


def models(of: Router, model: str, standing: float | None = None) -> list[str]:
    return [step.model for step in of.plan(ask(model), standing).steps]


def test_a_name_without_a_route_is_the_model() -> None:
    plan = router().plan(ask("small"), None)
    assert [(step.model, step.on) for step in plan.steps] == [("small", frozenset())]
    assert plan.policy == "prefix"


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownModel, match=r"'gpt'.*'chat', 'large', 'other', 'small', 'tiny'"):
        router(chat=to("small")).plan(ask("gpt"), None)


def test_a_key_may_only_ask_for_its_models_and_aliases_count_by_their_own_name() -> None:
    caller = Caller(models=frozenset({"chat"}))
    routes = router(chat=to("large"))
    assert routes.plan(ask("chat", caller=caller), None).steps[0].model == "large"
    with pytest.raises(Forbidden, match=r"'large'.*'chat'"):
        routes.plan(ask("large", caller=caller), None)
    with pytest.raises(Forbidden, match="no models"):
        routes.plan(ask("large", caller=Caller(models=frozenset())), None)


def test_fallbacks_stand_in_order_each_with_its_causes() -> None:
    plan = router(
        chat=to("large", fallbacks=[{"to": "small", "on": ["context_overflow"]}, {"to": "spare"}]),
        spare=to("other", fallbacks=[{"to": "tiny", "on": ["timeout"]}, {"to": "large"}]),
    ).plan(ask("chat"), None)
    assert [(step.model, step.on) for step in plan.steps] == [
        ("large", frozenset()),
        ("small", {"context_overflow"}),
        ("other", SURVIVABLE),
        ("tiny", {"timeout"}),
    ]
    assert {"unauthenticated", "rate_limited", "connect", "not_found"} <= SURVIVABLE
    assert not SURVIVABLE & {"invalid_request", "context_overflow", "guard", "cancelled", "deadline"}


def test_a_model_can_have_fallbacks_under_its_own_name() -> None:
    assert models(router(large=to("large", fallbacks=[{"to": "small"}])), "large") == ["large", "small"]


def test_a_circle_of_routes_is_named() -> None:
    with pytest.raises(ConfigurationError, match="a -> b -> c -> a"):
        router(a=to("b"), b=to("small", fallbacks=[{"to": "c"}]), c=to("tiny", degrade={"to": "a"}))


def test_routes_that_lead_nowhere_or_everywhere_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="weight 0"):
        router(a={"targets": [{"model": "small", "weight": 0}]})
    with pytest.raises(ConfigurationError, match="twice"):
        router(a=to("small", "small"))
    doubling = {f"r{n}": to(f"r{n + 1}", fallbacks=[{"to": f"r{n + 1}"}]) for n in range(40)}
    with pytest.raises(ConfigurationError, match="can lead through"):
        router(**doubling)


def test_what_no_backend_serves_is_a_warning_and_no_error() -> None:
    assert router(a=to("gone", "small"), b=to("a")).unserved() == {"a": ("gone",)}


@pytest.mark.parametrize("standing", [None, 0.1, 1.0])
def test_with_enough_left_nothing_is_degraded(standing: float | None) -> None:
    assert models(router(chat=to("large", degrade={"to": "tiny", "below": 0.1})), "chat", standing) == [
        "large"
    ]


def test_with_little_left_the_cheaper_model_answers_alone_and_says_so() -> None:
    chat = to(
        "large",
        degrade={"to": "cheap"},
        cascade={"to": "large"},
        fallbacks=[{"to": "other"}],
        policy="session",
    )
    plan = router(chat=chat, cheap=to("tiny", policy="least-load")).plan(ask("chat"), 0.05)
    assert [step.model for step in plan.steps] == ["tiny"]
    assert plan.cascade is None
    assert plan.policy == "session"
    (notice,) = plan.notices
    assert notice.kind == "degraded"
    assert "cheap" in notice.detail
    assert "10%" in notice.detail


def test_the_outermost_cascade_holds_and_its_route_is_resolved() -> None:
    routes = router(chat=to("inner", cascade={"to": "strong"}), inner=to("tiny"), strong=to("large"))
    cascade = routes.plan(ask("chat"), None).cascade
    assert cascade is not None
    assert cascade.to == "large"
    embedding = EmbeddingRequest(Generation("chat", "id"), ["text"])
    assert routes.plan(embedding, None).cascade is None


def test_a_session_stays_with_its_target_and_shares_follow_the_weights() -> None:
    targets = [{"model": "large", "weight": 80}, {"model": "small", "weight": 20}]
    routes = router(chat={"targets": targets})
    drawn = {n: routes.plan(ask("chat", session=str(n)), None).steps[0].model for n in range(2000)}
    assert 0.16 < Counter(drawn.values())["small"] / 2000 < 0.24
    assert all(routes.plan(ask("chat", session=str(n)), None).steps[0].model == drawn[n] for n in range(200))

    targets[1]["weight"] = 40
    wider = router(chat={"targets": targets})
    moved = {n for n in drawn if wider.plan(ask("chat", session=str(n)), None).steps[0].model != drawn[n]}
    assert all(drawn[n] == "large" for n in moved)
    assert 0.09 < len(moved) / 2000 < 0.18  # from 20 of 100 to 40 of 120


def test_sticky_by_key_and_by_nothing() -> None:
    caller = Caller(key_id="k1")
    for sticky, count in (("key", 1), ("session", 1), ("none", 2)):
        routes = router(chat=to("large", "small", sticky=sticky))
        drawn = {routes.plan(ask("chat", caller=caller), None).steps[0].model for _ in range(100)}
        assert len(drawn) == count, sticky
    anonymous = router(chat=to("large", "small"))
    assert set().union(*(models(anonymous, "chat") for _ in range(100))) == {"large", "small"}

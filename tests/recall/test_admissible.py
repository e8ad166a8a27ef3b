"""Which requests may be given a kept answer, and whose: no answer crosses from one scope to another."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

from stockpot.caller import Caller
from stockpot.recall.admissible import Scopes, exact_refusal, scopes_of
from stockpot.recall.exact_key import exact_key, partition_key
from stockpot.requests import (
    ChatRequest,
    CompletionRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    Part,
    Sampling,
)
from stockpot.routing.plan import RoutePlan, Step
from stockpot.settings_recall import RecallSettings

GREEDY = Sampling(temperature=0.0)
ASKED = ChatRequest(Generation("m", "r", sampling=GREEDY), (Message("user", "hello"),))
SETTINGS = RecallSettings(exact=True)
GUARDED = RecallSettings(exact=True, untrusted_tags=("guest", "trial"))
APART = RecallSettings(exact=True, scope="key")


def asked(**change: Any) -> ChatRequest:
    return replace(ASKED, generation=replace(ASKED.generation, **change))


def caller(tenant: str, key_id: str, *tags: str) -> ChatRequest:
    return asked(tenant=tenant, caller=Caller(tenant, key_id, tags=tags))


def test_an_answer_is_kept_where_chance_has_no_part_in_it() -> None:
    assert exact_refusal(ASKED, SETTINGS) == ""
    assert exact_refusal(asked(sampling=Sampling(seed=7)), SETTINGS) == ""
    assert exact_refusal(asked(sampling=Sampling()), SETTINGS) == "sampled"
    assert exact_refusal(asked(sampling=Sampling()), RecallSettings(sampled=True)) == ""
    plain = CompletionRequest(Generation("m", "r"), "hello")
    assert exact_refusal(plain, SETTINGS) == "sampled"
    assert exact_refusal(replace(plain, generation=ASKED.generation), SETTINGS) == ""


def test_the_operator_chooses_models() -> None:
    assert exact_refusal(ASKED, RecallSettings(models=("m", "n"))) == ""
    assert exact_refusal(ASKED, RecallSettings(models=("n",))) == "model"
    assert exact_refusal(ASKED, RecallSettings(models=())) == "model"


@pytest.mark.parametrize(
    ("part", "refusal"),
    [
        (ImagePart(url="https://example.com/today.png"), "remote"),
        (ImagePart(media_type="image/png", data="AAAA"), ""),
        (OpaquePart("openai", {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}), ""),
        (OpaquePart("openai", {"type": "file", "file": {"file_id": "f-1"}}), "remote"),
        (OpaquePart("openai", {"type": "file", "file": {"file_data": "AAAA", "filename": "a.pdf"}}), ""),
        (
            OpaquePart("anthropic", {"type": "document", "source": {"type": "url", "url": "https://x"}}),
            "remote",
        ),
        (OpaquePart("anthropic", {"type": "document", "source": {"type": "text", "data": "hi"}}), ""),
        (OpaquePart("anthropic", {"type": "x", "content": [{"source": {"file_id": "f"}}]}), "remote"),
        (OpaquePart("anthropic", {"type": "thinking", "thinking": "hm", "signature": "AAAA"}), ""),
    ],
)
def test_what_lies_elsewhere_may_be_another_tomorrow(part: Part, refusal: str) -> None:
    assert exact_refusal(replace(ASKED, messages=(Message("user", "", parts=(part,)),)), SETTINGS) == refusal


def test_no_depth_is_too_deep() -> None:
    deep: dict[str, Any] = {"url": "https://x"}
    for _ in range(10_000):
        deep = {"content": [deep]}
    part = OpaquePart("anthropic", deep)
    assert exact_refusal(replace(ASKED, messages=(Message("user", "", parts=(part,)),)), SETTINGS) == "remote"
    while content := deep.get("content"):  # taken apart here: freeing it nested would recurse as deeply
        deep = content.pop()


@pytest.mark.parametrize("name", ["web_search_options", "mcp_servers", "container"])
def test_so_may_what_a_provider_finds(name: str) -> None:
    assert exact_refusal(asked(extras={name: {}}), SETTINGS) == "remote"
    assert exact_refusal(asked(extras={"effort": "low"}), SETTINGS) == ""


def test_a_tenant_shares_its_answers() -> None:
    assert scopes_of(ASKED, SETTINGS) == Scopes("", ("",))
    assert scopes_of(caller("acme", "k1"), SETTINGS) == Scopes("acme", ("acme",))
    assert scopes_of(caller("acme", "k1", "guest"), SETTINGS) == scopes_of(caller("acme", "k2"), SETTINGS)


def test_what_an_untrusted_key_causes_it_alone_is_given() -> None:
    own = "acme\0key:k1"
    assert scopes_of(caller("acme", "k1", "x", "trial"), GUARDED) == Scopes(own, (own, "acme"))
    assert scopes_of(caller("acme", "k1", "x"), GUARDED) == Scopes("acme", ("acme",))


def test_keys_are_kept_apart_where_the_operator_says_so() -> None:
    own = "acme\0key:k1"
    for tags in ((), ("guest",)):
        assert scopes_of(caller("acme", "k1", *tags), APART) == Scopes(own, (own,))


def test_no_tag_makes_more_trusted() -> None:
    """Tags come from the key and, after them, from a header; whatever a header adds."""
    for key_tags in ((), ("guest",), ("partner",)):
        for settings in (SETTINGS, GUARDED, APART):
            before = scopes_of(caller("acme", "k1", *key_tags), settings)
            for sent in ("guest", "trusted", "partner", "", "!guest", "acme", "\0key:k2"):
                after = scopes_of(caller("acme", "k1", *key_tags, sent), settings)
                assert after == before or after == Scopes("acme\0key:k1", ("acme\0key:k1", "acme"))


def test_who_has_no_key_has_no_scope_of_its_own() -> None:
    assert exact_refusal(caller("", ""), APART) == "no_key"
    assert exact_refusal(caller("", "", "guest"), GUARDED) == "no_key"
    assert exact_refusal(caller("", ""), GUARDED) == ""
    assert exact_refusal(caller("", "k1", "guest"), GUARDED) == ""


def test_no_name_is_taken_for_a_key_of_another_tenant() -> None:
    named = caller("acme\0key:k1", "k2")
    assert scopes_of(named, GUARDED).write != scopes_of(caller("acme", "k1", "guest"), GUARDED).write


@dataclass(frozen=True)
class Kept:
    """An answer, in a store that knows keys alone, as a store that forgot to compare scopes would."""

    tenant: str
    scope: str
    writer: str
    trusted: bool


TENANTS = ("", "a", "b", "a\0key:k1", "a\0", "key:k1", "ab", "b\0\0key:k2")
KEYS = ("k1", "k2", "k3", "")
TAGS = (
    ((), True),
    (("partner",), True),
    (("guest",), False),
    (("partner", "trial"), False),
)
QUESTIONS = ("hello", "a", "k1", "key:k1", "")
PLAN = RoutePlan("m", (Step("m"),), "least-load")


def random_requests(count: int, seed: int) -> Any:
    """Few of all kinds, so that most were asked before, by somebody."""
    chance = random.Random(seed)
    for _ in range(count):
        tenant, key_id = chance.choice(TENANTS), chance.choice(KEYS)
        tags, trusted = chance.choice(TAGS)
        generation = replace(
            ASKED.generation,
            tenant=tenant,
            caller=Caller(tenant, key_id, tags=tags),
            extras=chance.choice(({}, {"user": key_id}, {"scope": tenant})),
        )
        messages = tuple(
            Message("user" if index % 2 else "system", chance.choice(QUESTIONS)) for index in range(2)
        )
        settings = APART if chance.random() < 0.3 else GUARDED
        yield ChatRequest(generation, messages), settings, trusted


def test_no_answer_crosses_scopes_in_100_000_random_requests() -> None:
    kept: dict[bytes, Kept] = {}
    partitions: dict[bytes, str] = {}
    given = crossed = 0
    for request, settings, trusted in random_requests(100_000, seed=4):
        if exact_refusal(request, settings):
            continue
        scopes = scopes_of(request, settings)
        generation = request.generation
        who = generation.caller.key_id
        found = None
        for scope in scopes.read:
            key = exact_key(scope, PLAN, "1", request)
            assert key is not None
            found = found or kept.get(key)
            partition = partition_key(scope, PLAN, "1", request, "e", exact_context=True)
            assert partition is not None
            assert partitions.setdefault(partition, scope) == scope
        if found is not None:
            given += 1
            assert found.tenant == generation.tenant
            assert found.scope in scopes.read
            assert found.trusted or found.writer == who
            assert settings.scope == "tenant" or found.writer == who
            crossed += found.writer != who
            continue
        key = exact_key(scopes.write, PLAN, "1", request)
        assert key is not None
        assert key not in kept
        kept[key] = Kept(generation.tenant, scopes.write, who, trusted)
    # The test means something only if answers are given, also from one key to another.
    assert given > 50_000
    assert crossed > 10_000

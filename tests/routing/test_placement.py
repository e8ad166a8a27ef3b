"""Placement: each policy by its rule, and chat sessions on workers whose caches are simulated."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from stockpot.backends.fake import FakeBackend
from stockpot.clock import VirtualClock
from stockpot.errors import EngineFailed
from stockpot.kv.kv_event_publisher import KvEventPublisher
from stockpot.kv.kv_events import BlockStored
from stockpot.requests import AnyRequest, ChatRequest, EmbeddingRequest, Generation, Message
from stockpot.routing.member import Member
from stockpot.routing.placement import PrefixPlacement, open_placement
from stockpot.routing.plan import Candidate
from stockpot.settings_gateway import BackendSettings, Policy, RoutingSettings

MODEL = "fake"


def members(count: int) -> list[Member]:
    return [Member(name, FakeBackend(), None) for name in names(count)]


def names(count: int) -> list[str]:
    return [f"worker-{number}" for number in range(count)]


def idle(count: int) -> list[Candidate]:
    return [Candidate(name, 0) for name in names(count)]


def placement(count: int, **routing: Any) -> PrefixPlacement:
    return open_placement(members(count), RoutingSettings(**routing), VirtualClock())


def chat(*turns: str, session: str = "", system: str = "You help.") -> ChatRequest:
    """Turns of user and assistant in turn."""
    roles = ("user", "assistant")
    said = tuple(Message(roles[at % 2], text) for at, text in enumerate(turns))
    return ChatRequest(Generation(MODEL, "id", session=session), (Message("system", system), *said))


async def first(
    of: PrefixPlacement, request: AnyRequest, candidates: list[Candidate], policy: Policy = "prefix"
) -> str:
    order = await of.order(MODEL, request, candidates, policy)
    assert sorted(order) == sorted(candidate.name for candidate in candidates)
    return order[0]


async def test_round_robin_takes_turns() -> None:
    of = placement(3)
    taken = [await first(of, chat("a"), idle(3), "round-robin") for _ in range(6)]
    assert taken == names(3) * 2


async def test_least_load_counts_what_waits_and_turns_among_equals() -> None:
    of = placement(3)
    loads = [
        Candidate("worker-0", 2),
        Candidate("worker-1", 0, waiting=1),
        Candidate("worker-2", 0, waiting=4),
    ]
    for policy in ("least-load", "session"):
        assert await of.order(MODEL, chat("a"), loads, policy) == ["worker-1", "worker-0", "worker-2"]
    equal = Counter([await first(of, chat("a"), idle(3), "least-load") for _ in range(30)])
    assert set(equal.values()) == {10}


async def test_a_worker_that_leaves_moves_its_own_sessions_only() -> None:
    of = placement(4)
    asked = [chat("hi", session=f"s{number}") for number in range(200)]
    before = [await first(of, request, idle(4), "session") for request in asked]
    rest = [candidate for candidate in idle(4) if candidate.name != "worker-2"]
    after = [await first(of, request, rest, "session") for request in asked]
    assert all(a == b for b, a in zip(before, after, strict=True) if b != "worker-2")
    assert min(Counter(before).values()) > 25


async def test_a_favourite_that_is_overloaded_is_passed_over() -> None:
    of = placement(3)
    request = chat("hi", session="s")
    order = list(await of.order(MODEL, request, idle(3), "session"))
    busy = [Candidate(name, 20 if name == order[0] else 1) for name in names(3)]
    assert await of.order(MODEL, request, busy, "session") == [order[1], order[2], order[0]]


async def test_a_conversation_goes_on_where_it_was_unless_that_is_too_busy() -> None:
    of = placement(3, load_weight_tokens=100)
    begun = chat("x" * 2000, session="s")
    home = await first(of, begun, idle(3))
    of.placed(MODEL, begun, home)
    goes_on = chat("x" * 2000, "yes", "and?", session="s")
    assert await first(of, goes_on, idle(3)) == home
    for busy, stays in ((6, True), (8, False)):  # its 500 tokens are worth 5 requests, and 2 are free
        loads = [Candidate(name, busy if name == home else 0) for name in names(3)]
        assert (await first(of, goes_on, loads) == home) is stays


async def test_a_crowd_with_one_long_beginning_is_spread_by_load() -> None:
    of = placement(3)
    in_flight = Counter[str]()
    for number in range(60):
        request = chat(f"question {number}", system="s" * 16_000)
        name = await first(of, request, [Candidate(name, in_flight[name]) for name in names(3)])
        of.placed(MODEL, request, name)
        in_flight[name] += 1
    # The first has 4,000 tokens and draws 8 requests more than others, until these have them too.
    assert min(in_flight.values()) >= 15
    assert max(in_flight.values()) <= 25


async def test_embeddings_and_single_candidates_need_no_prefix() -> None:
    of = placement(2)
    embedding = EmbeddingRequest(Generation(MODEL, "id"), ["text"])
    loads = [Candidate("worker-0", 3), Candidate("worker-1", 1)]
    assert await first(of, embedding, loads) == "worker-1"
    of.placed(MODEL, embedding, "worker-1")
    assert await of.order(MODEL, chat("a"), loads[:1], "prefix") == ["worker-0"]
    assert await of.order(MODEL, chat("a"), [], "prefix") == []
    stranger = [Candidate("worker-1", 1), Candidate("worker-9", 0)]
    assert await first(of, chat("a"), stranger) == "worker-9"
    of.placed(MODEL, chat("a"), "worker-9")


async def test_knowledge_of_those_that_stay_is_kept() -> None:
    of = placement(2)
    request = chat("x" * 4000)
    of.placed(MODEL, request, "worker-1")
    await of.reconfigure([*members(2), Member("worker-7", FakeBackend(), None)])
    goes_on = chat("x" * 4000, "yes", "and?")
    assert await first(of, goes_on, [*idle(2), Candidate("worker-7", 0)]) == "worker-1"
    await of.reconfigure(members(1))
    await of.reconfigure(members(2))
    assert of.stats().members["worker-1"].links == 0


class Worker:
    """A prefix cache of so many tokens, in blocks of 16, by LRU."""

    def __init__(self, capacity_tokens: int) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._capacity = capacity_tokens // 16

    def serve(self, text: str) -> int:
        """Characters found in the cache; all of the text is in it afterwards."""
        keys = [hash(text[:end]) for end in range(64, len(text) + 1, 64)]
        found = 0
        while found < len(keys) and keys[found] in self._blocks:
            found += 1
        for key in reversed(keys):
            self._blocks.pop(key, None)
            self._blocks[key] = None
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return found * 64


async def cached_share(
    policy: Policy, count: int, *, capacity_tokens: int = 30_000, sessions: int = 40, turns: int = 6
) -> tuple[float, float]:
    """Chat sessions in turn, a few at a time, with one system prompt: the share of characters found cached,
    and the busiest worker's share of the requests."""
    of = placement(count)
    workers = {name: Worker(capacity_tokens) for name in names(count)}
    chance = random.Random(7)
    talks = {number: [f"{number} " + "question " * 60] for number in range(sessions)}
    pending = [number for number in talks for _ in range(turns)]
    chance.shuffle(pending)
    in_flight: list[str] = []
    found = total = 0
    served = Counter[str]()
    for number in pending:
        talk = talks[number]
        request = chat(*talk, session=f"s{number}", system="system " * 600)
        request = replace(request, generation=replace(request.generation, request_id=f"{number}-{len(talk)}"))
        name = await first(of, request, [Candidate(n, in_flight.count(n)) for n in names(count)], policy)
        of.placed(MODEL, request, name)
        text = "".join(message.content for message in request.messages)
        found += workers[name].serve(text)
        total += len(text)
        served[name] += 1
        in_flight = [*in_flight[-3:], name]
        talk += [f"answer {chance.random()} " * 30, f"next {chance.random()} " * 20]
    return found / total, max(served.values()) / sum(served.values())


@pytest.mark.parametrize("count", [2, 3])
async def test_sessions_find_far_more_cached_than_by_round_robin(count: int) -> None:
    by_prefix, busiest = await cached_share("prefix", count)
    by_turns, _ = await cached_share("round-robin", count)
    most, _ = await cached_share("round-robin", 1, capacity_tokens=10**9)
    assert most - by_prefix < 0.25 * (most - by_turns), (most, by_prefix, by_turns)
    assert busiest < 1.3 / count


class Tokenizer(FakeBackend):
    """A fake whose token ids cost, or are not to be had."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        super().__init__()
        self._before = answer
        self.calls = 0

    async def tokenize(
        self, model: str, content: str | ChatRequest, *, special: bool, tenant: str = ""
    ) -> list[int]:
        self.calls += 1
        await self._before()
        return await super().tokenize(model, content, special=special, tenant=tenant)


def telling(sources: Sequence[KvEventPublisher], backend: FakeBackend) -> list[Member]:
    return [
        Member(
            name,
            backend,
            BackendSettings(url="http://host", kv_events=source.endpoint, kv_replay=source.replay_endpoint),
        )
        for name, source in zip(names(len(sources)), sources, strict=True)
    ]


async def fail() -> None:
    raise EngineFailed("no ids today")


async def never() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("answer", [lambda: asyncio.sleep(0), fail, never])
async def test_events_say_where_a_prompt_is_and_the_estimate_stands_in(answer: Callable[[], Any]) -> None:
    sources = [KvEventPublisher("tcp://127.0.0.1:0", replay_endpoint="tcp://127.0.0.1:0") for _ in range(2)]
    for source in sources:
        source.start()
    backend = Tokenizer(answer)
    clock = VirtualClock()
    of = open_placement(telling(sources, backend), RoutingSettings(), clock)
    request = chat("x" * 4000, "yes", "and?")
    tokens = await FakeBackend().tokenize(MODEL, request, special=True)
    blocks = len(tokens) // 16
    sources[1].publish(
        [BlockStored(tuple(range(blocks)), None, tuple(tokens[: blocks * 16]), 16, None, "GPU", None)]
    )
    await of.start()
    try:
        async with asyncio.timeout(20):
            while not all((one := m.events) and one.live for m in of.stats().members.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (events := of.stats().members["worker-1"].events) and events.index.blocks == blocks
        of.placed(MODEL, request, "worker-0")
        clock.advance(60)  # sent there, but its events do not say so: evicted
        chosen = await asyncio.gather(*(first(of, request, idle(2)) for _ in range(3)))
        assert backend.calls == 1
        told = answer not in (fail, never)
        assert set(chosen) == {"worker-1" if told else "worker-0"}
        stats = of.stats()
        assert (stats.by_events, stats.by_estimate) == ((3, 0) if told else (0, 3))
        await first(of, request, idle(2))
        assert backend.calls == 1  # known, or left alone for a while
    finally:
        await of.stop()
        for source in sources:
            source.close()

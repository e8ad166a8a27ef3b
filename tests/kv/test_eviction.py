"""Every eviction policy: names what is live, once, leaves first; and each against what it claims."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stockpot.clock import VirtualClock
from stockpot.errors import ConfigurationError
from stockpot.kv.block import BlockId
from stockpot.kv.eviction import POLICY_NAMES, Candidate, EvictionPolicy, make_policy

TTL_S = 10.0


def block(number: int) -> BlockId:
    return BlockId(number.to_bytes(4, "big"))


def candidate(
    number: int, parent: int | None = None, *, size_bytes: int = 100, cost_s: float = 1.0
) -> Candidate:
    return Candidate(block(number), size_bytes, cost_s, None if parent is None else block(parent))


def policy_of(name: str) -> EvictionPolicy:
    return make_policy(name, VirtualClock(), ttl_s=TTL_S)


def order(policy: EvictionPolicy) -> list[int]:
    return [number_of(name) for name in policy.victims()]


def evict(policy: EvictionPolicy, pinned: Collection[int] = ()) -> int:
    victim = next(policy.victims(lambda name: number_of(name) not in pinned))
    policy.drop(victim)
    return number_of(victim)


def number_of(name: BlockId) -> int:
    return int.from_bytes(name, "big")


class PolicyMachine(RuleBasedStateMachine):
    """Random trees of blocks come, are used and go. `parents` is the model: what is live, and behind what."""

    @initialize(name=st.sampled_from(POLICY_NAMES))
    def begin(self, name: str) -> None:
        self.clock = VirtualClock()
        self.policy = make_policy(name, self.clock, ttl_s=TTL_S)
        self.twin = make_policy(name, self.clock, ttl_s=TTL_S)
        self.parents: dict[int, int | None] = {}
        self.used: dict[int, int] = {}
        self.used_s: dict[int, float] = {}
        self.counter = itertools.count()

    def both(self, method: str, *arguments: object) -> None:
        for policy in (self.policy, self.twin):
            getattr(policy, method)(*arguments)

    def mark(self, number: int) -> None:
        self.used[number] = next(self.counter)
        self.used_s[number] = self.clock.now_s

    def forget(self, number: int) -> None:
        self.both("drop", block(number))
        for known in (self.parents, self.used, self.used_s):
            known.pop(number, None)

    @rule(
        number=st.integers(0, 30),
        seed=st.integers(0, 99),
        size_bytes=st.integers(1, 9),
        cost=st.integers(0, 9),
    )
    def admit(self, number: int, seed: int, size_bytes: int, cost: int) -> None:
        # Ids are hashes of what stands before them, so a block always has the same parent, and no cycles.
        parent = None if number % 4 == 0 else (number * 7 + 1) % number
        self.both("admit", candidate(number, parent, size_bytes=size_bytes, cost_s=float(cost)))
        if number not in self.parents:
            self.parents[number] = parent
            self.mark(number)

    @rule(number=st.integers(0, 35))
    def hit(self, number: int) -> None:
        path: list[int] = []
        at: int | None = number
        while at is not None:
            path.append(at)
            at = self.parents.get(at)
        self.both("hit", [block(each) for each in path])
        for each in path:
            if each in self.parents:
                self.mark(each)

    @rule(number=st.integers(0, 35))
    def invalidate(self, number: int) -> None:
        self.forget(number)

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.parents)
    @rule(count=st.integers(1, 6), look=st.integers(0, 3))
    def evict_some(self, count: int, look: int) -> None:
        """Several victims of one walk, or one walk each: the same blocks. Looking further changes nothing."""
        count = min(count, len(self.parents))
        together = list(itertools.islice(self.policy.victims(), count))
        for victim in together:
            self.policy.drop(victim)
        single: list[BlockId] = []
        for _ in range(count):
            single.append(next(self.twin.victims()))
            self.twin.drop(single[-1])
        assert together == single
        if self.policy.name in ("lru", "ttl"):
            assert [number_of(victim) for victim in single] == self.oldest_leaves(count)
        for victim in single:
            self.forget(number_of(victim))
        list(itertools.islice(self.policy.victims(), look))

    def oldest_leaves(self, count: int) -> list[int]:
        live, gone = dict(self.parents), list[int]()
        for _ in range(count):
            leaves = live.keys() - set(live.values())
            gone.append(min(leaves, key=self.used.__getitem__))
            del live[gone[-1]]
        return gone

    @invariant()
    def names_each_live_block_once_children_first(self) -> None:
        if not hasattr(self, "policy"):
            return
        named = order(self.policy)
        assert named == order(self.twin)
        assert sorted(named) == sorted(self.parents)
        place = {number: index for index, number in enumerate(named)}
        for number, parent in self.parents.items():
            if parent in place:
                assert place[number] < place[parent]
        self.policy.check_integrity()

    @invariant()
    def names_what_expired(self) -> None:
        if not hasattr(self, "policy"):
            return
        expired = {number_of(name) for name in self.policy.expired(self.clock.monotonic())}
        too_old = {number for number, at in self.used_s.items() if at <= self.clock.now_s - TTL_S}
        if self.policy.name != "ttl":
            assert not expired
        else:
            assert expired <= too_old
            for number in too_old - expired:  # it waits for a child that may stay
                assert any(parent == number for child, parent in self.parents.items() if child not in expired)


PolicyMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPolicies = PolicyMachine.TestCase


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_full_tier_never_strands_a_child(name: str) -> None:
    """A chain behind one system prompt for each user, with room for half of it all, turn after turn."""
    policy = policy_of(name)
    kept: dict[int, int | None] = {}
    for turn in range(60):
        user = turn * 7 % 10
        path = [0, *range(1 + user * 10, 1 + user * 10 + turn // 8 + 1)]
        policy.hit([block(number) for number in reversed(path)])
        for place, number in enumerate(path):
            if number in kept:
                continue
            if len(kept) == 20:
                victim = evict(policy, path)
                assert victim not in kept.values(), f"{victim} went before what continues it"
                del kept[victim]
            parent = path[place - 1] if place else None
            assert parent is None or parent in kept
            policy.admit(candidate(number, parent))
            kept[number] = parent
    assert sorted(order(policy)) == sorted(kept)


def admitted(policy: EvictionPolicy, numbers: Sequence[int]) -> EvictionPolicy:
    for number in numbers:
        policy.admit(candidate(number))
    return policy


def test_lru_takes_what_was_unused_for_longest() -> None:
    policy = admitted(policy_of("lru"), [1, 2, 3])
    policy.hit([block(1)])
    assert order(policy) == [2, 3, 1]


def test_lifo_takes_the_newest_used_or_not() -> None:
    policy = admitted(policy_of("lifo"), [1, 2, 3])
    policy.hit([block(3)])
    assert order(policy) == [3, 2, 1]


def test_lfu_takes_the_least_used_and_forgets_old_fame() -> None:
    policy = admitted(policy_of("lfu"), [1, 2, 3])
    for _ in range(5):
        policy.hit([block(1)])
    policy.hit([block(2)])
    assert order(policy) == [3, 2, 1]
    # New blocks come and go, each after two uses; what was used six times long ago does not outlast them all.
    for number in range(10, 30):
        policy.admit(candidate(number))
        policy.hit([block(number)])
        evict(policy)
    assert block(1) not in set(policy.victims())


def test_invalidation_does_not_age_the_rest() -> None:
    policy = admitted(policy_of("lfu"), [1, 2])
    for _ in range(50):
        policy.hit([block(1)])
    policy.hit([block(2)])
    policy.drop(block(1))
    policy.admit(candidate(3))
    assert order(policy) == [3, 2]


def test_cost_keeps_what_saves_most_time_a_byte() -> None:
    policy = policy_of("cost")
    policy.admit(candidate(1, size_bytes=100, cost_s=2.5))
    policy.admit(candidate(2, size_bytes=100, cost_s=1.0))
    policy.admit(candidate(3, size_bytes=10, cost_s=1.0))
    assert order(policy) == [2, 1, 3]
    for _ in range(4):
        policy.hit([block(2)])
    assert order(policy) == [1, 2, 3]


def test_s3_fifo_lets_one_scan_pass() -> None:
    policy = admitted(policy_of("s3-fifo"), range(100))
    for _ in range(2):
        policy.hit([block(number) for number in range(100)])
    for number in range(1000, 2000):  # a scan: nothing of it is used again
        evict(policy)
        policy.admit(candidate(number))
    assert len(set(order(policy)) & set(range(100))) == 90  # the small queue is a tenth


def test_s3_fifo_remembers_what_left_and_keeps_it_on_return() -> None:
    policy = admitted(policy_of("s3-fifo"), range(20))
    assert evict(policy) == 0
    policy.admit(candidate(0))  # to the main queue: while the small one is full, it stays
    for number in range(50, 66):
        policy.admit(candidate(number))
        assert evict(policy) != 0


def test_ttl_expires_what_was_unused_too_long() -> None:
    clock = VirtualClock()
    policy = make_policy("ttl", clock, ttl_s=TTL_S)
    policy.admit(candidate(1))
    policy.admit(candidate(2, 1))
    policy.admit(candidate(3))
    clock.advance(6)
    policy.hit([block(3)])
    clock.advance(4)
    assert list(policy.expired(clock.monotonic())) == [block(2), block(1)]
    assert order(policy) == [2, 1, 3]
    assert not list(make_policy("lru", clock).expired(1e9))


def test_parents_may_come_after_their_children() -> None:
    policy = policy_of("lru")
    policy.admit(candidate(2, 1))
    policy.admit(candidate(3, 2))
    policy.admit(candidate(1))
    policy.admit(candidate(9, 8))  # whose parent never comes
    assert order(policy) == [3, 2, 1, 9]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_what_may_not_go_holds_what_it_stands_on(name: str) -> None:
    policy = policy_of(name)
    for number, parent in ((1, None), (2, 1), (3, 2), (4, 1), (5, 4)):
        policy.admit(candidate(number, parent))
    asked: list[int] = []

    def may_go(block_id: BlockId) -> bool:
        asked.append(number_of(block_id))
        return number_of(block_id) != 3

    assert [number_of(block_id) for block_id in policy.victims(may_go)] == [5, 4]
    assert sorted(asked) == [3, 4, 5]  # not 1 and 2: they cannot go before 3
    assert sorted(order(policy)) == [1, 2, 3, 4, 5]
    policy.check_integrity()


def test_a_walk_ends_where_the_policy_changes() -> None:
    policy = admitted(policy_of("lru"), [1, 2, 3])
    walk = policy.victims()
    policy.drop(next(walk))
    with pytest.raises(RuntimeError, match="changed while its victims were walked over"):
        next(walk)
    assert order(policy) == [2, 3]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_slots_of_blocks_that_left_do_not_pile_up(name: str) -> None:
    policy = policy_of(name)
    for number in range(20_000):  # invalidated, none evicted
        policy.admit(candidate(number))
        if number >= 10:
            policy.drop(block(number - 10))
    policy.check_integrity()
    assert len(order(policy)) == 10


def test_unknown_names_and_times_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no eviction policy 'mru': choose one of lru, lfu"):
        make_policy("mru", VirtualClock())
    with pytest.raises(ConfigurationError, match="give more than 0"):
        make_policy("ttl", VirtualClock(), ttl_s=0)

"""The store against a brute-force model: what it keeps is found to the exact token, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stockpot.clock import VirtualClock
from stockpot.engine.driver import Span
from stockpot.kv.block import (
    BlockId,
    Namespace,
    Scope,
    TokenKey,
    block_id,
    common_tokens,
    content_hash,
    root_id,
    token_key,
)
from stockpot.kv.eviction import POLICY_NAMES, make_policy
from stockpot.kv.invalidation import Invalidation
from stockpot.kv.promises import Labels, Promise
from stockpot.kv.ram import RamTier
from stockpot.kv.residents import Eviction, StoreObservers
from stockpot.kv.store import KVStore, Pin, StoreLimits

BLOCK = 4
BYTES_PER_TOKEN = 10


def key_of(tokens: list[int]) -> TokenKey:
    return token_key(np.array(tokens, np.int32))


def payload(tokens: list[int], span: Span) -> bytes:
    """Bytes that tell which prefix they belong to, `BYTES_PER_TOKEN` for each token."""
    return b"".join(
        repr(hash(tuple(tokens[: place + 1]))).encode()[-BYTES_PER_TOKEN:].rjust(BYTES_PER_TOKEN, b"0")
        for place in range(span.start, span.end)
    )


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@given(left=st.lists(st.integers(0, 2**20), max_size=9), right=st.lists(st.integers(0, 2**20), max_size=9))
def test_common_tokens_counts_whole_tokens(left: list[int], right: list[int]) -> None:
    expected = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        expected += 1
    assert common_tokens(key_of(left), key_of(right)) == expected


def test_ids_depend_on_everything_that_decides_the_bytes() -> None:
    facts = {"fingerprint": "f", "layout": "l", "adapter": "a", "scope": "s"}
    roots = {root_id(**facts)}
    for name in facts:
        roots.add(root_id(**{**facts, name: "other"}))
    roots.add(root_id(fingerprint="fl", layout="", adapter="a", scope="s"))
    assert len(roots) == 6
    parent = BlockId(b"p" * 32)
    assert block_id(parent, key_of([1, 2])) != block_id(parent, key_of([2, 1]))
    assert block_id(parent, key_of([1, 2])) == block_id(parent, key_of([1, 2]))


SPACE = Namespace("f", "l")
TENANTS = ("", "ann", "bob")


def make_store(
    capacity_tokens: int,
    *,
    policy: str = "lru",
    clock: VirtualClock | None = None,
    quotas: dict[str, int] | None = None,
    observers: StoreObservers | None = None,
) -> KVStore:
    clock = clock or VirtualClock(1000.0)
    return KVStore(
        SPACE,
        StoreLimits(BLOCK, quotas or {}),
        ram=RamTier(capacity_tokens * BYTES_PER_TOKEN),
        policy=make_policy(policy, clock),
        clock=clock,
        observers=observers,
    )


def put(store: KVStore, tokens: list[int], scope: Scope | None = None, labels: Labels | None = None) -> int:
    """Write what the store lacks of these tokens; how many blocks it kept."""
    scope, key = scope or store.scope(""), key_of(tokens)
    spans = store.missing(scope, key)
    blocks = [(span, payload(tokens, span)) for span in spans]
    return store.write(scope, key, blocks, labels or Labels(tenant=scope.tenant))


def found(store: KVStore, tokens: list[int], scope: Scope | None = None) -> int:
    return store.match(scope or store.scope(""), key_of(tokens)).tokens


class StoreMachine(RuleBasedStateMachine):
    """Random writes, reads, pins and clears of three tenants, with and without a shared beginning, compared
    with a plain list of what was written."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.evictions = 0
        self.clock = VirtualClock(1000.0)
        self.store = make_store(
            40, policy=self.policy, clock=self.clock, observers=StoreObservers(evicted=self.count)
        )
        self.written: list[tuple[str, int, list[int]]] = []
        self.pins: list[tuple[Pin, Scope, list[int], int]] = []

    def count(self, eviction: Eviction) -> None:
        assert eviction.blocks > 0
        assert eviction.size_bytes >= 0
        self.evictions += eviction.blocks

    def scope(self, tenant: str, shared: int, tokens: list[int]) -> Scope:
        return self.store.scope(tenant, key_of(tokens[:shared]))

    @rule(tenant=st.sampled_from(TENANTS), shared=st.integers(0, 7), tokens=TOKENS)
    def write(self, tenant: str, shared: int, tokens: list[int]) -> None:
        scope = self.scope(tenant, shared, tokens)
        kept = put(self.store, tokens, scope, Labels(tenant=tenant, shared_tokens=scope.shared_tokens))
        assert kept <= len(tokens)
        self.written.append((tenant, scope.shared_tokens, tokens))

    @rule(tenant=st.sampled_from(TENANTS), shared=st.integers(0, 7), tokens=TOKENS)
    def read(self, tenant: str, shared: int, tokens: list[int]) -> None:
        scope = self.scope(tenant, shared, tokens)
        match = self.store.match(scope, key_of(tokens))
        best = max((self.visible(scope, tokens, other) for other in self.written), default=0)
        assert match.tokens <= best
        if not self.evictions:
            assert match.tokens == best
        have = 0
        blocks = self.store.read(match, 0)
        # A block may reach beyond a shared beginning, whose private part begins within it.
        ends = [*(span.start for span, *_ in blocks[1:]), match.tokens][: len(blocks)]
        for (span, data, _), end in zip(blocks, ends, strict=True):
            assert span.start == have
            end = min(end, span.end)
            assert data[: (end - span.start) * BYTES_PER_TOKEN] == payload(tokens, Span(span.start, end))
            have = end
        assert have == match.tokens

    def visible(self, scope: Scope, tokens: list[int], other: tuple[str, int, list[int]]) -> int:
        """How much of another prompt this one may find: what both declared shared, and beyond it only the
        tenant's own behind the same shared beginning."""
        tenant, shared, written = other
        same = common(tokens, written)
        if tenant == scope.tenant and shared == scope.shared_tokens and same >= shared:
            return same
        if tenant == "" and not shared:  # a tenant without a name shares its root with what is shared
            return min(same, scope.shared_tokens) if scope.tenant or scope.shared_tokens else same
        if scope.tenant == "" and not scope.shared_tokens:
            return min(same, shared)
        return min(same, shared, scope.shared_tokens)

    @rule(tenant=st.sampled_from(TENANTS), tokens=TOKENS)
    @precondition(lambda self: len(self.pins) < 4)
    def pin(self, tenant: str, tokens: list[int]) -> None:
        scope = self.store.scope(tenant)
        match = self.store.match(scope, key_of(tokens))
        pin = self.store.pin(match)
        assert (pin is None) == (match.tokens == 0)
        if pin is not None:
            self.pins.append((pin, scope, tokens, match.tokens))

    @rule(index=st.integers(0, 3))
    @precondition(lambda self: bool(self.pins))
    def unpin(self, index: int) -> None:
        pin, *_ = self.pins.pop(index % len(self.pins))
        self.store.unpin(pin)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.evictions += 1

    @rule(tenant=st.sampled_from(TENANTS))
    def invalidate_tenant(self, tenant: str) -> None:
        self.store.invalidate([Invalidation(1, "tenant", tenant)])
        assert not [node for node in self.store.nodes() if node.head.tenant == tenant]
        self.evictions += 1
        self.pins = [pin for pin in self.pins if pin[1].tenant != tenant]

    @rule(seconds=st.floats(0, 400))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        if self.store.expire():
            self.evictions += 1

    @rule(tokens=st.integers(10, 50))
    def resize(self, tokens: int) -> None:
        self.store.resize(tokens * BYTES_PER_TOKEN)

    @invariant()
    def sound(self) -> None:
        self.store.check_integrity()
        for _, scope, tokens, kept in self.pins:
            assert self.store.match(scope, key_of(tokens)).tokens >= kept


def common(left: list[int], right: list[int]) -> int:
    return common_tokens(key_of(left), key_of(right))


def machine_with(name: str) -> type[StoreMachine]:
    return type(f"StoreMachine_{name}", (StoreMachine,), {"policy": name})


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_any_policy_keeps_the_store_sound(policy: str) -> None:
    run_state_machine_as_test(machine_with(policy))


def test_the_least_recently_used_leaf_goes_first() -> None:
    store = make_store(12)
    shared = [1, 1, 1, 1]
    for tail in ([2, 2, 2, 2], [3, 3, 3, 3]):
        put(store, shared + tail)
    store.unpin(store.pin(store.match(store.scope(""), key_of([*shared, 2, 2, 2, 2]))))
    put(store, [*shared, 4, 4, 4, 4])
    assert found(store, [*shared, 3, 3, 3, 3]) == 4
    assert found(store, [*shared, 2, 2, 2, 2]) == 8
    assert found(store, [*shared, 4, 4, 4, 4]) == 8
    assert store.evicted == {"capacity": 1}


def test_a_block_that_does_not_continue_what_is_kept_is_refused() -> None:
    store = make_store(100)
    with pytest.raises(ValueError, match="does not continue"):
        store.write(store.scope(""), key_of([1] * 8), [(Span(4, 8), b"x")], Labels())


def test_a_shared_beginning_is_found_by_all_and_what_follows_by_its_tenant_alone() -> None:
    store = make_store(100)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    ann, bob = (store.scope(name, key_of(prompt[:6])) for name in ("ann", "bob"))
    put(store, prompt, ann, Labels(tenant="ann", shared_tokens=6))
    assert found(store, prompt, ann) == 9
    assert found(store, prompt, bob) == 6
    assert found(store, prompt, store.scope("bob")) == 0
    assert found(store, prompt, store.scope("ann")) == 0
    assert {node.head.tenant for node in store.nodes()} == {"", "ann"}


def test_promises_hold_against_newer_blocks_until_they_end() -> None:
    clock = VirtualClock(1000.0)
    store = make_store(16, clock=clock)
    kept = [1, 1, 1, 1]
    put(store, kept, labels=Labels(promises=(Promise(4, 300),)))
    for number in range(2, 12):
        put(store, [number] * 4)
    assert found(store, kept) == 4
    clock.advance(200)
    store.label(store.match(store.scope(""), key_of(kept)), Labels(promises=(Promise(4, 300),)))
    clock.advance(200)
    for number in range(2, 12):
        put(store, [number] * 4)
    assert found(store, kept) == 4, "use renews the promise"
    clock.advance(301)
    for number in range(12, 22):
        put(store, [number] * 4)
    assert found(store, kept) == 0


def test_promises_take_half_of_ram_at_most() -> None:
    store = make_store(40)
    for number in range(1, 11):
        put(store, [number] * 4, labels=Labels(promises=(Promise(4, 300),)))
    assert store.promises.used_bytes <= 20 * BYTES_PER_TOKEN
    assert store.promises.refused
    for number in range(11, 21):
        assert put(store, [number] * 4) == 1


def test_a_tenant_over_its_quota_gives_up_its_own_blocks() -> None:
    store = make_store(100, quotas={"ann": 8 * BYTES_PER_TOKEN})
    put(store, [9] * 4, store.scope("bob"))
    for number in range(1, 5):
        put(store, [number] * 4, store.scope("ann"))
    assert store.tenant_bytes["ann"] == 8 * BYTES_PER_TOKEN
    assert found(store, [9] * 4, store.scope("bob")) == 4
    assert store.evicted == {"quota": 2}


def test_pressure_shrinks_ram_even_below_promises() -> None:
    store = make_store(40)
    put(store, [1] * 4, labels=Labels(promises=(Promise(4, 300),)))
    put(store, [2] * 4)
    store.resize(4 * BYTES_PER_TOKEN)
    assert found(store, [1] * 4) == 4
    store.resize(0)
    assert store.blocks == 0
    assert put(store, [3] * 4) == 0
    store.resize(40 * BYTES_PER_TOKEN)
    assert put(store, [3] * 4) == 1


def test_a_prefix_is_invalidated_with_all_that_stands_on_it() -> None:
    store = make_store(100)
    put(store, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3])
    put(store, [1, 1, 1, 1, 5, 5, 5, 5])
    prefix = key_of([1, 1, 1, 1, 2, 2])
    pinned = store.pin(store.match(store.scope(""), key_of([1, 1, 1, 1, 2, 2, 2, 2, 3, 3])))
    assert store.invalidate([Invalidation(1, "prefix", content_hash(prefix).hex(), tokens=6, by="ops")]) == 2
    store.unpin(pinned)
    assert found(store, [1, 1, 1, 1, 2, 2, 2, 2]) == 4
    assert found(store, [1, 1, 1, 1, 5, 5, 5, 5]) == 8
    store.check_integrity()

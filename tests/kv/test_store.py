"""The store against a brute-force model: what it keeps is found to the exact token, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stockpot.engine.driver import Span
from stockpot.kv.block import BlockId, TokenKey, block_id, common_tokens, root_id, token_key
from stockpot.kv.ram import RamTier
from stockpot.kv.store import KVStore, Pin

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


class StoreMachine(RuleBasedStateMachine):
    """Random writes, reads, pins and clears, compared with a plain list of what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.evictions = 0
        self.store = KVStore(
            root_id(fingerprint="f", layout="l"),
            block_tokens=BLOCK,
            ram=RamTier(40 * BYTES_PER_TOKEN),
            on_eviction=self.count,
        )
        self.written: list[list[int]] = []
        self.pins: list[tuple[Pin, list[int], int]] = []

    def count(self, blocks: int, size_bytes: int, cause: str) -> None:
        assert blocks > 0
        assert size_bytes >= 0
        assert cause in ("capacity", "cleared", "refused_pinned")
        self.evictions += blocks

    @rule(tokens=TOKENS)
    def write(self, tokens: list[int]) -> None:
        key = key_of(tokens)
        spans = self.store.missing(key)
        kept = self.store.write(key, [(span, payload(tokens, span)) for span in spans])
        assert kept <= len(spans)
        self.written.append(tokens)

    @rule(tokens=TOKENS)
    def read(self, tokens: list[int]) -> None:
        match = self.store.match(key_of(tokens))
        best = max((common(tokens, other) for other in self.written), default=0)
        assert match.tokens <= best
        if not self.evictions:
            assert match.tokens == best
        blocks = self.store.read(match, 0)
        data = b"".join(data for _, data in blocks)[: match.tokens * BYTES_PER_TOKEN]
        assert data == payload(tokens, Span(0, match.tokens))

    @rule(tokens=TOKENS)
    @precondition(lambda self: len(self.pins) < 4)
    def pin(self, tokens: list[int]) -> None:
        match = self.store.match(key_of(tokens))
        pin = self.store.pin(match)
        assert (pin is None) == (match.tokens == 0)
        if pin is not None:
            self.pins.append((pin, tokens, match.tokens))

    @rule(index=st.integers(0, 3))
    @precondition(lambda self: bool(self.pins))
    def unpin(self, index: int) -> None:
        pin, _, _ = self.pins.pop(index % len(self.pins))
        self.store.unpin(pin)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.evictions += 1

    @invariant()
    def sound(self) -> None:
        self.store.check_integrity()
        for _, tokens, kept in self.pins:
            assert self.store.match(key_of(tokens)).tokens >= kept


def common(left: list[int], right: list[int]) -> int:
    return common_tokens(key_of(left), key_of(right))


TestStore = StoreMachine.TestCase


def test_the_least_recently_used_leaf_goes_first() -> None:
    store = KVStore(
        root_id(fingerprint="f", layout="l"), block_tokens=BLOCK, ram=RamTier(12 * BYTES_PER_TOKEN)
    )
    shared = [1, 1, 1, 1]
    for tail in ([2, 2, 2, 2], [3, 3, 3, 3]):
        tokens = shared + tail
        spans = store.missing(key_of(tokens))
        store.write(key_of(tokens), [(span, payload(tokens, span)) for span in spans])
    store.unpin(store.pin(store.match(key_of([*shared, 2, 2, 2, 2]))))
    tokens = [*shared, 4, 4, 4, 4]
    store.write(key_of(tokens), [(span, payload(tokens, span)) for span in store.missing(key_of(tokens))])
    assert store.match(key_of([*shared, 3, 3, 3, 3])).tokens == 4
    assert store.match(key_of([*shared, 2, 2, 2, 2])).tokens == 8
    assert store.match(key_of(tokens)).tokens == 8
    assert store.evicted == {"capacity": 1}


def test_a_block_that_does_not_continue_what_is_kept_is_refused() -> None:
    store = KVStore(root_id(fingerprint="f", layout="l"), block_tokens=BLOCK, ram=RamTier(1000))
    with pytest.raises(ValueError, match="does not continue"):
        store.write(key_of([1] * 8), [(Span(4, 8), b"x")])

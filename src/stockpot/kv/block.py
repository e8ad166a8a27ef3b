"""Identity of a KV block: what it holds decides its name, the same on every node.

    root = H(model fingerprint, layout, adapter, scope)        id = H(parent id, token ids)

so an id stands for all tokens from the start of the sequence, computed by these weights, stored in this
layout, visible in this scope. H is BLAKE3 with 32 bytes: two different prefixes do not meet by accident,
nor by intent. Fields are length-prefixed, so that no two lists of fields give the same bytes.

The scope is a tenant. A prompt may begin with tokens that are declared shared by all tenants: these stand
under a root without a tenant, what follows under a private root made of the id of all shared tokens and the
tenant's name. So nobody's prompt can be found, or found to be cached, by another tenant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NewType

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

BlockId = NewType("BlockId", bytes)
TokenKey = NewType("TokenKey", bytes)
"""Token ids as big-endian 32-bit numbers: byte order is token order, four bytes a token."""
ContentHash = NewType("ContentHash", bytes)
"""Names the tokens from the start of a sequence alone: the same for every model, layout and scope."""

NO_TOKENS = TokenKey(b"")

TOKEN_BYTES = 4
ID_BYTES = 32

PROBE_TOKENS = (224, 192, 160, 128, 96, 64, 48, 32, 16, 8)
"""Beginnings of a block under which a tier that knows blocks by id finds it as well, longest first: so a
prompt that departs within a block finds that block, and a tail is found by what continues it."""


def root_id(*, fingerprint: str, layout: str, adapter: str = "", scope: str = "") -> BlockId:
    """The id that the first block of every sequence has as its parent."""
    return _digest(b"stockpot kv root v1", fingerprint, layout, adapter, scope)


def block_id(parent: BlockId, key: TokenKey) -> BlockId:
    """The id of the block that holds the tokens of `key` behind `parent`."""
    return BlockId(blake3(parent + key).digest())


def content_hash(key: TokenKey) -> ContentHash:
    """The hash of all tokens from the start of a sequence on."""
    return ContentHash(content_hasher(key).digest())


def content_hasher(key: TokenKey = NO_TOKENS) -> blake3:
    """`content_hash` in the making: update it with what follows."""
    return blake3(key, derive_key_context="stockpot kv content v1")


def aliases(parent: BlockId, key: TokenKey) -> tuple[tuple[int, BlockId], ...]:
    """The beginnings of a block as (tokens, id), longest first: each the id of a block of just these."""
    length = len(key) // TOKEN_BYTES
    return tuple(
        (tokens, block_id(parent, TokenKey(key[: tokens * TOKEN_BYTES])))
        for tokens in PROBE_TOKENS
        if tokens < length
    )


def token_key(tokens: NDArray[np.int32]) -> TokenKey:
    """The bytes tokens are compared and hashed by."""
    return TokenKey(tokens.astype(">u4").tobytes())


def tokens_of(key: TokenKey) -> NDArray[np.int32]:
    """The token ids of a key."""
    return np.frombuffer(key, dtype=">u4").astype(np.int32)


def common_tokens(left: TokenKey, right: TokenKey) -> int:
    """How many leading tokens two keys share."""
    shortest = min(len(left), len(right))
    difference = int.from_bytes(left[:shortest], "big") ^ int.from_bytes(right[:shortest], "big")
    same_bits = shortest * 8 - difference.bit_length()
    return same_bits // (8 * TOKEN_BYTES)


@dataclass(frozen=True, slots=True)
class Namespace:
    """All that decides the meaning of KV bytes besides the tokens: one model, stored in one layout."""

    fingerprint: str
    layout: str
    adapter: str = ""

    def root(self, tenant: str) -> BlockId:
        """The root of a tenant's prompts; "" is the root of all that is shared."""
        return root_id(fingerprint=self.fingerprint, layout=self.layout, adapter=self.adapter, scope=tenant)


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a prompt that stands under one root: its tokens behind those of `before`."""

    root: BlockId
    before: TokenKey
    key: TokenKey

    @property
    def start(self) -> int:
        """The position of the first token."""
        return len(self.before) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Scope:
    """Who may find a prompt's blocks: the first `shared_tokens` anyone, what follows the tenant alone.
    Made by `scope_of`."""

    tenant: str
    shared_tokens: int
    shared_root: BlockId
    private_root: BlockId

    def segments(self, key: TokenKey) -> tuple[Segment, ...]:
        """The tokens of a prompt (or of its beginning) by root, in order; none is empty."""
        cut = self.shared_tokens * TOKEN_BYTES
        shared = TokenKey(key[:cut])
        parts = (
            Segment(self.shared_root, NO_TOKENS, shared),
            Segment(self.private_root, shared, TokenKey(key[cut:])),
        )
        return tuple(part for part in parts if part.key)

    def common(self, other: Scope, tokens: int) -> int:
        """Of `tokens` equal leading tokens of two prompts, how many one may take from the other."""
        if self.tenant == other.tenant:
            return tokens
        return min(tokens, self.shared_tokens, other.shared_tokens)


def scope_of(namespace: Namespace, tenant: str, *, shared: TokenKey = NO_TOKENS, block_tokens: int) -> Scope:
    """The scope of a prompt of `tenant` that begins with the tokens of `shared`, declared shared."""
    if not shared:
        root = namespace.root(tenant)
        return Scope(tenant, 0, root, root)
    shared_root = namespace.root("")
    last = shared_root
    for _, key in cut_blocks(shared, block_tokens):
        last = block_id(last, key)
    private = _digest(b"stockpot kv private root v1", last.hex(), tenant)
    return Scope(tenant, len(shared) // TOKEN_BYTES, shared_root, private)


@dataclass(frozen=True, slots=True)
class Place:
    """One block of a prompt: what its id is made of, and the id."""

    parent: BlockId
    id: BlockId
    start: int
    key: TokenKey

    @property
    def end(self) -> int:
        return self.start + len(self.key) // TOKEN_BYTES


def chain(scope: Scope, key: TokenKey, block_tokens: int) -> Iterator[Place]:
    """All blocks of a prompt, in order."""
    for segment in scope.segments(key):
        parent = segment.root
        for at, piece in cut_blocks(segment.key, block_tokens):
            place = Place(parent, block_id(parent, piece), segment.start + at, piece)
            yield place
            parent = place.id


def cut_blocks(key: TokenKey, block_tokens: int) -> Iterator[tuple[int, TokenKey]]:
    """The blocks of a segment as (first token, tokens); the last may be shorter."""
    step = block_tokens * TOKEN_BYTES
    for at in range(0, len(key), step):
        yield at // TOKEN_BYTES, TokenKey(key[at : at + step])


def _digest(kind: bytes, *fields: str) -> BlockId:
    digest = blake3(kind)
    for field in fields:
        data = field.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return BlockId(digest.digest())

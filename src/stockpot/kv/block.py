"""Identity of a KV block: what it holds decides its name, the same on every node.

    root = H(model fingerprint, layout, adapter, scope)        id = H(parent id, token ids)

so an id stands for all tokens from the start of the sequence, computed by these weights, stored in this
layout, visible in this scope. H is BLAKE3 with 32 bytes: two different prefixes do not meet by accident,
nor by intent. Fields are length-prefixed, so that no two lists of fields give the same bytes.
"""

from __future__ import annotations

from typing import NewType

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

BlockId = NewType("BlockId", bytes)
TokenKey = NewType("TokenKey", bytes)
"""Token ids as big-endian 32-bit numbers: byte order is token order, four bytes a token."""

TOKEN_BYTES = 4


def root_id(*, fingerprint: str, layout: str, adapter: str = "", scope: str = "") -> BlockId:
    """The id that the first block of every sequence has as its parent."""
    digest = blake3(b"stockpot kv root v1")
    for field in (fingerprint, layout, adapter, scope):
        data = field.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return BlockId(digest.digest())


def block_id(parent: BlockId, key: TokenKey) -> BlockId:
    """The id of the block that holds the tokens of `key` behind `parent`."""
    return BlockId(blake3(parent + key).digest())


def token_key(tokens: NDArray[np.int32]) -> TokenKey:
    """The bytes tokens are compared and hashed by."""
    return TokenKey(tokens.astype(">u4").tobytes())


def common_tokens(left: TokenKey, right: TokenKey) -> int:
    """How many leading tokens two keys share."""
    shortest = min(len(left), len(right))
    difference = int.from_bytes(left[:shortest], "big") ^ int.from_bytes(right[:shortest], "big")
    same_bits = shortest * 8 - difference.bit_length()
    return same_bits // (8 * TOKEN_BYTES)

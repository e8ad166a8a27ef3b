"""The envelope: what was sealed is opened unchanged; anything else is refused, by cause, and never served."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.kv.block import (
    BlockId,
    ContentHash,
    TokenKey,
    aliases,
    block_id,
    content_hash,
    root_id,
    token_key,
)
from stockpot.kv.envelope import HEAD_AT, PREFIX, Sealer, Sealing
from stockpot.kv.tier import Block, BlockHead, Refused

SECRET = b"a secret of the kitchen"
OPEN = Sealing()
SIGNED = Sealing(SECRET)
CLOSED = Sealing(SECRET, encrypt=True)
ALL = pytest.mark.parametrize("sealing", [OPEN, SIGNED, CLOSED], ids=["checksum", "mac", "cipher"])


def sealer(sealing: Sealing = OPEN, *, fingerprint: str = "model", layout: str = "layout") -> Sealer:
    return Sealer(sealing, fingerprint=fingerprint, layout=layout)


def block(tokens: list[int], data: bytes = b"keys and values", **facts: object) -> Block:
    parent, key = root_id(fingerprint="model", layout="layout"), token_key(np.array(tokens, np.int32))
    head = BlockHead(
        id=block_id(parent, key),
        parent=parent,
        start=0,
        tokens=key,
        content=content_hash(key),
        fingerprint="model",
        layout="layout",
        aliases=aliases(parent, key),
    )
    return Block(replace(head, **facts), data)


def cause(found: Block | Refused) -> str:
    return found.cause if isinstance(found, Refused) else "served"


BLOCKS = st.builds(
    block,
    st.lists(st.integers(0, 2**31 - 1), max_size=40),
    st.binary(max_size=200),
    start=st.integers(0, 2**40),
    content=st.binary(min_size=32, max_size=32).map(ContentHash),
    tenant=st.text(max_size=20),
    tags=st.frozensets(st.text(max_size=5), max_size=4),
    epoch=st.integers(0, 2**60),
    created_s=st.floats(0, 4e9),
    kept_until_s=st.floats(0, 4e9),
)


@ALL
@given(block=BLOCKS)
def test_what_is_sealed_is_opened_unchanged(sealing: Sealing, block: Block) -> None:
    envelope = sealer(sealing).seal(block)
    assert sealer(sealing).open(block.head.id, b"".join(envelope)) == block
    assert sealer(sealing).open_parts(block.head.id, *envelope) == block


@ALL
def test_the_head_is_read_from_the_beginning_alone(sealing: Sealing) -> None:
    sealed = block(list(range(256)), bytes(5000), tenant="t", tags=frozenset({"a"}), kept_until_s=7.5)
    envelope = b"".join(sealer(sealing).seal(sealed))
    reader = sealer(sealing, fingerprint="another model")
    measures = reader.measure(sealed.head.id, envelope[:HEAD_AT])
    assert not isinstance(measures, Refused)
    assert (measures.tokens, measures.data_bytes, measures.size_bytes) == (256, 5000, len(envelope))
    beginning = envelope[: HEAD_AT + measures.head_bytes]
    assert reader.head(sealed.head.id, measures, beginning) == replace(sealed.head, tokens=TokenKey(b""))
    for at in range(PREFIX.size, len(beginning)):
        changed = bytearray(beginning)
        changed[at] ^= 1
        assert isinstance(reader.head(sealed.head.id, measures, bytes(changed)), Refused)


@ALL
def test_kv_bytes_are_not_copied_unless_encrypted(sealing: Sealing) -> None:
    sealed = block([1, 2, 3])
    _, data, _ = parts = sealer(sealing).seal(sealed)
    assert (data is sealed.data) is not sealing.encrypt
    opened = sealer(sealing).open_parts(sealed.head.id, *parts)
    assert isinstance(opened, Block)
    assert (opened.data is data) is not sealing.encrypt


@ALL
def test_every_changed_byte_is_refused(sealing: Sealing) -> None:
    sealed = block([5, 6, 7, 8], bytes(range(64)), tags=frozenset({"t"}))
    envelope = b"".join(sealer(sealing).seal(sealed))
    for at in range(len(envelope)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(envelope)
            changed[at] ^= flip
            assert isinstance(sealer(sealing).open(sealed.head.id, bytes(changed)), Refused), at


@ALL
@given(block=BLOCKS, place=st.data())
def test_cut_lengthened_and_spliced_envelopes_are_refused(
    sealing: Sealing, block: Block, place: st.DataObject
) -> None:
    envelope = b"".join(sealer(sealing).seal(block))
    at = place.draw(st.integers(0, len(envelope) - 1))
    reader = sealer(sealing)
    assert cause(reader.open(block.head.id, envelope[:at])) == "truncated"
    assert cause(reader.open(block.head.id, envelope + envelope[:at] + b"x")) == "truncated"
    assert isinstance(reader.open(block.head.id, envelope[at:] + envelope[:at]), Refused) or at == 0
    junk = place.draw(st.binary(max_size=300))
    assert isinstance(reader.open(block.head.id, junk), Refused)


@ALL
def test_the_envelope_of_another_block_is_refused(sealing: Sealing) -> None:
    one, other = block([1, 2], b"one"), block([1, 3], b"two")
    writer = sealer(sealing)
    refused = writer.open(one.head.id, b"".join(writer.seal(other)))
    # Encrypted, the id is bound to the ciphertext: it does not even decrypt.
    assert cause(refused) == ("cipher" if sealing.encrypt else "id")
    front, _, _ = writer.seal(one)
    _, data, trailer = writer.seal(other)
    assert isinstance(writer.open_parts(one.head.id, front, data, trailer), Refused)


def test_each_cause_is_named() -> None:
    sealed = block([1, 2, 3])
    wanted = sealed.head.id

    def opened(writer: Sealing, reader: Sealer) -> str:
        return cause(reader.open(wanted, b"".join(sealer(writer).seal(sealed))))

    assert opened(SIGNED, sealer(OPEN)) == "mac", "no secret here"
    assert opened(OPEN, sealer(SIGNED)) == "mac", "no way down to a checksum"
    assert opened(SIGNED, sealer(Sealing(b"another secret, as long"))) == "mac"
    assert opened(CLOSED, sealer(Sealing(b"another secret, as long", encrypt=True))) == "mac"
    assert opened(CLOSED, sealer(OPEN)) == "mac"
    assert opened(CLOSED, sealer(SIGNED)) == "cipher"
    assert opened(SIGNED, sealer(CLOSED)) == "cipher", "no way down to plaintext"
    assert opened(OPEN, sealer(OPEN, fingerprint="other")) == "model"
    assert opened(OPEN, sealer(OPEN, layout="other")) == "layout"
    envelope = b"".join(sealer().seal(sealed))
    assert cause(sealer().open(wanted, b"GGUF" + envelope[4:])) == "version"
    assert cause(sealer().open(wanted, envelope[:4] + b"\x02" + envelope[5:])) == "version"
    assert cause(sealer().open(wanted, envelope[:-1] + b"\x00" + envelope[-1:])) == "truncated"
    assert cause(sealer().open(wanted, envelope[:-33] + b"!" + envelope[-32:])) == "checksum"


def test_tokens_that_are_not_those_of_the_id_are_refused() -> None:
    """By somebody who may seal, but whose chain of ids is wrong."""
    honest = block([1, 2, 3])
    wrong = Block(replace(honest.head, tokens=block([1, 2, 4]).head.tokens), honest.data)
    assert cause(sealer(SIGNED).open(honest.head.id, b"".join(sealer(SIGNED).seal(wrong)))) == "tokens"
    wrong = Block(replace(honest.head, parent=BlockId(b"p" * 32)), honest.data)
    assert cause(sealer(SIGNED).open(honest.head.id, b"".join(sealer(SIGNED).seal(wrong)))) == "tokens"


def test_encrypted_envelopes_show_neither_tokens_nor_data() -> None:
    sealed = block([70_000 + place for place in range(16)], b"what the prompt tells" * 10)
    envelope = b"".join(sealer(CLOSED).seal(sealed))
    assert sealed.head.tokens[:8] not in envelope
    assert b"prompt" not in envelope
    assert SECRET not in envelope
    again = b"".join(sealer(CLOSED).seal(sealed))
    assert envelope[HEAD_AT:] != again[HEAD_AT:], "a nonce was used twice"
    assert sealed.head.tokens in b"".join(sealer(SIGNED).seal(sealed))


def test_lengths_no_writer_makes_are_refused_before_anything_is_read() -> None:
    prefix = PREFIX.pack(b"SPKV", 1, 0, 0, 10, 8, 2**60, bytes(12))
    refused = sealer().measure(BlockId(bytes(32)), prefix + bytes(32))
    assert isinstance(refused, Refused)
    assert refused.cause == "truncated"


def test_secrets_that_protect_nothing_are_not_taken() -> None:
    with pytest.raises(ValueError, match="needs a secret"):
        Sealing(encrypt=True)
    with pytest.raises(ValueError, match="16 random bytes"):
        Sealing(b"short")

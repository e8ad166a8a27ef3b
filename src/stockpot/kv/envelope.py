"""The envelope of a block outside this process: what is not verified is refused, by cause.

    magic, version, flags, lengths, nonce | head digest | head | token ids, KV bytes [, GCM tag] | tag

The tag is BLAKE3 over all bytes before it, keyed where a secret is configured; without one it finds damage,
not malice. The head digest, keyed alike, lets an index be built from the beginnings of envelopes. With
encryption token ids and KV bytes are under AES-256-GCM with a random nonce (NIST SP 800-38D: at most 2^32
blocks under one secret); block id and head are bound to them as associated data, the tag covers the
ciphertext.

There is no way down: who has a secret refuses what is not sealed with it, who encrypts refuses plaintext.
Nothing of an envelope is parsed before its digest or tag was found right, but for the lengths.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from stockpot.kv.block import ID_BYTES, TOKEN_BYTES, BlockId, ContentHash, TokenKey, block_id
from stockpot.kv.tier import Block, BlockHead, Refusal, Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.modes import GCM

Buffer = bytes | memoryview

MAGIC = b"SPKV"
VERSION = 1
PREFIX = struct.Struct(">4sBBHIIQ12s")
"""Magic, version, flags, zero, bytes of the head, of the token ids, of the KV bytes; nonce."""
DIGEST_BYTES = 32
HEAD_AT = PREFIX.size + DIGEST_BYTES
GCM_TAG_BYTES = 16

MAC = 1
CIPHER = 2

LONGEST_HEAD_BYTES = 1 << 20
LONGEST_TOKENS_BYTES = 1 << 22
LONGEST_DATA_BYTES = 1 << 30
"""No writer makes longer ones: a reader does not allocate whatever a forged length asks for."""


@dataclass(frozen=True, slots=True)
class Sealing:
    """How blocks are protected: against damage, with a `secret` (16 bytes or more) also against forgers, with
    `encrypt` also against readers."""

    secret: bytes | None = None
    encrypt: bool = False

    def __post_init__(self) -> None:
        if self.encrypt and self.secret is None:
            raise ValueError("encryption of blocks needs a secret: configure one, or turn encryption off")
        if self.secret is not None and len(self.secret) < 16:
            raise ValueError(f"the secret has {len(self.secret)} bytes: use 16 random bytes or more")


@dataclass(frozen=True, slots=True)
class Measures:
    """Where the parts of an envelope lie, as its first bytes say."""

    flags: int
    nonce: bytes
    head_bytes: int
    tokens_bytes: int
    data_bytes: int

    @property
    def tokens(self) -> int:
        return self.tokens_bytes // TOKEN_BYTES

    @property
    def data_at(self) -> int:
        """Where the KV bytes begin: the front of the envelope ends."""
        return HEAD_AT + self.head_bytes + self.tokens_bytes

    @property
    def trailer_at(self) -> int:
        """Where the KV bytes end."""
        return self.data_at + self.data_bytes

    @property
    def size_bytes(self) -> int:
        """Of the whole envelope."""
        return self.trailer_at + (GCM_TAG_BYTES if self.flags & CIPHER else 0) + DIGEST_BYTES


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """A BlockHead without its tokens, as it is written. Another order or another field: another VERSION."""

    id: bytes
    parent: bytes
    start: int
    content: bytes
    fingerprint: str
    layout: str
    tenant: str
    tags: list[str]
    epoch: int
    created_s: float
    kept_until_s: float
    aliases: list[tuple[int, bytes]]


class _Refusal(Exception):
    def __init__(self, cause: Refusal, detail: str) -> None:
        super().__init__(detail)
        self.cause: Refusal = cause
        self.detail = detail


class Sealer:
    """Seals blocks and opens envelopes of one model in one layout. Keeps no state: any thread may use it."""

    def __init__(self, sealing: Sealing, *, fingerprint: str, layout: str) -> None:
        self.fingerprint = fingerprint
        self.layout = layout
        self.keyed = sealing.secret is not None
        self._flags = (MAC if sealing.secret is not None else 0) | (CIPHER if sealing.encrypt else 0)
        self._tag_key = _derived(sealing.secret, "stockpot kv envelope tag v1")
        self._head_key = _derived(sealing.secret, "stockpot kv envelope head v1")
        self._cipher = _cipher(_derived(sealing.secret, "stockpot kv envelope cipher v1"), sealing.encrypt)
        self._decoder = msgspec.msgpack.Decoder(_Head)

    def seal(self, block: Block) -> tuple[bytes, ...]:
        """Front, KV bytes and trailer, whose concatenation is the envelope. Without encryption the KV bytes
        are `block.data` itself, not copied."""
        packed = _packed(block.head)
        tokens, data = bytes(block.head.tokens), block.data
        _check_lengths(len(packed), len(tokens), len(data))
        nonce = os.urandom(12) if self._cipher else bytes(12)
        prefix = PREFIX.pack(MAGIC, VERSION, self._flags, 0, len(packed), len(tokens), len(data), nonce)
        gcm_tag = b""
        if self._cipher:
            encryptor = self._cipher(nonce, None).encryptor()
            encryptor.authenticate_additional_data(block.head.id + packed)
            tokens, data = encryptor.update(tokens), encryptor.update(data)
            encryptor.finalize()
            gcm_tag = encryptor.tag
        front = b"".join((prefix, self._head_digest(prefix, packed), packed, tokens))
        return front, data, gcm_tag + self._tag(front, data, gcm_tag)

    def open(self, wanted: BlockId, envelope: Buffer) -> Block | Refused:
        """The block, its KV bytes copied out of the envelope; or why it is not the wanted one, verified."""
        measures = self.measure(wanted, envelope)
        if isinstance(measures, Refused):
            return measures
        view = memoryview(envelope)
        front, data = view[: measures.data_at], view[measures.data_at : measures.trailer_at]
        return self.open_parts(wanted, front, data, view[measures.trailer_at :])

    def open_parts(
        self, wanted: BlockId, front: Buffer, data: Buffer, trailer: Buffer, *, any_model: bool = False
    ) -> Block | Refused:
        """As `open`, of an envelope in three parts cut as its `Measures` say. KV bytes that are not encrypted
        and come as `bytes` are handed out as they are. `any_model` leaves out whose they are."""
        try:
            measures = self._measured(front)
            if (len(front), len(data)) != (measures.data_at, measures.data_bytes) or (
                len(front) + len(data) + len(trailer) != measures.size_bytes
            ):
                size_bytes = len(front) + len(data) + len(trailer)
                raise _Refusal("truncated", f"{size_bytes} bytes, its head says {measures.size_bytes}")
            block = self._verified(wanted, measures, front, data, trailer)
            if not any_model:
                self._check_ours(block.head)
        except _Refusal as refusal:
            return Refused(wanted, refusal.cause, refusal.detail)
        return block

    def measure(self, wanted: BlockId, beginning: Buffer) -> Measures | Refused:
        """What the first `HEAD_AT` bytes say, not yet verified; refused if this reader takes no such
        envelope."""
        try:
            return self._measured(beginning)
        except _Refusal as refusal:
            return Refused(wanted, refusal.cause, refusal.detail)

    def head(self, wanted: BlockId, measures: Measures, beginning: Buffer) -> BlockHead | Refused:
        """The head, without tokens, from the first `HEAD_AT + measures.head_bytes` bytes, verified by its
        digest. That of another model is as good as ours."""
        prefix, digest = bytes(beginning[: PREFIX.size]), beginning[PREFIX.size : HEAD_AT]
        packed = bytes(beginning[HEAD_AT : HEAD_AT + measures.head_bytes])
        try:
            if len(packed) != measures.head_bytes:
                raise _Refusal("truncated", f"{len(beginning)} bytes, its head goes on behind them")
            if not compare_digest(self._head_digest(prefix, packed), digest):
                raise self._changed()
            return self._unpacked(wanted, packed, TokenKey(b""))
        except _Refusal as refusal:
            return Refused(wanted, refusal.cause, refusal.detail)

    def _measured(self, beginning: Buffer) -> Measures:
        if len(beginning) < HEAD_AT:
            raise _Refusal("truncated", f"{len(beginning)} bytes, without a head {HEAD_AT}")
        magic, version, flags, zero, head, tokens, data, nonce = PREFIX.unpack_from(beginning)
        if magic != MAGIC or version != VERSION or zero:
            raise _Refusal("version", f"begins with {bytes(beginning[:8]).hex()}")
        if flags & MAC != self._flags & MAC:
            raise _Refusal("mac", "has no MAC" if self._flags & MAC else "has a MAC; no secret is configured")
        if flags != self._flags:
            raise _Refusal("cipher", f"has flags {flags:#x}, this reader takes {self._flags:#x}")
        try:
            _check_lengths(head, tokens, data)
        except ValueError as error:
            raise _Refusal("truncated", str(error)) from error
        return Measures(flags, nonce, head, tokens, data)

    def _verified(
        self, wanted: BlockId, measures: Measures, front: Buffer, data: Buffer, trailer: Buffer
    ) -> Block:
        gcm_tag, tag = bytes(trailer[:-DIGEST_BYTES]), trailer[-DIGEST_BYTES:]
        if not compare_digest(self._tag(front, data, gcm_tag), tag):
            raise self._changed()
        packed = bytes(front[HEAD_AT : HEAD_AT + measures.head_bytes])
        tokens = bytes(front[HEAD_AT + measures.head_bytes :])
        if self._cipher:
            tokens, data = _decrypted(self._cipher(measures.nonce, gcm_tag), wanted + packed, tokens, data)
        head = self._unpacked(wanted, packed, TokenKey(tokens))
        if block_id(head.parent, head.tokens) != wanted:
            raise _Refusal("tokens", f"its {measures.tokens} tokens give another id")
        return Block(head, data if isinstance(data, bytes) else bytes(data))

    def _unpacked(self, wanted: BlockId, packed: bytes, tokens: TokenKey) -> BlockHead:
        try:
            raw = self._decoder.decode(packed)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Refusal("version", f"its head does not read: {error}") from error
        if raw.id != wanted or len(raw.parent) != ID_BYTES:
            raise _Refusal("id", f"the envelope of {raw.id.hex()}")
        return BlockHead(
            id=wanted,
            parent=BlockId(raw.parent),
            start=raw.start,
            tokens=tokens,
            content=ContentHash(raw.content),
            fingerprint=raw.fingerprint,
            layout=raw.layout,
            tenant=raw.tenant,
            tags=frozenset(raw.tags),
            epoch=raw.epoch,
            created_s=raw.created_s,
            kept_until_s=raw.kept_until_s,
            aliases=tuple((tokens, BlockId(alias)) for tokens, alias in raw.aliases),
        )

    def _check_ours(self, head: BlockHead) -> None:
        if head.fingerprint != self.fingerprint:
            raise _Refusal("model", f"computed by {head.fingerprint}, not {self.fingerprint}")
        if head.layout != self.layout:
            raise _Refusal("layout", f"stored as {head.layout}, not {self.layout}")

    def _head_digest(self, prefix: bytes, packed: bytes) -> bytes:
        return blake3(prefix + packed, key=self._head_key).digest()

    def _tag(self, *parts: Buffer) -> bytes:
        digest = blake3(key=self._tag_key)
        for part in parts:
            digest.update(part)
        return digest.digest()

    def _changed(self) -> _Refusal:
        return _Refusal(
            "mac" if self._flags & MAC else "checksum", "its bytes are not those that were sealed"
        )


def _packed(head: BlockHead) -> bytes:
    raw = _Head(
        id=head.id,
        parent=head.parent,
        start=head.start,
        content=head.content,
        fingerprint=head.fingerprint,
        layout=head.layout,
        tenant=head.tenant,
        tags=sorted(head.tags),
        epoch=head.epoch,
        created_s=head.created_s,
        kept_until_s=head.kept_until_s,
        aliases=list(head.aliases),
    )
    return msgspec.msgpack.encode(raw)


def _check_lengths(head_bytes: int, tokens_bytes: int, data_bytes: int) -> None:
    if (
        head_bytes > LONGEST_HEAD_BYTES
        or tokens_bytes > LONGEST_TOKENS_BYTES
        or tokens_bytes % TOKEN_BYTES
        or data_bytes > LONGEST_DATA_BYTES
    ):
        raise ValueError(
            f"an envelope of {head_bytes} + {tokens_bytes} + {data_bytes} bytes: at most "
            f"{LONGEST_HEAD_BYTES} + {LONGEST_TOKENS_BYTES} + {LONGEST_DATA_BYTES}, in whole tokens"
        )


def _derived(secret: bytes | None, purpose: str) -> bytes:
    """A key for one purpose. The one derived of no secret is known to everybody and guards against damage."""
    return blake3(secret or b"", derive_key_context=purpose).digest()


def _cipher(key: bytes, encrypt: bool) -> Callable[[bytes, bytes | None], Cipher[GCM]] | None:
    """Makes the AES-256-GCM of a nonce and, to decrypt, a tag."""
    if not encrypt:
        return None
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return lambda nonce, tag: Cipher(algorithms.AES(key), modes.GCM(nonce, tag))


def _decrypted(cipher: Cipher[GCM], bound: bytes, tokens: bytes, data: Buffer) -> tuple[bytes, bytes]:
    from cryptography.exceptions import InvalidTag

    decryptor = cipher.decryptor()
    decryptor.authenticate_additional_data(bound)
    plain = decryptor.update(tokens), decryptor.update(data)
    try:
        decryptor.finalize()
    except InvalidTag as error:
        raise _Refusal("cipher", "its ciphertext is not that of this id and head") from error
    return plain

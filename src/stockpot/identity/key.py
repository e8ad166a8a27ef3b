"""What a virtual key looks like: `sk-sp-ID-SECRET`. The id is no secret, the rest is.

The secret is 32 random bytes, and that is why a single SHA-256 of the key is stored: slow hashes (bcrypt,
Argon2) protect words that people chose and that can be guessed; nobody guesses 256 random bits.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string

_ID_LENGTH = 12
# What the name of a tenant may consist of, and nothing a command line takes for an option.
_ID_LETTERS = string.ascii_lowercase + string.digits
_SECRET_BYTES = 32
_FORM = re.compile(rf"sk-sp-([a-z0-9]{{{_ID_LENGTH}}})-[A-Za-z0-9_-]{{43}}")


def new_key_id() -> str:
    """An id that no other key has (62 random bits)."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))


def new_key(key_id: str) -> str:
    """A key with this id and a fresh secret."""
    return f"sk-sp-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"


def key_id_of(key: str) -> str | None:
    """The id in a key; None for what does not look like one."""
    match = _FORM.fullmatch(key)
    return match[1] if match else None


def digest_of(key: str) -> str:
    """What is stored of a key: SHA-256, in hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()

"""One answer that is kept, with what it answers and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """`key` is a digest (32 bytes) of the scope and all that decides the answer: two requests with one key
    are the same request. `scope` is who may be given it, `writer` the id of the virtual key that caused it
    ("": none). Times are wall times, in seconds.

    `answer` is the answer's events (`answer.pack`); `usage` tokens and `cost_nanousd` are what making it
    took, and so what giving it again saves. The rest is there where similar questions may be answered with
    it: `partition` (16 bytes: all that must be equal), the question, the conversation before it where that
    need only be alike, and the unit vector of the question (float32, little-endian).
    """

    key: bytes
    scope: str
    tenant: str
    writer: str
    model: str
    created_at: float
    expires_at: float
    answer: bytes
    prompt_tokens: int
    completion_tokens: int
    cost_nanousd: int
    duration_s: float
    tags: frozenset[str] = frozenset()
    partition: bytes = b""
    question: str = ""
    context: str = ""
    vector: bytes = b""

    @property
    def id(self) -> str:
        """How the entry is known outside: 32 hexadecimal digits, which are no secret and open nothing."""
        return entry_id(self.key)

    @property
    def size_bytes(self) -> int:
        """What it takes to keep, near enough."""
        return 512 + len(self.answer) + len(self.vector) + 2 * (len(self.question) + len(self.context))


def entry_id(key: bytes) -> str:
    """See `Entry.id`."""
    return key[:16].hex()


@dataclass(frozen=True, slots=True)
class Selector:
    """Which entries to invalidate: those that fit all that is given. At least one must be; `everything` is
    given alone."""

    id: str | None = None
    tag: str | None = None
    model: str | None = None
    tenant: str | None = None
    writer: str | None = None
    before: float | None = None
    everything: bool = False

    def fits(self, entry: Entry) -> bool:
        if self.everything:
            return True
        return (
            (self.id is None or self.id == entry.id)
            and (self.tag is None or self.tag in entry.tags)
            and (self.model is None or self.model == entry.model)
            and (self.tenant is None or self.tenant == entry.tenant)
            and (self.writer is None or self.writer == entry.writer)
            and (self.before is None or entry.created_at < self.before)
        )

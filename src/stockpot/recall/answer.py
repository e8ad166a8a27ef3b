"""An answer as it is kept: recorded from its events while they pass, and played again as the same events.

    format (1 byte)  blake3 of what follows (8 bytes)  deflated MessagePack of `StoredAnswer`

What comes once for each piece of text stands in columns; what is rare stands apart, with its place among the
pieces. Nothing of it is normalised: an answer is given again piece by piece as it came. Deflating halves an
answer of 4,500 characters in 65 us, and it is back in 25 us.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import blake3
import msgspec

from stockpot.events import (
    CacheTier,
    Completed,
    Delta,
    Event,
    Finished,
    FinishReason,
    Queued,
    Started,
    Timings,
    TokenDetail,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from stockpot.requests import GenerationRequest

_FORMAT = b"\x01"
_CHECKSUM_BYTES = 8
_LONGEST_BYTES = 2**26
"""Before deflating. None longer is kept: a forged one does not get more memory than that."""

_WHOLE: frozenset[FinishReason] = frozenset(("stop", "tool_calls"))
"""The ends of an answer that says all it has to say."""


class DamagedAnswer(ValueError):
    """What is kept is not the answer that was kept, or of another version of this program: a miss."""


class _Token(msgspec.Struct, frozen=True, array_like=True):
    id: int
    data: bytes
    logprob: float


class _Detail(msgspec.Struct, frozen=True, array_like=True):
    chosen: _Token
    top: list[_Token]


class _Call(msgspec.Struct, frozen=True, array_like=True):
    index: int
    id: str | None
    name: str | None
    arguments: str


class _Rare(msgspec.Struct, frozen=True, array_like=True):
    """What piece `at` has beside text and tokens."""

    at: int
    reasoning: str
    refusal: str
    signature: str
    calls: list[_Call]
    details: list[_Detail]


class _End(msgspec.Struct, frozen=True, array_like=True):
    """The end of a choice, before piece `at`."""

    at: int
    choice: int
    reason: FinishReason
    detail: str | None
    stop_sequence: str | None


class StoredAnswer(msgspec.Struct, frozen=True, array_like=True):
    """`choices`, `texts` and `token_counts` have one entry for each piece (`Delta`), `token_ids` those of all
    pieces in turn. `rare` and `ends` are ordered by place. The counts are those of the answer's `Usage`."""

    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    reasoning_tokens: int | None
    choices: list[int]
    texts: list[str]
    token_counts: list[int]
    token_ids: list[int]
    rare: list[_Rare]
    ends: list[_End]


def pack(events: Iterable[Event]) -> bytes:
    """The events of one answer as they are kept. Raises ValueError where `Completed` is not among them, or
    something has no binary form (half a surrogate pair, an integer of more than 64 bits)."""
    columns = _Columns()
    for event in events:
        columns.take(event)
    return _sealed(columns.encoded())


def unpack(data: bytes) -> StoredAnswer:
    """What `pack` was given. Raises DamagedAnswer."""
    if data[:1] != _FORMAT:
        raise DamagedAnswer(f"a kept answer has format {data[:1].hex() or 'none'}, not {_FORMAT.hex()}")
    deflated = memoryview(data)[1 + _CHECKSUM_BYTES :]
    if _checksum(deflated) != data[1 : 1 + _CHECKSUM_BYTES]:
        raise DamagedAnswer(f"a kept answer of {len(data)} bytes does not fit its checksum")
    try:
        inflating = zlib.decompressobj()
        body = inflating.decompress(deflated, _LONGEST_BYTES)
        answer = msgspec.msgpack.decode(body, type=StoredAnswer)
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedAnswer(f"a kept answer cannot be read: {error}") from error
    if not (inflating.eof and _is_consistent(answer)):
        raise DamagedAnswer("the columns of a kept answer do not fit each other")
    return answer


def replay(answer: StoredAnswer, request: GenerationRequest) -> Iterator[Event]:
    """The answer's events once more, in their order, as those of a request whose whole prompt was cached.

    Times are nothing; what `promised_tokens` says depends on whether this request has boundaries (nothing was
    computed for them).
    """
    cached: dict[CacheTier, int] = {"answer": answer.prompt_tokens}
    yield Queued(0)
    yield Started(answer.prompt_tokens, cached, 0.0)
    yield from _content(answer)
    usage = Usage(
        answer.prompt_tokens,
        cached,
        answer.completion_tokens,
        promised_tokens={} if request.boundaries else None,
        estimated=answer.estimated,
        reasoning_tokens=answer.reasoning_tokens,
    )
    yield Completed(usage, Timings(0.0, 0.0, 0.0))


def text_of(answer: StoredAnswer) -> str:
    """What the first choice says."""
    pieces = zip(answer.choices, answer.texts, strict=True)
    return "".join(text for choice, text in pieces if choice == 0)


class Recorder:
    """Sees the events of one answer pass, and has at the end what is kept of it, if it is one to keep.

    It is where each of the `choices` (None: those that were seen) ended by itself, having said something: not
    one that was cut off, filtered, cancelled or failed, and none that only refuses or is empty, which another
    try may mend. One of more than `bytes_max` (before deflating) is let go as soon as that is seen. `why_not`
    is a word for programs once it is not to be kept: the reason it ended for, too_long, refused, empty,
    incomplete or no_form.
    """

    def __init__(self, bytes_max: int, choices: int | None = None) -> None:
        self.why_not = ""
        self._bytes_max = bytes_max
        self._choices = choices
        self._columns = _Columns()
        self._begun: set[int] = set()
        self._said: set[int] = set()
        self._refused: set[int] = set()
        self._ended: set[int] = set()

    def saw(self, event: Event) -> None:
        """To be called with each event, in order. Takes a time that does not grow with the answer."""
        if self.why_not:
            return
        if isinstance(event, Delta):
            self._begun.add(event.choice)
            if event.text or event.tool_calls:
                self._said.add(event.choice)
            elif event.refusal:
                self._refused.add(event.choice)
        elif isinstance(event, Finished):
            self._ended.add(event.choice)
            if event.reason not in _WHOLE:
                self._give_up(event.reason)
                return
        self._columns.take(event)
        if self._columns.size_bytes > self._bytes_max:
            self._give_up("too_long")

    def answer(self) -> bytes | None:
        """What is kept; None: `why_not`."""
        if self.why_not:
            return None
        wanted = self._begun | self._ended if self._choices is None else set(range(self._choices))
        if not (wanted and self._columns.is_complete and self._ended == wanted >= self._begun):
            return self._give_up("incomplete")
        if silent := wanted - self._said:
            return self._give_up("refused" if silent & self._refused else "empty")
        try:
            encoded = self._columns.encoded()
        except ValueError:
            return self._give_up("no_form")
        if len(encoded) > min(self._bytes_max, _LONGEST_BYTES):
            return self._give_up("too_long")
        return _sealed(encoded)

    def _give_up(self, why_not: str) -> None:
        self.why_not = why_not
        self._columns = _Columns()


class _Columns:
    """A `StoredAnswer` in the making. `size_bytes` is what it takes at least, a few times that at most."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._choices: list[int] = []
        self._texts: list[str] = []
        self._token_counts: list[int] = []
        self._token_ids: list[int] = []
        self._rare: list[_Rare] = []
        self._ends: list[_End] = []
        self._usage: Usage | None = None

    @property
    def is_complete(self) -> bool:
        return self._usage is not None

    def take(self, event: Event) -> None:
        if isinstance(event, Delta):
            if event.reasoning or event.refusal or event.signature or event.tool_calls or event.details:
                self._take_rare(event)
            self._choices.append(event.choice)
            self._texts.append(event.text)
            self._token_counts.append(len(event.token_ids))
            self._token_ids.extend(event.token_ids)
            self.size_bytes += 3 + len(event.text) + len(event.token_ids)
        elif isinstance(event, Finished):
            end = _End(len(self._texts), event.choice, event.reason, event.detail, event.stop_sequence)
            self._ends.append(end)
        elif isinstance(event, Completed):
            self._usage = event.usage

    def encoded(self) -> bytes:
        """Raises ValueError as of `pack`."""
        usage = self._usage
        if usage is None:
            raise ValueError("an answer is kept when it is complete, and this one has no `Completed`")
        answer = StoredAnswer(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.estimated,
            usage.reasoning_tokens,
            self._choices,
            self._texts,
            self._token_counts,
            self._token_ids,
            self._rare,
            self._ends,
        )
        try:
            return msgspec.msgpack.encode(answer)
        except OverflowError as error:
            raise ValueError(f"an answer has no binary form: {error}") from error

    def _take_rare(self, event: Delta) -> None:
        calls = [_Call(call.index, call.id, call.name, call.arguments) for call in event.tool_calls]
        details = [
            _Detail(_token(detail.chosen), [_token(token) for token in detail.top])
            for detail in event.details
        ]
        self._rare.append(
            _Rare(len(self._texts), event.reasoning, event.refusal, event.signature, calls, details)
        )
        self.size_bytes += 6 + len(event.reasoning) + len(event.refusal) + len(event.signature)
        self.size_bytes += sum(4 + len(call.arguments) for call in calls)
        for detail in details:
            self.size_bytes += sum(13 + len(token.data) for token in (detail.chosen, *detail.top))


def _content(answer: StoredAnswer) -> Iterator[Delta | Finished]:
    rare = {each.at: each for each in answer.rare}
    ends = iter(answer.ends)
    end = next(ends, None)
    ids, first = answer.token_ids, 0
    pieces = zip(answer.choices, answer.texts, answer.token_counts, strict=True)
    for at, (choice, text, count) in enumerate(pieces):
        while end is not None and end.at == at:
            yield _finished(end)
            end = next(ends, None)
        token_ids = tuple(ids[first : first + count])
        first += count
        more = rare.get(at)
        yield Delta(choice, text, token_ids) if more is None else _delta(choice, text, token_ids, more)
    while end is not None:
        yield _finished(end)
        end = next(ends, None)


def _delta(choice: int, text: str, token_ids: tuple[int, ...], more: _Rare) -> Delta:
    return Delta(
        choice,
        text,
        token_ids,
        tuple(
            TokenDetail(_logprob(detail.chosen), tuple(_logprob(token) for token in detail.top))
            for detail in more.details
        ),
        more.reasoning,
        more.refusal,
        tuple(ToolCallDelta(call.index, call.id, call.name, call.arguments) for call in more.calls),
        more.signature,
    )


def _finished(end: _End) -> Finished:
    return Finished(end.choice, end.reason, end.detail, end.stop_sequence)


def _token(token: TokenLogprob) -> _Token:
    return _Token(token.token_id, token.data, token.logprob)


def _logprob(token: _Token) -> TokenLogprob:
    return TokenLogprob(token.id, token.data, token.logprob)


def _sealed(encoded: bytes) -> bytes:
    deflated = zlib.compress(encoded, 1)
    return _FORMAT + _checksum(deflated) + deflated


def _checksum(deflated: bytes | memoryview) -> bytes:
    return blake3.blake3(deflated).digest(_CHECKSUM_BYTES)


def _is_consistent(answer: StoredAnswer) -> bool:
    """Whether `replay` can play it."""
    pieces = len(answer.texts)
    places = [each.at for each in answer.rare]
    ends = [each.at for each in answer.ends]
    return (
        pieces == len(answer.choices) == len(answer.token_counts)
        and min(answer.token_counts, default=0) >= 0
        and sum(answer.token_counts) == len(answer.token_ids)
        and _are_ordered(places, 0, pieces - 1)
        and len(set(places)) == len(places)
        and _are_ordered(ends, 0, pieces)
    )


def _are_ordered(places: Sequence[int], lowest: int, highest: int) -> bool:
    return not places or (lowest <= places[0] and places[-1] <= highest and sorted(places) == places)

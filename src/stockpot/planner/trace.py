"""Traces: recorded streams of requests, each the path of blocks its prompt stands for, in order of time.

Three public ones are read, from a folder the user gives:

- `conversation`: mooncake_conversation_trace.jsonl (Qin et al., "Mooncake", FAST 2025). `hash_ids` name
  blocks of 512 tokens, each by all that stands before it. Every block counts as full.
- `coding`: cc_sessions_compact_*.jsonl.gz, sessions of a coding agent, recorded one by one. When each began
  is not known: they are spread evenly at random, from a seed, over a time in which `SessionOverlap.at_once`
  run at once on average. Blocks of 64 tokens are joined to larger ones, and what does not fill one is left
  out, as a store of such blocks would. Sessions share nothing, as ids are local; real ones would share more.
- `rag`: ragpulse/0_trace.jsonl and five tables (RAGPulse). A prompt is its components in the order system
  prompt, passages, history, web search, user input. Each is one block of its own length, named by all that
  stands before it.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import msgspec
from blake3 import blake3

from stockpot.errors import ConfigurationError
from stockpot.kv.block import BlockId

TraceName = Literal["conversation", "coding", "rag"]
TRACE_NAMES: tuple[TraceName, ...] = get_args(TraceName)

_MOONCAKE_BLOCK_TOKENS = 512
_CODING_BLOCK_TOKENS = 64
_RAG_TABLES = {
    "1_sys_prompt.jsonl": "sys_prompt_id",
    "2_passages.jsonl": "passage_id",
    "3_history.jsonl": "history_id",
    "4_user_input.jsonl": "user_input_id",
    "5_web_search.jsonl": "web_search_id",
}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TraceBlock:
    """A block of a trace: its tokens, the position of the first, and the block it continues."""

    tokens: int
    start: int
    parent: BlockId | None


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A prompt: when it came, and its blocks from the first on."""

    time_s: float
    path: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time, and every block they name."""

    name: str
    requests: tuple[TraceRequest, ...]
    blocks: Mapping[BlockId, TraceBlock]

    @property
    def references(self) -> int:
        """How many blocks all prompts together are."""
        return sum(len(request.path) for request in self.requests)

    @property
    def unique_tokens(self) -> int:
        """Tokens of all blocks, each counted once: what a cache that never evicts would hold."""
        return sum(block.tokens for block in self.blocks.values())

    @property
    def uniform(self) -> bool:
        """Whether all blocks have the same length."""
        return len({block.tokens for block in self.blocks.values()}) <= 1

    def head(self, requests: int) -> Trace:
        """The first requests alone."""
        kept = self.requests[:requests]
        return Trace(self.name, kept, {block: self.blocks[block] for each in kept for block in each.path})


@dataclass(frozen=True, slots=True)
class SessionOverlap:
    """How the sessions of the coding trace meet, and in blocks of how many tokens (a multiple of 64)."""

    at_once: float = 16.0
    seed: int = 5
    block_tokens: int = 1024


def read_trace(name: TraceName, folder: Path, overlap: SessionOverlap | None = None) -> Trace:
    """Read a trace. Raises ConfigurationError where its files are absent or are not what they should be."""
    match name:
        case "conversation":
            return _read_conversation(folder / "mooncake_conversation_trace.jsonl")
        case "coding":
            return _read_coding(folder, overlap or SessionOverlap())
        case "rag":
            return _read_rag(folder / "ragpulse")


class _Builder:
    """Collects requests and what is known of their blocks."""

    def __init__(self) -> None:
        self.blocks: dict[BlockId, TraceBlock] = {}
        self.requests: list[TraceRequest] = []

    def add(self, time_s: float, path: list[tuple[BlockId, int]]) -> None:
        """A prompt of blocks (id, tokens). An id that stands behind another parent than before is refused."""
        parent: BlockId | None = None
        start = 0
        for block, tokens in path:
            known = self.blocks.get(block)
            if known is None:
                self.blocks[block] = TraceBlock(tokens, start, parent)
            elif known.parent != parent:
                raise ValueError("a block stands behind two different ones: its ids do not name prefixes")
            parent, start = block, start + tokens
        self.requests.append(TraceRequest(time_s, tuple([block for block, _ in path])))

    def trace(self, name: TraceName) -> Trace:
        ordered = sorted(self.requests, key=lambda request: request.time_s)
        return Trace(name, tuple(ordered), self.blocks)


class _ConversationLine(msgspec.Struct):
    timestamp: float  # milliseconds
    hash_ids: list[int]


def _read_conversation(path: Path) -> Trace:
    builder = _Builder()
    names = _Names()

    def add(line: _ConversationLine) -> None:
        blocks = [(names.of(number), _MOONCAKE_BLOCK_TOKENS) for number in line.hash_ids]
        builder.add(line.timestamp / 1000, blocks)

    _each(path, _ConversationLine, add)
    return builder.trace("conversation")


class _CodingRequest(msgspec.Struct):
    t: float  # seconds since the session began
    k: int  # leading blocks shared with the previous request of the same agent
    n: list[int]  # ids of the following blocks: start, count, start, count, ...
    s: str | None = None  # sub-agent


class _CodingSession(msgspec.Struct):
    id: str
    block_size: int
    requests: list[_CodingRequest]


def _read_coding(folder: Path, overlap: SessionOverlap) -> Trace:
    joined, rest = divmod(overlap.block_tokens, _CODING_BLOCK_TOKENS)
    if rest or not joined:
        raise ConfigurationError(
            f"the coding trace has blocks of {_CODING_BLOCK_TOKENS} tokens; {overlap.block_tokens} is no "
            "multiple of that"
        )
    sessions: list[_CodingSession] = []
    paths = sorted(folder.glob("cc_sessions_compact_*.jsonl.gz"))
    for path in paths or [folder / "cc_sessions_compact_0.jsonl.gz"]:
        _each(path, _CodingSession, sessions.append)
    for session in sessions:
        if session.block_size != _CODING_BLOCK_TOKENS or not session.requests:
            raise ConfigurationError(
                f"session {session.id} has {len(session.requests)} requests in blocks of "
                f"{session.block_size} tokens; at least one in blocks of {_CODING_BLOCK_TOKENS} is read here"
            )
    all_s = sum(session.requests[-1].t for session in sessions)
    chance = random.Random(overlap.seed)
    builder = _Builder()
    for number, session in enumerate(sessions):
        begin_s = chance.uniform(0, all_s / overlap.at_once)
        names = _Names(number)
        for request, ids in _coding_paths(session):
            # A block is named by the last of those it joins, which stands for all that comes before.
            blocks = [(names.of(last), overlap.block_tokens) for last in ids[joined - 1 :: joined]]
            if blocks:
                builder.add(begin_s + request.t, blocks)
    return builder.trace("coding")


def _coding_paths(session: _CodingSession) -> Iterator[tuple[_CodingRequest, list[int]]]:
    """The requests of a session with their block ids."""
    before: dict[str | None, list[int]] = {}
    for request in session.requests:
        ids = before.get(request.s, [])[: request.k]
        for start, count in zip(request.n[::2], request.n[1::2], strict=True):
            ids.extend(range(start, start + count))
        before[request.s] = ids
        yield request, ids


class _RagComponents(msgspec.Struct):
    sys_prompt: list[int]
    passages_ids: list[int]
    history: list[int]
    web_search: list[int]
    user_input: list[int]

    def in_order(self) -> list[int]:
        return self.sys_prompt + self.passages_ids + self.history + self.web_search + self.user_input


class _RagLine(msgspec.Struct):
    timestamp: str  # seconds
    hash_ids: _RagComponents


def _read_rag(folder: Path) -> Trace:
    tokens: dict[int, int] = {}
    for name, key in _RAG_TABLES.items():
        for number, row in _lines(folder / name, dict[str, int]):
            if key not in row or "token_length" not in row:
                raise _damaged(folder / name, number, f"{key} or token_length is missing")
            tokens[row[key]] = row["token_length"]
    builder = _Builder()

    def add(line: _RagLine) -> None:
        blocks: list[tuple[BlockId, int]] = []
        name = b""
        for component in line.hash_ids.in_order():
            if component not in tokens:
                raise ValueError(f"component {component} is in none of the tables")
            name = blake3(name + component.to_bytes(8, "big")).digest()
            blocks.append((BlockId(name), tokens[component]))
        builder.add(float(line.timestamp), blocks)

    _each(folder / "0_trace.jsonl", _RagLine, add)
    return builder.trace("rag")


class _Names:
    """Block ids of the numbers a trace uses, each made once: they are held by millions of references."""

    def __init__(self, scope: int = 0) -> None:
        self._scope = scope.to_bytes(4, "big")
        self._names: dict[int, BlockId] = {}

    def of(self, number: int) -> BlockId:
        name = self._names.get(number)
        if name is None:
            name = self._names[number] = BlockId(self._scope + number.to_bytes(8, "big"))
        return name


def _each(path: Path, kind: type[_T], use: Callable[[_T], object]) -> None:
    for number, line in _lines(path, kind):
        try:
            use(line)
        except (ValueError, OverflowError) as error:
            raise _damaged(path, number, str(error)) from error


def _lines(path: Path, kind: type[_T]) -> Iterator[tuple[int, _T]]:
    """The lines of a JSONL file that are not blank, with their numbers."""
    decoder = msgspec.json.Decoder(kind)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        decoded = decoder.decode(line)
                    except msgspec.DecodeError as error:
                        raise _damaged(path, number, str(error)) from error
                    yield number, decoded
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"no trace at {path}. Traces are not part of Stockpot: benchmarks/eviction/README.md says where "
            "they come from; give the folder that holds them"
        ) from error
    except (OSError, EOFError) as error:
        raise ConfigurationError(f"the trace {path} cannot be read ({error}); fetch it again") from error


def _damaged(path: Path, number: int, what: str) -> ConfigurationError:
    return ConfigurationError(f"line {number} of {path} is not what is read here ({what}); fetch it again")

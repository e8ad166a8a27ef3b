"""Who goes when a tier is full: the seam to eviction policies, and the policies.

A block without its parent cannot be reached, so only leaves of the prefix tree may go. A policy is told each
block's parent and ranks leaves alone: a FIFO does not walk past the parents, which came first, to find one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

from stockpot.clock import Clock
from stockpot.errors import ConfigurationError
from stockpot.kv.block import BlockId
from stockpot.kv.eviction_queue import Entry, LeafQueue

PolicyName = Literal["lru", "lfu", "s3-fifo", "lifo", "ttl", "cost"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
DEFAULT_TTL_S = 300.0

_MOST_USES = 3
"""Uses are counted up to this: enough to tell what comes back, and soon forgotten. Counted without end, the
prompts of a session that is over stay in the way (`benchmarks/eviction`)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy may know of a block. `cost_s` is the estimated time to recompute it. `parent` is the
    block it continues: None, or one that is not kept, makes it stand alone."""

    id: BlockId
    size_bytes: int
    cost_s: float
    parent: BlockId | None = None


class EvictionPolicy(ABC):
    """Ranks the blocks of one tier. It evicts nothing: whoever owns the tier asks for `victims`, takes those
    it may evict, and tells with `drop`. Not safe for several threads at once; the owner of the tier locks."""

    name: PolicyName

    @abstractmethod
    def admit(self, block: Candidate) -> None:
        """A block was written. One that is known already stays as it is. Parents need not come first."""

    @abstractmethod
    def hit(self, path: Sequence[BlockId]) -> None:
        """A prompt used these blocks, deepest first: so a parent ends up at least as valuable as its
        children. Unknown ones are skipped."""

    @abstractmethod
    def drop(self, block: BlockId) -> None:
        """A block left, whatever the reason. Harmless for an unknown one."""

    @abstractmethod
    def victims(self, may_go: Callable[[BlockId], bool] | None = None) -> Iterator[BlockId]:
        """Every block once, in the order in which they should go, children before their parents.

        Each is named as if those before it were gone, so any number may be taken from the front. A block that
        may not go (a pinned one) is left out, and so are those it stands on; `may_go` is asked only about
        blocks that nothing left stands on. The first costs O(log n), amortised, and as much for each that may
        not go before it. Stop before calling anything else here: going on after that raises RuntimeError.
        """

    def expired(self, now_s: float) -> Iterator[BlockId]:
        """Blocks too old to be kept at `now_s` (`Clock.monotonic`), even where there is room; rules as for
        `victims`. None by most policies."""
        del now_s
        return iter(())

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant of the policy does not hold."""


def make_policy(name: str, clock: Clock, *, ttl_s: float = DEFAULT_TTL_S) -> EvictionPolicy:
    """The policy of that name (`POLICY_NAMES`). `ttl_s`, for "ttl" alone: how long a block is kept unused.

    Raises ConfigurationError for another name, or a time that is not positive.
    """
    makers: dict[str, Callable[[], EvictionPolicy]] = {
        "lru": LruPolicy,
        "lfu": LfuPolicy,
        "s3-fifo": S3FifoPolicy,
        "lifo": LifoPolicy,
        "ttl": lambda: TtlPolicy(clock, ttl_s),
        "cost": CostPolicy,
    }
    if name not in makers:
        raise ConfigurationError(f"no eviction policy {name!r}: choose one of {', '.join(POLICY_NAMES)}")
    return makers[name]()


class _LeafPolicy(EvictionPolicy):
    """What all policies here share: the tree, as far as it decides who is a leaf, and the walk over victims.

    A victim the caller went past is set aside as if it were gone, so that its parent may be named; one that
    may not go leaves its queue and holds its parent. The next call puts all of them back where they were.
    """

    def __init__(self) -> None:
        self._entries: dict[BlockId, Entry] = {}
        self._children: dict[BlockId, int] = {}
        """How many blocks that are not set aside continue this one, which need not be here itself."""
        self._aside: list[Entry] = []
        self._held: list[Entry] = []
        self._changes = 0
        self._walks = 0
        self._last_place = 0

    def admit(self, block: Candidate) -> None:
        self._changed()
        if block.id in self._entries:
            return
        entry = Entry(block.id, block.parent, block.size_bytes, self._worth(block))
        self._entries[block.id] = entry
        entry.queue = self._enter(entry)
        self._put(entry)

    def hit(self, path: Sequence[BlockId]) -> None:
        self._changed()
        for block in path:
            entry = self._entries.get(block)
            if entry is not None:
                self._use(entry)

    def drop(self, block: BlockId) -> None:
        self._changed()
        entry = self._entries.pop(block, None)
        if entry is None:
            return
        self._take(entry)
        entry.queue.forget(entry)
        self._leave(entry)

    def victims(self, may_go: Callable[[BlockId], bool] | None = None) -> Iterator[BlockId]:
        self._changed()
        self._walks += 1
        changes = self._changes
        while (entry := self._next()) is not None:
            if may_go is not None and not may_go(entry.id):
                entry.queue.pop()
                self._held.append(entry)
                continue
            entry.named = self._walks
            yield entry.id
            if self._changes != changes:
                raise RuntimeError(f"the policy {self.name} changed while its victims were walked over")
            entry.queue.pop()
            self._take(entry)
            self._aside.append(entry)

    def check_integrity(self) -> None:
        self._changed()
        children = Counter(entry.parent for entry in self._entries.values() if entry.parent is not None)
        if dict(children) != self._children:
            raise AssertionError(f"{self.name}: the counts of children are wrong")
        for entry in self._entries.values():
            if entry.gone or (entry.id not in children and not entry.queued):
                raise AssertionError(f"{self.name}: the leaf {entry.id.hex()} stands in no queue")
        for queue in {entry.queue for entry in self._entries.values()}:
            queue.check_integrity()

    @abstractmethod
    def _enter(self, entry: Entry) -> LeafQueue:
        """Give a new block its rank; the queue it stands in while it is a leaf."""

    @abstractmethod
    def _use(self, entry: Entry) -> None:
        """Change the rank of a block that was hit. Within a queue, (rank, place) must not become smaller."""

    def _leave(self, entry: Entry) -> None:
        """Learn from a block that left."""

    def _worth(self, block: Candidate) -> float:
        """What one use of a block is worth, where that matters."""
        del block
        return 1.0

    @abstractmethod
    def _next(self) -> Entry | None:
        """The next to go: the first of its queue. Asked again with nothing changed, the same."""

    def _put(self, entry: Entry) -> None:
        """Make a block part of the tree."""
        if entry.parent is not None:
            self._children[entry.parent] = self._children.get(entry.parent, 0) + 1
        if entry.id not in self._children:
            entry.queue.push(entry)

    def _take(self, entry: Entry) -> None:
        """Take a block out of the tree; its parent may become a leaf."""
        if entry.parent is None:
            return
        self._children[entry.parent] -= 1
        if self._children[entry.parent] == 0:
            del self._children[entry.parent]
            parent = self._entries.get(entry.parent)
            if parent is not None:
                parent.queue.push(parent)

    def _changed(self) -> None:
        self._changes += 1
        for entry in self._aside:  # children first: no parent is taken for a leaf
            self._put(entry)
        for entry in self._held:
            entry.queue.push(entry)
        self._aside.clear()
        self._held.clear()

    def _place(self) -> int:
        self._last_place += 1
        return self._last_place


class _OneQueuePolicy(_LeafPolicy):
    """Policies that are one order of all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self._queue = LeafQueue(self._children)

    def _enter(self, entry: Entry) -> LeafQueue:
        self._use(entry)
        return self._queue

    def _next(self) -> Entry | None:
        return self._queue.first()


class LruPolicy(_OneQueuePolicy):
    """Least recently used goes first."""

    name = "lru"

    def _use(self, entry: Entry) -> None:
        entry.place = self._place()


class LifoPolicy(_OneQueuePolicy):
    """The newest goes first, used or not. For prompts that come in a loop and do not fit."""

    name = "lifo"

    def _enter(self, entry: Entry) -> LeafQueue:
        entry.place = self._place()
        entry.rank = -entry.place
        return self._queue

    def _use(self, entry: Entry) -> None:
        pass


class TtlPolicy(_OneQueuePolicy):
    """Unused for `ttl_s` seconds is too old; where that frees too little, least recently used goes first."""

    name = "ttl"

    def __init__(self, clock: Clock, ttl_s: float) -> None:
        super().__init__()
        if ttl_s <= 0:
            raise ConfigurationError(f"blocks cannot be kept for {ttl_s} s: give more than 0")
        self.ttl_s = ttl_s
        self._clock = clock

    def expired(self, now_s: float) -> Iterator[BlockId]:
        # A parent may have been used before its child; it waits for the child, which is named first.
        return takewhile(lambda block: self._entries[block].rank <= now_s - self.ttl_s, self.victims())

    def _use(self, entry: Entry) -> None:
        entry.rank = self._clock.monotonic()
        entry.place = self._place()


class _AgedPolicy(_OneQueuePolicy):
    """The least `uses` x `worth` goes first, counted from the rank of who went last: so what was popular long
    ago does not stay (dynamic ageing: Arlitt et al., "Evaluating content management techniques for Web proxy
    caches", 2000). Among equals, least recently used goes first."""

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def _use(self, entry: Entry) -> None:
        entry.uses = min(entry.uses + 1, _MOST_USES)
        entry.rank = self._age + entry.uses * entry.worth
        entry.place = self._place()
        entry.named = -1

    def _leave(self, entry: Entry) -> None:
        if entry.named == self._walks:  # it went because of its rank, and not because it was invalidated
            self._age = max(self._age, entry.rank)


class LfuPolicy(_AgedPolicy):
    """Least frequently used goes first, with dynamic ageing (LFU-DA, counting up to `_MOST_USES`)."""

    name = "lfu"


class CostPolicy(_AgedPolicy):
    """What saves least time a byte goes first: uses x seconds to recompute / bytes, with dynamic ageing
    (GreedyDual-Size-Frequency: Cherkasova, "Improving WWW proxies performance", HPL-98-69R1, 1998)."""

    name = "cost"

    def _worth(self, block: Candidate) -> float:
        return block.cost_s / max(block.size_bytes, 1)


class S3FifoPolicy(_LeafPolicy):
    """A small queue that most blocks only pass through, a main queue for those used there, and the ids of
    those that left the small one: should they return, they go to the main one (Yang et al., "FIFO queues are
    all you need for cache eviction", SOSP 2023)."""

    name = "s3-fifo"
    _SMALL_SHARE = 0.1
    """Of all bytes; above it, the small queue gives."""

    def __init__(self) -> None:
        super().__init__()
        self._small = LeafQueue(self._children)
        self._main = LeafQueue(self._children)
        self._small_bytes = 0
        self._bytes = 0
        self._ghosts: OrderedDict[BlockId, None] = OrderedDict()
        """Ids, oldest first; no more than there are blocks."""

    def check_integrity(self) -> None:
        super().check_integrity()
        entries = self._entries.values()
        small_bytes = sum(entry.size_bytes for entry in entries if entry.queue is self._small)
        if small_bytes != self._small_bytes or self._bytes != sum(entry.size_bytes for entry in entries):
            raise AssertionError(f"{self.name}: the counts of bytes are wrong")
        if not self._entries.keys().isdisjoint(self._ghosts):
            raise AssertionError(f"{self.name}: a block is here and among those that left")

    def _enter(self, entry: Entry) -> LeafQueue:
        entry.place = self._place()
        if entry.id in self._ghosts:
            del self._ghosts[entry.id]
            return self._main
        return self._small

    def _use(self, entry: Entry) -> None:
        entry.uses = min(entry.uses + 1, _MOST_USES)

    def _leave(self, entry: Entry) -> None:
        if entry.queue is self._small:
            self._ghosts[entry.id] = None
        while len(self._ghosts) > len(self._entries):
            self._ghosts.popitem(last=False)

    def _put(self, entry: Entry) -> None:
        super()._put(entry)
        self._weigh(entry, entry.size_bytes)

    def _take(self, entry: Entry) -> None:
        super()._take(entry)
        self._weigh(entry, -entry.size_bytes)

    def _weigh(self, entry: Entry, size_bytes: int) -> None:
        self._bytes += size_bytes
        if entry.queue is self._small:
            self._small_bytes += size_bytes

    def _next(self) -> Entry | None:
        """Sweep until the first of the queue whose turn it is was not used enough to stay. That each use is
        swept past once bounds the work."""
        while True:
            small, main = self._small.first(), self._main.first()
            if small is not None and (main is None or self._small_bytes >= self._SMALL_SHARE * self._bytes):
                if small.uses <= 1:
                    return small
                self._promote(small)
            elif main is None or not main.uses:
                return main
            else:
                main.uses -= 1
                main.place = self._place()

    def _promote(self, entry: Entry) -> None:
        self._small.pop()
        self._small_bytes -= entry.size_bytes
        entry.uses = 0
        entry.place = self._place()
        entry.queue = self._main
        self._main.push(entry)

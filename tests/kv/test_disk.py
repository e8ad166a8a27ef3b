"""The disk tier on real files: what it keeps, finds, evicts and shares."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stockpot.clock import VirtualClock
from stockpot.errors import ConfigurationError
from stockpot.kv.block import BlockId, TokenKey, aliases, block_id, content_hash, root_id, token_key
from stockpot.kv.disk import DiskTier
from stockpot.kv.envelope import Sealer, Sealing
from stockpot.kv.tier import Block, BlockHead, Departure, Refused, Wanted

NOW_S = 1_700_000_000.0
TOKENS = 32
DATA_BYTES = 4000


def sealer(fingerprint: str = "model", sealing: Sealing | None = None) -> Sealer:
    return Sealer(sealing or Sealing(), fingerprint=fingerprint, layout="layout")


def chain(
    seed: int, blocks: int = 1, *, last_tokens: int = TOKENS, fingerprint: str = "model", **facts: object
) -> list[Block]:
    """The blocks of one prompt."""
    parent = root_id(fingerprint=fingerprint, layout="layout")
    whole = token_key(np.arange(blocks * TOKENS, dtype=np.int32) + seed * 1000)
    made: list[Block] = []
    for place in range(blocks):
        length = last_tokens if place == blocks - 1 else TOKENS
        end = (place * TOKENS + length) * 4
        key = TokenKey(whole[place * TOKENS * 4 : end])
        head = BlockHead(
            id=block_id(parent, key),
            parent=parent,
            start=place * TOKENS,
            tokens=key,
            content=content_hash(TokenKey(whole[:end])),
            fingerprint=fingerprint,
            layout="layout",
            aliases=aliases(parent, key),
        )
        made.append(Block(replace(head, **facts), key[:8] * (DATA_BYTES // 8)))
        parent = head.id
    return made


def places(blocks: list[Block]) -> list[Wanted]:
    return [Wanted(b.head.id, b.head.start, len(b.head.tokens) // 4, b.head.aliases) for b in blocks]


def ids(blocks: list[Block]) -> list[BlockId]:
    return [block.head.id for block in blocks]


FILE_BYTES = len(b"".join(sealer().seal(chain(1)[0])))


class Open(Protocol):
    """Opens a tier of the test's own folder, with room for so many blocks."""

    def __call__(
        self,
        blocks: float = 100,
        *,
        fingerprint: str = "model",
        sealing: Sealing | None = None,
        on_departure: Departure | None = None,
        max_blocks: int = 1000,
    ) -> DiskTier: ...


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(NOW_S)


@pytest.fixture
def open_tier(tmp_path: Path, clock: VirtualClock) -> Open:
    def opened(
        blocks: float = 100,
        *,
        fingerprint: str = "model",
        sealing: Sealing | None = None,
        on_departure: Departure | None = None,
        max_blocks: int = 1000,
    ) -> DiskTier:
        return DiskTier(
            tmp_path / "kv",
            capacity_bytes=int(blocks * FILE_BYTES),
            sealer=sealer(fingerprint, sealing),
            clock=clock,
            on_departure=on_departure,
            max_blocks=max_blocks,
        )

    return opened


def files(tier_folder: Path) -> list[Path]:
    return sorted(tier_folder.glob("*.kv"))


@pytest.mark.parametrize("sealing", [Sealing(), Sealing(b"s" * 16), Sealing(b"s" * 16, encrypt=True)])
def test_what_is_written_is_located_and_read(open_tier: Open, sealing: Sealing) -> None:
    tier = open_tier(sealing=sealing)
    prompt = chain(1, 5)
    assert tier.locate(places(prompt)) == []
    assert tier.write(prompt) == [None] * 5
    for serving in (tier, open_tier(sealing=sealing)):
        found = serving.locate(places(prompt))
        assert [location.id for location in found] == ids(prompt)
        assert [(location.start, location.tokens) for location in found] == [(n * 32, 32) for n in range(5)]
        assert list(serving.read(ids(prompt))) == prompt
        assert serving.stats().hits == 5
        serving.check_integrity()
    assert tier.drop(ids(prompt)[3:]) == 2
    assert [location.id for location in tier.locate(places(prompt))] == ids(prompt)[:3]
    assert list(tier.read(ids(prompt)))[3:] == [Refused(ids(prompt)[3], "absent")], "ends after a refusal"


def test_reading_that_is_given_up_closes_its_files(open_tier: Open) -> None:
    tier, prompt = open_tier(), chain(1, 8)
    tier.write(prompt)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reading = tier.read(ids(prompt))
    assert next(iter(reading)) == prompt[0]
    del reading
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_prompt_that_departs_within_a_block_finds_it(open_tier: Open) -> None:
    tier, prompt = open_tier(), chain(1, 2)
    tier.write(prompt)
    parent, key = prompt[0].head.id, prompt[1].head.tokens
    other = TokenKey(key[: 20 * 4] + token_key(np.array([7] * 12, np.int32)))
    wanted = [*places(prompt)[:1], Wanted(block_id(parent, other), TOKENS, 32, aliases(parent, other))]
    whole, partly = tier.locate(wanted)
    assert whole.id == prompt[0].head.id
    assert (partly.id, partly.start, partly.tokens) == (prompt[1].head.id, TOKENS, 16)
    tail = TokenKey(key[: 16 * 4])
    wanted[1] = Wanted(block_id(parent, tail), TOKENS, 16, aliases(parent, tail))
    assert [(at.id, at.tokens) for at in tier.locate(wanted)][1:] == [(prompt[1].head.id, 16)]


def test_a_longer_block_takes_the_place_of_a_shorter_one(open_tier: Open, tmp_path: Path) -> None:
    departed: list[tuple[list[BlockId], str]] = []
    tier = open_tier(on_departure=lambda gone, cause: departed.append((list(gone), cause)))
    (short,), (long,) = chain(1, last_tokens=16, kept_until_s=NOW_S + 300), chain(1)
    tier.write([short])
    tier.write([long])
    assert departed == [([short.head.id], "replaced")]
    assert len(files(tmp_path / "kv")) == 1
    assert files(tmp_path / "kv")[0].stat().st_mtime == NOW_S + 300, "the promise holds for what replaced it"
    assert tier.write([short]) == [None]
    assert len(files(tmp_path / "kv")) == 1, "the longer one serves it"
    tagged = Block(replace(short.head, tags=frozenset({"law"})), short.data)
    tier.write([tagged])
    assert tier.drop_where(lambda head: "law" in head.tags, "invalidated") == 1, "tags are not lost"


def test_the_index_is_rebuilt_without_reading_bodies(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier(1000)
    data = os.urandom(1 << 18)
    prompts = [Block(replace(chain(n, tenant="t")[0].head), data) for n in range(60)]
    tier = DiskTier(tmp_path / "kv", capacity_bytes=1 << 26, sealer=sealer(), clock=VirtualClock(NOW_S))
    tier.write(prompts)

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_bytes()
    again = DiskTier(tmp_path / "kv", capacity_bytes=1 << 26, sealer=sealer(), clock=VirtualClock(NOW_S))
    assert read_bytes() - before < len(prompts) * 8192
    assert {entry.id for entry in again.heads()} == set(ids(prompts))
    assert {entry.head and entry.head.tenant for entry in again.heads()} == {"t"}
    assert again.stats().used_bytes == tier.stats().used_bytes
    assert list(again.read(ids(prompts)[:1])) == prompts[:1]


def test_least_recently_used_blocks_go_first(open_tier: Open, clock: VirtualClock, tmp_path: Path) -> None:
    departed: list[BlockId] = []
    tier = open_tier(10.5, on_departure=lambda gone, _: departed.extend(gone))
    prompts = [chain(n)[0] for n in range(14)]
    for prompt in prompts[:10]:
        tier.write([prompt])
        clock.advance(100)
    assert list(tier.read(ids(prompts[:2]))) == prompts[:2]
    clock.advance(100)
    tier.write(prompts[10:12])
    assert departed[:2] == ids(prompts[2:4])
    assert tier.stats().evicted == {"capacity": len(departed)}
    assert sum(file.stat().st_size for file in files(tmp_path / "kv")) == tier.stats().used_bytes
    # What was used survives a restart: the files tell.
    again = open_tier(5.5)
    assert again.stats().used_bytes <= 5.5 * FILE_BYTES
    assert set(ids(prompts[:2])) <= {entry.id for entry in again.heads()}


def test_of_one_prompt_the_deepest_blocks_go_first(open_tier: Open) -> None:
    tier, prompt = open_tier(6.5), chain(1, 6)
    tier.write(prompt)
    tier.write(chain(2))
    left = len(tier.locate(places(prompt)))
    assert 4 <= left < 6
    assert tier.stats().blocks == left + 1


def test_promises_outlast_use_and_restarts(open_tier: Open, clock: VirtualClock) -> None:
    tier = open_tier(4.5)
    kept = chain(0, kept_until_s=NOW_S + 3600)
    too_long = chain(9, kept_until_s=NOW_S + 10**9)
    tier.write(kept + too_long)
    for n in range(1, 9):
        clock.advance(60)
        tier.write(chain(n))
        tier = open_tier(4.5)
    assert len(tier.locate(places(kept))) == 1
    clock.advance(3600)
    for n in range(11, 15):
        tier.write(chain(n))
        clock.advance(60)
    assert tier.locate(places(kept)) == [], "a promise ends"
    assert tier.locate(places(too_long)) == [], "no promise is longer than an hour"
    promised = [chain(n, kept_until_s=clock.wall() + 600)[0] for n in range(20, 28)]
    assert tier.write(promised) == [None] * 8, "where all is promised, the one that ends first goes"
    # A promise given again to what is there is noted.
    clock.advance(300)
    again = [Block(replace(promised[-1].head, kept_until_s=clock.wall() + 3000), promised[-1].data)]
    assert tier.write(again) == [None]
    assert max(entry.stamp_s for entry in open_tier(4.5).heads()) == clock.wall() + 3000


def test_times_of_a_wrong_clock_count_as_now(open_tier: Open, clock: VirtualClock, tmp_path: Path) -> None:
    tier = open_tier(4.5)
    strange = chain(1)
    tier.write(strange)
    os.utime(files(tmp_path / "kv")[0], (NOW_S + 10**8, NOW_S + 10**8))
    tier = open_tier(4.5)
    assert list(tier.read(ids(strange))) == strange
    assert files(tmp_path / "kv")[0].stat().st_mtime == NOW_S
    for n in range(2, 7):
        clock.advance(60)
        tier.write(chain(n))
    assert tier.locate(places(strange)) == []
    # And back: what was written "in the future" is kept, served and evicted all the same.
    clock.now_s = NOW_S - 10**6
    for n in range(10, 20):
        clock.advance(1)
        assert tier.write(chain(n)) == [None]
        assert len(tier.locate(places(chain(n)))) == 1
    assert tier.stats().used_bytes <= 4.5 * FILE_BYTES


def test_the_number_of_blocks_is_bounded_too(open_tier: Open) -> None:
    tier = open_tier(1000, max_blocks=8)
    for n in range(20):
        assert tier.write(chain(n)) == [None]
    assert tier.stats().blocks <= 8
    assert open_tier(1000, max_blocks=3).stats().blocks <= 3
    assert open_tier(0.5).write(chain(1)) == ["full"]


def test_two_tiers_share_a_folder(open_tier: Open, clock: VirtualClock) -> None:
    gone: list[tuple[BlockId, str]] = []
    one = open_tier()
    other = open_tier(on_departure=lambda ids, cause: gone.extend((block_id, cause) for block_id in ids))
    prompt = chain(1, 3)
    one.write(prompt)
    assert [at.id for at in other.locate(places(prompt))] == ids(prompt), "found at once, by name"
    assert list(other.read(ids(prompt))) == prompt
    one.write(chain(2))
    beginning = [replace(places(chain(2))[0], id=BlockId(b"?" * 32))]
    assert other.locate(beginning) == [], "nothing looks at the folder before a second has passed"
    clock.advance(1.1)
    assert len(other.locate(beginning)) == 1
    assert other.stats().used_bytes == one.stats().used_bytes
    one.drop(ids(prompt)[:1])
    assert list(other.read(ids(prompt))) == [Refused(prompt[0].head.id, "absent")]
    one.drop(ids(prompt)[1:2])
    clock.advance(1.1)
    assert other.locate(places(prompt)) == []
    assert gone == [(block_id, "elsewhere") for block_id in ids(prompt)[:2]]
    one.write(prompt[:1])
    assert other.write(prompt[:1]) == [None]
    assert other.stats().written_bytes == 0, "what is there already is not written again"


def test_other_models_are_counted_named_and_never_served(open_tier: Open) -> None:
    one, other = open_tier(5.5), open_tier(5.5, fingerprint="other weights")
    ours, theirs = chain(1, tenant="us"), chain(1, fingerprint="other weights", tenant="them")
    one.write(ours)
    assert other.locate(places(theirs)) == []
    content = theirs[0].head.content
    assert content == ours[0].head.content
    other.refresh()
    assert other.other_owner(content) == ("model", "us")
    assert other.other_owner(chain(2)[0].head.content) is None
    assert other.stats().used_bytes == one.stats().used_bytes > 0
    for n in range(2, 9):
        other.write(chain(n, fingerprint="other weights"))
    assert other.other_owner(content) is None, "their blocks age like ours"


def test_files_sealed_in_another_way_are_left_alone_and_replaced(open_tier: Open) -> None:
    open_tier(3.5, sealing=Sealing(b"s" * 16)).write(chain(1) + chain(2))
    tier = open_tier(3.5)
    assert tier.stats().blocks == 2
    assert tier.heads() == []
    assert tier.locate(places(chain(1))) == []
    assert dict(tier.verify()) == {chain(n)[0].head.id: "mac" for n in (1, 2)}
    assert tier.stats().blocks == 2, "verify moves nothing unless told to"
    assert tier.write(chain(1)) == [None]
    assert list(tier.read(ids(chain(1)))) == chain(1)
    tier.write(chain(3) + chain(4))
    assert tier.stats().blocks <= 3


def test_drop_where_and_clear(open_tier: Open, tmp_path: Path) -> None:
    departed: list[tuple[int, str]] = []
    tier = open_tier(on_departure=lambda gone, cause: departed.append((len(gone), cause)))
    tier.write(chain(1, 3, tenant="a") + chain(2, 2, tenant="b"))
    open_tier().write(chain(3, tenant="a"))
    assert tier.drop_where(lambda head: head.tenant == "a", "invalidated") == 4, "others' blocks as well"
    assert departed == [(4, "invalidated")]
    assert {entry.head and entry.head.tenant for entry in tier.heads()} == {"b"}
    files(tmp_path / "kv")[0].write_bytes(b"damaged")
    assert {verdict for _, verdict in tier.verify(quarantine=True)} == {"ok", "truncated"}
    assert tier.clear() == 1
    assert [path for path in (tmp_path / "kv").rglob("*") if path.is_file() and path.name != "lock"] == []
    assert tier.stats().used_bytes == 0


def test_nobody_else_may_read_and_nothing_else_is_followed(open_tier: Open, tmp_path: Path) -> None:
    tier, folder = open_tier(), tmp_path / "kv"
    tier.write(chain(1))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}
    elsewhere = tmp_path / "elsewhere.kv"
    files(folder)[0].rename(elsewhere)
    (folder / f"{chain(1)[0].head.id.hex()}.kv").symlink_to(elsewhere)
    os.mkfifo(folder / f"{chain(2)[0].head.id.hex()}.kv")
    (folder / f"{chain(3)[0].head.id.hex()}.kv").mkdir()
    (folder / "notes.kv").write_text("not ours")
    for reader in (tier, open_tier()):
        for n in (1, 2, 3):
            assert list(reader.read(ids(chain(n)))) == [Refused(chain(n)[0].head.id, "absent")]
            assert reader.locate(places(chain(n))) == []
        assert reader.stats().blocks == 0
    assert tier.write(chain(1)) == [None]
    assert list(tier.read(ids(chain(1)))) == chain(1)
    assert elsewhere.exists()


def test_a_folder_that_cannot_be_is_said_at_start(tmp_path: Path, clock: VirtualClock) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "kv"):
        with pytest.raises(ConfigurationError, match=str(folder)):
            DiskTier(folder, capacity_bytes=1, sealer=sealer(), clock=clock)


class SharedFolder(RuleBasedStateMachine):
    """Two tiers on one folder, used at random, compared with what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = TemporaryDirectory()
        self.clock = VirtualClock(NOW_S)
        self.tiers = [self.opened(), self.opened()]

    def opened(self) -> DiskTier:
        return DiskTier(
            Path(self.temporary.name),
            capacity_bytes=int(6.5 * FILE_BYTES),
            sealer=sealer(),
            clock=self.clock,
        )

    def teardown(self) -> None:
        self.temporary.cleanup()

    TIER = st.integers(0, 1)
    PROMPT = st.builds(
        chain,
        st.integers(0, 3),
        st.integers(1, 3),
        last_tokens=st.sampled_from([8, 16, 20, 32]),
        kept_until_s=st.sampled_from([0.0, NOW_S + 50]),
    )

    @rule(tier=TIER, prompt=PROMPT)
    def write(self, tier: int, prompt: list[Block]) -> None:
        assert self.tiers[tier].write(prompt) == [None] * len(prompt)
        total = sum(path.stat().st_size for path in files(Path(self.temporary.name)))
        assert total <= self.tiers[tier].capacity_bytes

    @rule(tier=TIER, prompt=PROMPT)
    def read(self, tier: int, prompt: list[Block]) -> None:
        found = self.tiers[tier].locate(places(prompt))
        for place, location in zip(prompt, found, strict=False):
            for block in self.tiers[tier].read([location.id]):
                if isinstance(block, Block):
                    same = location.tokens * 4
                    assert block.head.tokens[:same] == place.head.tokens[:same]
                    assert block.data == block.head.tokens[:8] * (DATA_BYTES // 8)
                else:
                    assert block.cause == "absent"

    @rule(tier=TIER, prompt=PROMPT)
    def drop(self, tier: int, prompt: list[Block]) -> None:
        self.tiers[tier].drop(ids(prompt))
        assert not {path.stem for path in files(Path(self.temporary.name))} & {i.hex() for i in ids(prompt)}

    @rule(seconds=st.sampled_from([0.5, 2.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(tier=TIER)
    def restart(self, tier: int) -> None:
        self.tiers[tier] = self.opened()
        there = {path.stem: path.stat().st_size for path in files(Path(self.temporary.name))}
        stats = self.tiers[tier].stats()
        assert (stats.blocks, stats.used_bytes) == (len(there), sum(there.values()))

    @invariant()
    def agrees_with_itself(self) -> None:
        for tier in self.tiers:
            tier.check_integrity()


TestSharedFolder = SharedFolder.TestCase

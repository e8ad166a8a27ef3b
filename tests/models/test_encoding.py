"""Which encoding is chosen, kept and made again, on a workbench whose figures the test sets."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stockpot.errors import ConfigurationError, ModelError
from stockpot.models.candidates import MAX_KL_MEAN, Measurement
from stockpot.models.encoded_files import MAX_DECISIONS, decisions
from stockpot.models.encoding import LARGE_MODEL_BYTES, EncodedModel, ensure_encoded
from stockpot.models.quality import Quality
from stockpot.models.source import LocatedModel
from stockpot.models.speed import Effort, Speed
from stockpot.models.trial import Result
from stockpot.models.workbench import Workbench

Q4_1, Q8_0, BF16 = 3, 8, 30
ROW_BYTES = {Q4_1: 20, Q8_0: 34, BF16: 64}
"""Of 32 elements."""
FAST, SLOW = 2000.0, 500.0


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _gguf(tensor_type: int, row: int) -> bytes:
    """A llama of one layer with one matrix."""
    strings = {"general.architecture": "llama"}
    numbers = {
        "llama.block_count": 1,
        "llama.attention.head_count": 1,
        "llama.embedding_length": row,
        "llama.context_length": 128,
        "llama.vocab_size": 4,
    }
    pairs = [_text(key) + struct.pack("<I", 8) + _text(value) for key, value in strings.items()]
    pairs += [_text(key) + struct.pack("<II", 4, value) for key, value in numbers.items()]
    info = _text("blk.0.ffn_up.weight") + struct.pack("<IQQIQ", 2, row, 4, tensor_type, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs) + info
    return head + bytes(-len(head) % 32) + bytes(4 * row // 32 * ROW_BYTES[tensor_type])


@dataclass
class Bench(Workbench):
    """`prefill` and `kl` by encoding; what is in `broken` ends with a failure."""

    binding: str = "ik"
    identity: str = "library 1"
    prefill: dict[str, float] = field(default_factory=dict[str, float])
    kl: dict[str, float | None] = field(default_factory=dict[str, float | None])
    broken: set[str] = field(default_factory=set[str])
    attempts: list[str] = field(default_factory=list[str])

    def attempt(
        self,
        source: Path,
        target: Path,
        encoding: str | None,
        *,
        effort: Effort | None,
        reference: Path | None = None,
        write_reference: bool = False,
    ) -> Result:
        name = encoding or ("source" if target == source else target.stem)
        self.attempts.append(name)
        if encoding is not None:
            target.write_bytes(encoding.encode())
        assert target.is_file()
        if name in self.broken:
            return Result(failure="GGML_ASSERT(no such kernel)")
        if write_reference:
            return Result(1.0, Quality(0.0, 0.0, 1.0))
        kl = self.kl.get(name, 0.001)
        speed = self.prefill.get(name, SLOW)
        turn_s = 64 / speed if effort and effort.behind_context else None
        return Result(
            encode_s=1.0 if encoding else None,
            quality=Quality(kl, kl, 0.99) if reference else None,
            speed=Speed(speed, turn_s, 100.0, 400.0) if effort else None,
        )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _located(folder: Path, tensor_type: int = Q4_1, row: int = 96) -> LocatedModel:
    path = folder / "ladle.gguf"
    path.write_bytes(_gguf(tensor_type, row))
    return LocatedModel("ladle", path, "a test")


def _by_name(encoded: EncodedModel) -> dict[str, Measurement]:
    return {each.encoding: each for each in encoded.measurements}


def test_the_fastest_faithful_encoding_is_made_kept_and_found_again(tmp_path: Path, cache: Path) -> None:
    located, bench = _located(tmp_path), Bench(prefill={"bf16": FAST})
    first = ensure_encoded(located, bench, cache_dir=cache)
    assert (first.encoding, first.path.read_text()) == ("bf16", "bf16")
    assert "fastest" in first.reason
    assert _by_name(first)["bf16"].verdict == "best"
    assert _by_name(first)["bf16"].turn_64_s is not None
    assert [path.name for path in first.path.parent.glob("*.gguf")] == ["ik-bf16.gguf"]
    assert not list(first.path.parent.glob(".trials-*"))
    tried = len(bench.attempts)
    assert ensure_encoded(located, bench, cache_dir=cache) == first
    assert len(bench.attempts) == tried


def test_an_encoding_that_changes_the_answers_is_refused_however_fast(tmp_path: Path, cache: Path) -> None:
    bench = Bench(
        prefill={"q8_0_r8": 10 * FAST, "bf16_r16": 10 * FAST, "bf16": FAST},
        kl={"q8_0_r8": MAX_KL_MEAN * 1.1, "bf16_r16": None},
    )
    encoded = ensure_encoded(_located(tmp_path), bench, cache_dir=cache)
    assert encoded.encoding == "bf16"
    for name in ("q8_0_r8", "bf16_r16"):
        assert _by_name(encoded)[name].verdict.startswith("refused")


def test_an_encoding_the_library_dies_of_is_left_out(tmp_path: Path, cache: Path) -> None:
    bench = Bench(prefill={"q8_0": FAST}, broken={"q8_0_r8", "q8_k_r8"})
    encoded = ensure_encoded(_located(tmp_path), bench, cache_dir=cache)
    assert encoded.encoding == "q8_0"
    assert "GGML_ASSERT" in _by_name(encoded)["q8_k_r8"].verdict


def test_nothing_less_precise_than_the_source_is_tried(tmp_path: Path, cache: Path) -> None:
    encoded = ensure_encoded(_located(tmp_path, BF16), Bench(), cache_dir=cache)
    assert set(_by_name(encoded)) == {"bf16_r16", "f16", "source"}


def test_the_source_as_it_is_may_win(tmp_path: Path, cache: Path) -> None:
    located, bench = _located(tmp_path, Q8_0), Bench(prefill={"source": FAST})
    encoded = ensure_encoded(located, bench, cache_dir=cache)
    assert (encoded.path, encoded.encoding) == (located.path, "q8_0")
    assert not list(cache.rglob("*.gguf"))
    assert ensure_encoded(located, bench, cache_dir=cache) == encoded


def test_a_source_the_library_computes_wrongly_is_never_used(tmp_path: Path, cache: Path) -> None:
    located = _located(tmp_path)
    assert "source" not in _by_name(ensure_encoded(located, Bench(), cache_dir=cache))
    with pytest.raises(ConfigurationError, match="q4_1 wrongly"):
        ensure_encoded(located, Bench(), cache_dir=cache, encoding="source")
    upstream = Bench(binding="llama-cpp")
    assert ensure_encoded(located, upstream, cache_dir=cache, encoding="source").path == located.path


def test_the_lossless_reference_is_used_when_all_else_fails(tmp_path: Path, cache: Path) -> None:
    located = _located(tmp_path)
    names = ("q8_0_r8", "q8_0", "bf16_r16", "bf16", "q8_k_r8", "f16")
    encoded = ensure_encoded(located, Bench(kl=dict.fromkeys(names, 1.0)), cache_dir=cache)
    assert (encoded.encoding, encoded.path.read_text()) == ("f16", "f16")
    assert "without loss" in encoded.reason
    with pytest.raises(ModelError, match=r"cannot be used.*GGML_ASSERT"):
        ensure_encoded(located, Bench(identity="library 2", broken={"f16"}), cache_dir=cache)
    assert not list(encoded.path.parent.glob(".trials-*"))


def test_where_nothing_can_be_tried_a_sound_source_is_used_as_it_is(tmp_path: Path, cache: Path) -> None:
    located = _located(tmp_path, row=128)
    encoded = ensure_encoded(located, Bench(broken={"f16"}), cache_dir=cache)
    assert (encoded.path, encoded.encoding) == (located.path, "q4_1")
    assert "GGML_ASSERT" in encoded.reason


def test_each_library_has_its_own_choice_and_only_chosen_files_stay(tmp_path: Path, cache: Path) -> None:
    located = _located(tmp_path)
    one = ensure_encoded(located, Bench(prefill={"bf16": FAST}), cache_dir=cache)
    other = ensure_encoded(located, Bench(identity="library 2", prefill={"q8_0_r8": FAST}), cache_dir=cache)
    assert (one.encoding, other.encoding) == ("bf16", "q8_0_r8")
    assert one.path.is_file()
    again = ensure_encoded(located, Bench(prefill={"q8_0_r8": FAST}), cache_dir=cache, anew=True)
    assert again.encoding == "q8_0_r8"
    assert [path.name for path in cache.rglob("*.gguf")] == ["ik-q8_0_r8.gguf"]
    assert len(decisions(cache)) == 2


def test_decisions_are_bounded(tmp_path: Path, cache: Path) -> None:
    located = _located(tmp_path)
    for number in range(MAX_DECISIONS + 2):
        ensure_encoded(located, Bench(identity=f"library {number}"), cache_dir=cache)
    kept = {decision.identity for _, decision in decisions(cache)}
    assert kept == {f"library {number}" for number in range(2, MAX_DECISIONS + 2)}


@pytest.mark.parametrize("damage", ["garbage", "truncated", "file gone", "file short", "foreign file"])
def test_a_decision_in_doubt_is_made_anew(tmp_path: Path, cache: Path, damage: str) -> None:
    located = _located(tmp_path)
    encoded = ensure_encoded(located, Bench(), cache_dir=cache)
    (decision,) = encoded.path.parent.glob("decision-*.json")
    content = decision.read_text()
    match damage:
        case "garbage":
            decision.write_bytes(b"\xff{")
        case "truncated":
            decision.write_text(content[: len(content) // 2])
        case "file gone":
            encoded.path.unlink()
        case "file short":
            encoded.path.write_bytes(b"")
        case _:
            decision.write_text(content.replace(f'"{encoded.path.name}"', '"../../../../ladle.gguf"'))
    bench = Bench()
    again = ensure_encoded(located, bench, cache_dir=cache)
    assert bench.attempts
    assert again.path.read_text() == again.encoding


def test_what_a_dead_process_left_is_swept_up(tmp_path: Path, cache: Path) -> None:
    located = _located(tmp_path)
    home = ensure_encoded(located, Bench(), cache_dir=cache).path.parent
    (home / ".trials-dead").mkdir()
    (home / ".trials-dead" / "f16.gguf").write_bytes(b"half")
    ensure_encoded(located, Bench(), cache_dir=cache, anew=True)
    assert not list(home.glob(".trials-*"))


def test_an_encoding_may_be_named(tmp_path: Path, cache: Path) -> None:
    located, bench = _located(tmp_path), Bench()
    named = ensure_encoded(located, bench, cache_dir=cache, encoding="q6_0")
    assert named.path.read_text() == "q6_0"
    ensure_encoded(located, bench, cache_dir=cache, encoding="q6_0")
    assert len(bench.attempts) == 1
    with pytest.raises(ConfigurationError, match="cannot be encoded as q9"):
        ensure_encoded(located, Bench(broken={"q9"}), cache_dir=cache, encoding="q9")
    assert [path.name for path in cache.rglob("*.gguf")] == ["ik-q6_0.gguf"]
    with pytest.raises(ConfigurationError, match="give auto, source or a name"):
        ensure_encoded(located, bench, cache_dir=cache, encoding="../q8_0")


def test_a_large_model_is_not_encoded_unasked(tmp_path: Path, cache: Path) -> None:
    located, bench = _located(tmp_path, Q8_0), Bench()
    with located.path.open("r+b") as file:
        file.truncate(LARGE_MODEL_BYTES + 1)
    encoded = ensure_encoded(located, bench, cache_dir=cache)
    assert encoded.path == located.path
    assert "4.0 GB" in encoded.reason
    assert not bench.attempts


def test_progress_ends_where_it_said(tmp_path: Path, cache: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []

    def watch(description: str, done_bytes: int, total_bytes: int | None, /) -> None:
        seen.append((description, done_bytes, total_bytes))

    ensure_encoded(_located(tmp_path), Bench(), cache_dir=cache, progress=watch)
    assert len({description for description, _, _ in seen}) == 1
    done = [done for _, done, _ in seen]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2]

"""The contract of Driver, the same for every driver: the fake, and llama.cpp through each library.

Libraries of one family in one process may disturb each other, so this process tests the fake and the one
that STOCKPOT_TEST_LIBRARY names (wheel, native or llama-cpp; wheel by default); the others, where they are
installed, run this file again in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stockpot.engine.bindings import open_binding
from stockpot.engine.bindings.ik import wheel_library
from stockpot.engine.bindings.native import native_library
from stockpot.engine.driver import Batch, Driver, DriverFailure, OutOfCells, Span
from stockpot.engine.fake_driver import FakeDriver
from stockpot.engine.llamacpp import open_driver
from stockpot.models.source import locate
from stockpot.settings import DEFAULT_MODEL, load_settings

CELLS = 512
SEQUENCES = 8
BATCH_TOKENS = 64
NOISE = {"f16": 0.05, "q8_0": 1.0}
"""Logits; what goes wrong when a cell is missed is above 5."""
LIBRARY = os.environ.get("STOCKPOT_TEST_LIBRARY", "wheel")
KV_CELL_TYPE = os.environ.get("STOCKPOT_TEST_KV_CELL_TYPE", "f16")
TEXT = (
    "The kitchen of the old inn was warm, and the cook stirred the great pot slowly. Every evening people of "
    "the village came in from the cold, sat down at the long table and told each other what the day had "
    "brought: a lost sheep, a broken wheel, a letter from the city. Nobody was in a hurry. "
)

CALLS = ("decode", "decode", "mixed", "copy", "cut", "drop", "move", "defragment")

Tokens = list[int]
Row = NDArray[np.float32]


def available(library: str) -> bool:
    if library == "llama-cpp":
        return importlib.util.find_spec("llama_cpp") is not None
    if library == "native":
        return native_library(load_settings().cache_dir) is not None
    return wheel_library() is not None


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with weights in f16: where those have eight bits or fewer, activations are rounded to
    eight too, and KV that is summed in another order changes logits by up to 1 instead of 0.001."""
    cache_dir = load_settings().cache_dir
    target = tmp_path_factory.mktemp("model") / "f16.gguf"
    binding = "llama-cpp" if LIBRARY == "llama-cpp" else "ik"
    library = "auto" if LIBRARY == "llama-cpp" else LIBRARY
    source = locate(DEFAULT_MODEL, cache_dir=cache_dir).path
    open_binding(binding, library=library, cache_dir=cache_dir).quantize(source, target, "f16")
    return target


@pytest.fixture(scope="module", params=["fake", LIBRARY])
def shared_driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    if request.param == "fake":
        yield FakeDriver(cells=CELLS, max_sequences=SEQUENCES, max_batch_tokens=BATCH_TOKENS)
        return
    if not available(request.param):
        pytest.skip(f"the library {request.param} is not installed")
    path: Path = request.getfixturevalue("model_path")
    driver = open_driver(
        path,
        name="model",
        binding="llama-cpp" if request.param == "llama-cpp" else "ik",
        library=request.param if request.param != "llama-cpp" else "auto",
        cache_dir=load_settings().cache_dir,
        cells=CELLS,
        max_sequences=SEQUENCES,
        max_batch_tokens=BATCH_TOKENS,
        kv_cell_type=KV_CELL_TYPE,
        threads=1,
    )
    yield driver
    driver.close()
    driver.close()
    for call in (driver.clear, lambda: driver.vocabulary.encode("text", special=False)):
        with pytest.raises(DriverFailure):
            call()


@pytest.fixture
def driver(shared_driver: Driver) -> Driver:
    shared_driver.clear()
    return shared_driver


def batch(rows: list[tuple[int, int, int, bool]]) -> Batch:
    """Rows of (token, position, sequence, wants logits)."""
    tokens, positions, sequences, wants = zip(*rows, strict=True)
    return Batch(
        np.array(tokens, np.int32),
        np.array(positions, np.int32),
        np.array(sequences, np.int32),
        np.array(wants, np.bool_),
    )


def extend(driver: Driver, sequence: int, tokens: Tokens, start: int = 0, step: int = BATCH_TOKENS) -> Row:
    """Decode the tokens in batches of `step`; the logits after the last."""
    row = None
    for at in range(0, len(tokens), step):
        part = tokens[at : at + step]
        last = at + len(part) == len(tokens)
        rows = [(t, start + at + i, sequence, last and i == len(part) - 1) for i, t in enumerate(part)]
        out = driver.decode(batch(rows))
        assert out.shape == (int(last), driver.vocabulary.size)
        assert out.dtype == np.float32
        row = out[0].copy() if last else None
    assert row is not None
    return row


def same(driver: Driver, a: Row, b: Row) -> bool:
    """Equal, but for floating-point order: KV that lies in other cells is summed in another order."""
    noise = 0.0 if isinstance(driver, FakeDriver) else NOISE[KV_CELL_TYPE]
    return float(np.abs(a - b).max()) <= noise


def prompts(driver: Driver, count: int, tokens: int) -> list[Tokens]:
    """Different stretches of one text."""
    words = TEXT.split()
    texts = [" ".join(words[i:] + words[:i]) * 8 for i in range(count)]
    return [driver.vocabulary.encode(text, special=False)[:tokens] for text in texts]


def test_facts_and_vocabulary(driver: Driver) -> None:
    facts, vocabulary = driver.facts, driver.vocabulary
    assert facts.vocabulary_size == vocabulary.size
    assert facts.kv_bytes_per_token > 0
    assert facts.layout
    assert facts.chat_template is not None
    text = "Grüße, 世界! <|im_end|>"
    plain = vocabulary.encode(text, special=False)
    assert b"".join(vocabulary.piece(t) for t in plain).decode() == text
    control = vocabulary.encode("<|im_end|>", special=True)
    assert len(control) == 1
    assert vocabulary.ends_generation(control[0])
    assert vocabulary.piece(control[0]) == b""
    assert vocabulary.piece(control[0], special=True) == b"<|im_end|>"
    assert not vocabulary.ends_generation(plain[0])
    with pytest.raises(ValueError, match="token"):
        vocabulary.piece(vocabulary.size)


def test_batches_of_any_size_compute_the_same(driver: Driver) -> None:
    (tokens,) = prompts(driver, 1, 100)
    whole = extend(driver, 0, tokens)
    for sequence, step in ((1, 17), (2, 63)):
        assert same(driver, whole, extend(driver, sequence, tokens, step=step))


def test_logits_come_in_the_order_of_the_batch(driver: Driver) -> None:
    a, b = prompts(driver, 2, 20)
    expected = [extend(driver, 0, a[:10]), extend(driver, 1, b[:12]), extend(driver, 0, a[10:], 10)]
    driver.clear()
    rows = [(t, i, 0, i == 9) for i, t in enumerate(a[:10])]
    rows += [(t, i, 1, i == 11) for i, t in enumerate(b[:12])]
    rows += [(t, 10 + i, 0, i == 9) for i, t in enumerate(a[10:])]
    out = driver.decode(batch(rows))
    assert out.shape[0] == 3
    for row, wanted in zip(out, expected, strict=True):
        assert same(driver, row, wanted)


def test_copies_share_cells_and_go_their_own_ways(driver: Driver) -> None:
    a, b = prompts(driver, 2, 100)
    expected = extend(driver, 0, a[:60] + b[:20])
    driver.cut(0)
    alone = extend(driver, 0, a)
    driver.copy(0, 1, Span(0, 60))
    assert driver.used_cells() in (100, None)
    assert same(driver, extend(driver, 1, b[:20], 60), expected)
    driver.cut(0)
    assert driver.used_cells() in (80, None)
    driver.copy(1, 0, Span(0, 60))
    assert same(driver, extend(driver, 0, a[60:], 60), alone)


def test_a_cut_sequence_goes_on_as_if_nothing_had_been(driver: Driver) -> None:
    (tokens,) = prompts(driver, 1, 80)
    extend(driver, 0, tokens[:60])
    expected = extend(driver, 0, tokens[60:], 60)
    driver.cut(0, 60)
    assert np.array_equal(extend(driver, 0, tokens[60:], 60), expected)
    driver.cut(0, 80)
    driver.cut(0, 500)
    driver.cut(1)


@pytest.mark.parametrize("size", [16, 33, 128])
def test_export_and_import_are_bit_exact(driver: Driver, size: int) -> None:
    (tokens,) = prompts(driver, 1, 128)
    extend(driver, 0, tokens)
    spans = [Span(i, min(i + size, 128)) for i in range(0, 128, size)]
    blocks = list(zip(spans, driver.export_spans(0, spans), strict=True))
    expected = extend(driver, 0, tokens[:9], 128)
    driver.clear()
    driver.import_spans(0, blocks, Span(0, 128))
    assert driver.used_cells() in (128, None)
    assert np.abs(extend(driver, 0, tokens[:9], 128) - expected).max() == 0.0


def test_parts_of_blocks_can_be_imported(driver: Driver) -> None:
    (tokens,) = prompts(driver, 1, 128)
    extend(driver, 0, tokens)
    spans = [Span(i, i + 32) for i in range(0, 128, 32)]
    blocks = list(zip(spans, driver.export_spans(0, spans), strict=True))
    driver.cut(0, 100)
    expected = extend(driver, 0, tokens[100:], 100)
    driver.copy(0, 1, Span(0, 40))
    driver.import_spans(1, blocks[1:], Span(40, 100))
    assert driver.used_cells() in (128 + 60, None)
    assert same(driver, extend(driver, 1, tokens[100:], 100), expected)
    driver.import_spans(2, [], Span(0, 0))
    assert driver.export_spans(2, []) == []


def test_bytes_that_do_not_fit_are_refused(driver: Driver) -> None:
    (tokens,) = prompts(driver, 1, 64)
    extend(driver, 0, tokens)
    first, second = driver.export_spans(0, [Span(0, 32), Span(32, 64)])
    driver.cut(0, 32)
    used = driver.used_cells()
    flipped = bytearray(second)
    flipped[:16] = bytes(16)
    for data in (first, second[:-1], b"", bytes(flipped), bytes(len(second))):
        with pytest.raises(ValueError, match="block"):
            driver.import_spans(0, [(Span(32, 64), data)], Span(32, 64))
    assert driver.used_cells() == used
    driver.import_spans(0, [(Span(32, 64), second)], Span(32, 64))


def test_sequences_are_not_disturbed_by_those_that_come_and_go(driver: Driver) -> None:
    """Cells of many sequences lie mixed, with holes that end pages: what a library must get right."""
    texts = prompts(driver, SEQUENCES, 60)
    expected: list[Row] = []
    for tokens in texts:
        driver.clear()
        expected.append(extend(driver, 0, tokens))
    driver.clear()
    for sequence, tokens in enumerate(texts):
        extend(driver, sequence, tokens[:40])
    for position in range(40, 54):
        driver.decode(batch([(t[position], position, s, False) for s, t in enumerate(texts)]))
    stay = [1, 4, 7]
    for sequence in set(range(SEQUENCES)) - set(stay):
        driver.cut(sequence)
    for position in range(54, 59):
        driver.decode(batch([(texts[s][position], position, s, False) for s in stay]))
    out = driver.decode(batch([(texts[s][59], 59, s, True) for s in stay]))
    assert all(same(driver, row, expected[s]) for s, row in zip(stay, out, strict=True))
    driver.cut(1)
    driver.cut(4)
    driver.cut(7, 59)
    assert same(driver, extend(driver, 7, texts[7][59:], 59), expected[7])


def test_out_of_cells_changes_nothing(driver: Driver) -> None:
    texts = prompts(driver, SEQUENCES, 64)
    expected = [extend_alone(driver, texts[5]), extend_alone(driver, texts[7])]
    driver.clear()
    for sequence in range(7):
        extend(driver, sequence, texts[sequence])
    extend(driver, 7, texts[7][:50])
    used = driver.used_cells()
    with pytest.raises(OutOfCells, match="cells"):
        driver.decode(batch([(t, 50 + i, 7, False) for i, t in enumerate(texts[0][:15])]))
    assert driver.used_cells() == used
    (block,) = driver.export_spans(6, [Span(0, 64)])
    driver.cut(6)
    extend(driver, 7, texts[7][50:63], 50)
    extend(driver, 6, texts[6][:1])
    driver.cut(6)
    extend(driver, 5, texts[5][:50], 64)
    used = driver.used_cells()
    with pytest.raises(OutOfCells, match="cells"):
        driver.import_spans(6, [(Span(0, 64), block)], Span(0, 64))
    assert driver.used_cells() == used
    driver.cut(5, 63)
    assert same(driver, extend(driver, 5, texts[5][63:], 63), expected[0])
    assert same(driver, extend(driver, 7, texts[7][63:], 63), expected[1])


def test_defragmenting_makes_room_and_keeps_everything(driver: Driver) -> None:
    texts = prompts(driver, SEQUENCES, 64)
    expected = [extend_alone(driver, texts[1][:60] + texts[s][:21]) for s in range(SEQUENCES)]
    driver.clear()
    extend(driver, 1, texts[1][:60])
    for sequence in set(range(SEQUENCES)) - {1}:
        driver.copy(1, sequence, Span(0, 60))
    for step in range(20):
        driver.decode(batch([(t[step], 60 + step, s, False) for s, t in enumerate(texts)]))
    (block,) = driver.export_spans(0, [Span(0, 80)])
    for sequence in range(0, SEQUENCES, 2):
        driver.cut(sequence)
    extend(driver, 0, texts[0])
    driver.cut(0)
    assert driver.used_cells() in (60 + 4 * 20, None)
    driver.defragment()
    driver.defragment()
    assert driver.used_cells() in (60 + 4 * 20, None)
    for sequence in range(1, SEQUENCES, 2):
        row = extend(driver, sequence, texts[sequence][20:21], 80)
        assert same(driver, row, expected[sequence])
    driver.import_spans(0, [(Span(0, 80), block)], Span(0, 80))
    assert same(driver, extend(driver, 0, texts[0][20:21], 80), expected[0])
    for sequence in (2, 4, 6):
        extend(driver, sequence, texts[sequence], step=50)


def test_any_course_of_events_leaves_sequences_right(driver: Driver) -> None:
    """A random walk over the calls; at its end every sequence goes on as one that was computed alone."""
    random = np.random.default_rng(11)
    texts = prompts(driver, SEQUENCES, 64)
    holds: list[Tokens] = [[] for _ in range(SEQUENCES)]
    for _ in range(60):
        sequence, other = (int(s) for s in random.permutation(SEQUENCES)[:2])
        held = holds[sequence]
        match CALLS[int(random.integers(len(CALLS)))]:
            case "decode" if len(held) < 40:
                more = texts[other][len(held) : len(held) + int(random.integers(1, 20))]
                try:
                    extend(driver, sequence, more, len(held))
                except OutOfCells:
                    driver.defragment()
                    extend(driver, sequence, more, len(held))
                held += more
            case "mixed":
                rows = [(texts[s][len(h)], len(h), s, False) for s, h in enumerate(holds) if 0 < len(h) < 60]
                if rows:
                    driver.decode(batch(rows))
                for token, _, owner, _ in rows:
                    holds[owner].append(token)
            case "copy" if not holds[other]:
                end = len(held) * 2 // 3
                driver.copy(sequence, other, Span(0, end))
                holds[other] = held[:end]
            case "cut":
                driver.cut(sequence, len(held) // 2)
                del held[len(held) // 2 :]
            case "drop":
                driver.cut(sequence)
                held.clear()
            case "move" if held and not holds[other]:
                spans = [Span(i, min(i + 16, len(held))) for i in range(0, len(held), 16)]
                blocks = list(zip(spans, driver.export_spans(sequence, spans), strict=True))
                driver.cut(sequence)
                driver.import_spans(other, blocks, Span(0, len(held)))
                holds[sequence], holds[other] = [], held
            case "defragment":
                driver.defragment()
            case _:
                continue
    last = [t[62] for t in texts]
    rows = [(last[s], len(h), s, True) for s, h in enumerate(holds) if h]
    out = driver.decode(batch(rows)).copy()
    assert len(rows) > 2
    for (token, _, sequence, _), row in zip(rows, out, strict=True):
        assert same(driver, row, extend_alone(driver, [*holds[sequence], token]))


def extend_alone(driver: Driver, tokens: Tokens) -> Row:
    driver.clear()
    return extend(driver, 0, tokens)


def one(token: int = 5, position: int = 0, sequence: int = 0) -> Batch:
    return batch([(token, position, sequence, True)])


@pytest.mark.parametrize(
    "wrong",
    [
        one(position=1),
        one(sequence=SEQUENCES),
        one(sequence=-1),
        one(token=-1),
        one(token=10**6),
        one(position=-1),
        batch([(5, 0, 0, True), (5, 0, 0, True)]),
        batch([(5, 1, 0, True), (5, 0, 0, True)]),
        batch([(5, i, 0, False) for i in range(BATCH_TOKENS + 1)]),
        Batch(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.bool_)),
        Batch(
            np.zeros(2, np.int32), np.arange(2, dtype=np.int32), np.zeros(1, np.int32), np.ones(2, np.bool_)
        ),
    ],
)
def test_batches_that_break_the_contract_are_refused(driver: Driver, wrong: Batch) -> None:
    with pytest.raises(ValueError, match=r".+"):
        driver.decode(wrong)
    driver.decode(one())
    with pytest.raises(ValueError, match=r".+"):
        driver.decode(one(position=0))


def test_calls_that_break_the_contract_are_refused(driver: Driver) -> None:
    extend(driver, 0, [5] * 10)
    extend(driver, 1, [5] * 4)
    for source, target, span in (
        (0, 0, Span(0, 1)),
        (0, 1, Span(0, 5)),
        (0, 2, Span(3, 5)),
        (0, 2, Span(0, 11)),
        (0, 2, Span(3, 2)),
        (0, 2, Span(-1, 2)),
        (0, SEQUENCES, Span(0, 5)),
        (SEQUENCES, 0, Span(0, 5)),
    ):
        with pytest.raises(ValueError, match=r".+"):
            driver.copy(source, target, span)
    for sequence, start in ((SEQUENCES, 0), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=r".+"):
            driver.cut(sequence, start)
    for sequence, span in ((0, Span(0, 11)), (0, Span(5, 5)), (0, Span(-1, 5)), (SEQUENCES, Span(0, 1))):
        with pytest.raises(ValueError, match=r".+"):
            driver.export_spans(sequence, [span])
    a, b = driver.export_spans(0, [Span(0, 4), Span(4, 8)])
    for sequence, blocks, span in (
        (1, [(Span(0, 4), a)], Span(0, 4)),
        (2, [(Span(4, 8), b)], Span(4, 8)),
        (2, [(Span(0, 4), a)], Span(0, 8)),
        (2, [(Span(0, 4), b)], Span(0, 4)),
        (2, [(Span(4, 8), b), (Span(0, 4), a)], Span(0, 8)),
        (SEQUENCES, [(Span(0, 4), a)], Span(0, 4)),
    ):
        with pytest.raises(ValueError, match=r".+"):
            driver.import_spans(sequence, blocks, span)
    assert driver.used_cells() in (14, None)


@pytest.mark.parametrize(
    ("library", "kv_cell_type"), [("native", "f16"), ("native", "q8_0"), ("llama-cpp", "f16")]
)
def test_the_other_libraries_keep_the_contract_too(library: str, kv_cell_type: str) -> None:
    if "STOCKPOT_TEST_LIBRARY" in os.environ:
        pytest.skip("this is the process of its own")
    if not available(library):
        pytest.skip(f"the library {library} is not installed")
    environment = {
        **os.environ,
        "STOCKPOT_TEST_LIBRARY": library,
        "STOCKPOT_TEST_KV_CELL_TYPE": kv_cell_type,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", library, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

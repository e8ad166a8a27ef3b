"""The proof of recall: its counting and policies, and small runs of each part."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.recall import policies
from stockpot.bench.recall.fow import FowPlan, measure_fow
from stockpot.bench.recall.labelled import Kept, LabelledTexts, embed_all, read_labelled
from stockpot.bench.recall.other_caches import GptCache, OtherCache, RedisVl, Vectors
from stockpot.bench.recall.pairs import Pair, folds, read_pairs, score
from stockpot.bench.recall.semantic_run import Turn, through_semantic
from stockpot.bench.recall.speed import SpeedPlan, measure_speed
from stockpot.bench.recall.stream import StreamPlan, measure_stream
from stockpot.bench.recall.stream_worker import best_static, order_of, settings_for
from stockpot.bench.recall.tally import Tally, upper_bound
from stockpot.bench.recall.vcache import VCachePolicy
from stockpot.bench.results import write_result
from stockpot.bench.workload import WordSource
from stockpot.cli import bench
from stockpot.errors import ConfigurationError
from stockpot.recall.vectors.embedder import Embedder
from stockpot.recall.vectors.memory_index import MemoryIndex


class Words(Embedder):
    """A sum of the words' vectors: alike is what has words in common."""

    def __init__(self) -> None:
        self.asked = 0

    @property
    def name(self) -> str:
        return "words"

    @property
    def dimensions(self) -> int:
        return 64

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += len(texts)
        rows = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def question(category: str, kept: str, asked: str, *, same: bool) -> Pair:
    return Pair(f"{kept}/{asked}", "questions", category, (("user", kept),), (("user", asked),), same)


def chat(identity: str, kept: tuple[str, str], asked: tuple[str, str], *, same: bool) -> Pair:
    return Pair(identity, "conversations", "swap", _turns(*kept), _turns(*asked), same)


def _turns(first: str, last: str) -> tuple[Turn, ...]:
    return (("user", first), ("assistant", "Yes."), ("user", last))


PAIRS = [
    question("repeat", "How do I lock my card?", "how do I lock my card", same=True),
    question(
        "repeat", "What does the basic plan include?", "Please, what does the basic plan include?", same=True
    ),
    question("numbers", "Is a dose of 200 mg safe?", "Is a dose of 400 mg safe?", same=False),
    question("negation", "Which plans include calls?", "Which plans don't include calls?", same=False),
    chat("c1", ("I want a bike.", "How much is it?"), ("I want a car.", "How much is it?"), same=False),
    chat("c2", ("I want a bike.", "How much is it?"), ("I want a bike.", "how much is it"), same=True),
]


def stream(count: int = 400) -> tuple[list[str], list[str]]:
    """Questions about a few things, each asked in many ways."""
    random_, source = random.Random(3), WordSource(4)
    things = ("card", "transfer", "account", "statement", "password", "limit")
    ways = ("how do I get a new {}", "where can I find the {}", "what is the {} for", "my {} does not work")
    texts: list[str] = []
    labels: list[str] = []
    for number in range(count):
        thing, way = random_.choice(things), random_.choice(ways)
        # No two vectors are the same: of equally near ones either may be the nearest.
        texts.append(f"{way.format(thing)} {source.text(1 + number % 3)}")
        labels.append(f"{thing} {way}")
    return texts, labels


@pytest.fixture(scope="module")
def data() -> LabelledTexts:
    texts, labels = stream()
    return LabelledTexts.of(texts, labels, asyncio.run(embed_all(texts, Words())))


def test_no_wrong_answer_in_three_hundred_is_a_bound_just_below_one_percent() -> None:
    assert upper_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300))
    assert upper_bound(0, 0) == 1.0
    assert Tally(10, 4, 1).error_of_given == 0.25
    assert Tally().error_of_given == Tally().hit_share == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 400), st.integers(1, 10))
def test_the_nearest_of_what_is_kept_are_found(seed: int, texts: int, count: int) -> None:
    random_ = np.random.default_rng(seed)
    vectors = random_.standard_normal((texts, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    data = LabelledTexts.of([str(number) for number in range(texts)], ["x"] * texts, vectors)
    kept = Kept(data)
    there: list[int] = []
    for number in random_.permutation(texts)[: texts // 2 + 1].tolist():
        kept.add(number)
        there.append(number)
    for number in random_.integers(0, texts, 5).tolist():
        others = [other for other in there if other != number]
        best = sorted((float(vectors[other] @ vectors[number]) for other in others), reverse=True)[:count]
        found = kept.nearest(number, count)
        assert [cosine for _, cosine in found] == pytest.approx(best, abs=1e-5)
        assert number not in [other for other, _ in found]


def test_vectors_are_made_once_and_stay_in_order(tmp_path: Path) -> None:
    texts = ["a much longer text than the others", "b", "some text"]
    embedder = Words()
    vectors = asyncio.run(embed_all(texts, embedder, tmp_path))
    assert np.allclose(vectors, asyncio.run(Words().embed(texts)))
    assert np.array_equal(vectors, asyncio.run(embed_all(texts, embedder, tmp_path)))
    assert embedder.asked == len(texts)
    asyncio.run(embed_all([*texts, "another"], embedder, tmp_path))
    assert embedder.asked == 2 * len(texts) + 1


def test_labelled_texts_come_from_files_and_go_to_another_process(
    tmp_path: Path, data: LabelledTexts
) -> None:
    path = tmp_path / "texts.csv"
    path.write_text('text,category\n"one, two",a\nthree,b\n', encoding="utf-8")
    assert read_labelled([path]) == (["one, two", "three"], ["a", "b"])
    path.write_text("question,answer\na,b\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="question, answer"):
        read_labelled([path])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_labelled([tmp_path / "none.csv"])
    data.save(tmp_path)
    loaded = LabelledTexts.load(tmp_path)
    assert loaded.texts == data.texts
    assert np.array_equal(loaded.neighbours, data.neighbours)


def test_vcache_explores_until_an_entry_is_known_and_then_the_far_ones() -> None:
    policy = VCachePolicy(0.05, seed=1)
    for _ in range(3):
        policy.learn(1, 0.95, same=True)
    assert not policy.serves(1, 0.99)  # two it begins with, and three: one too few
    for _ in range(20):
        policy.learn(1, 0.95, same=True)
        policy.learn(1, 0.60, same=False)
    near = sum(policy.serves(1, 0.99) for _ in range(200))
    far = sum(policy.serves(1, 0.55) for _ in range(200))
    assert near > 150
    assert far < 50
    strict = VCachePolicy(1e-6, seed=1)
    for _ in range(20):
        strict.learn(1, 0.95, same=True)
        strict.learn(1, 0.90, same=False)
        strict.learn(1, 0.95, same=False)
    assert sum(strict.serves(1, 0.95) for _ in range(200)) < 10
    assert not policy.serves(2, 1.0)


def test_policies_count_what_they_give(data: LabelledTexts) -> None:
    order = order_of(1, len(data), None)
    assert sorted(order) == list(range(len(data)))
    everything = policies.static(data, order, -1.0)
    assert everything.tally.given == len(data) - 1
    assert policies.static(data, order, 1.1).tally == Tally(len(data), 0, 0)
    loose, strict = (policies.static(data, order, at) for at in (0.5, 0.97))
    assert strict.tally.wrong <= loose.tally.wrong
    best = best_static([everything, loose, strict], 0.2)
    assert best is None or best.error_of_given <= 0.2
    assert best_static([everything], 0.0) is None
    theirs = policies.vcache(data, order, 0.05, 1)
    assert theirs.tally.asked == len(data)


def test_what_is_refused_is_not_answered_unless_it_is_allowed() -> None:
    texts = ["what time is it now", "what time is it now?"] * 3
    data = LabelledTexts.of(texts, ["time"] * 6, asyncio.run(embed_all(texts, Words())))
    reader = policies.Reader(data)
    refusing = policies.ours(data, range(6), settings_for(0.05, ()), reader, 1)
    assert refusing.refused == 6
    assert refusing.tally.given == 0
    allowing = policies.ours(data, range(6), settings_for(0.05, ("time",)), reader, 1)
    assert allowing.tally.given > 0


async def test_the_servers_classes_decide_what_the_fast_way_decides(data: LabelledTexts) -> None:
    order = order_of(2, len(data), None)
    accepted = settings_for(0.3, ("time", "personal", "creative"))
    fast = policies.ours(data, order, accepted, policies.Reader(data), 2)
    told = await through_semantic(data, order, accepted, Words(), 2)
    assert {number for number, _ in fast.hits} == {number for number, _ in told}
    assert fast.tally.given == len(told) > 0


def test_halves_have_no_text_in_common() -> None:
    pairs = [question("a", f"q{n}", f"q{n + 1 if n % 5 else n}", same=bool(n % 2)) for n in range(40)]
    first, second = folds(pairs)
    assert sorted(pair.id for pair in first + second) == sorted(pair.id for pair in pairs)
    texts = [{text for pair in half for text in pair.texts()} for half in (first, second)]
    assert not texts[0] & texts[1]
    assert first
    assert second


def test_the_pairs_of_fow_cache_are_as_it_ships() -> None:
    pairs = read_pairs()
    counted = [(pair.kind, pair.same) for pair in pairs]
    assert counted.count(("questions", True)) + counted.count(("questions", False)) == 600
    assert len(pairs) == 840
    assert score(pairs, lambda pair: pair.same).error_share == 0
    assert score(pairs, lambda pair: not pair.same).hits == 0


class Everything(OtherCache):
    """Answers always."""

    name = "Everything"

    def prepare(self, progress: BenchProgress) -> None: ...

    def answers(self, pairs: Sequence[Pair], vectors: Vectors, progress: BenchProgress) -> list[bool]:
        return [True for _ in pairs]

    def facts(self) -> Mapping[str, object]:
        return {"version": "none"}


async def test_traps_are_asked_of_every_cache(tmp_path: Path) -> None:
    result = await measure_fow(FowPlan.quick(), PAIRS, Words(), [Everything(), RedisVl()])
    scores = result.figures["scores"]
    everything = scores["Everything"]["questions"]
    assert (everything["hits"], everything["errors"]) == (2, 2)
    ours = scores["ours"]
    assert ours["questions"]["errors"] == ours["conversations"]["errors"] == 0
    assert ours["questions"]["hits"] == 2
    assert scores["RedisVL"]["conversations"]["errors"] == 1  # the last message is all it sees
    assert write_result(result, tmp_path)
    assert sum(row[-1] for row in result.tables[2].rows if isinstance(row[-1], int)) == len(PAIRS)


async def test_a_stream_is_played_in_processes_of_their_own(tmp_path: Path) -> None:
    texts, labels = stream()
    plan = StreamPlan(shuffles=2, deltas=(0.02, 0.2), thresholds=(0.8, 0.95), through=100)
    result = await measure_stream(plan, texts, labels, Words(), vectors_in=tmp_path)
    assert result.figures["decisions_other_than_the_servers"] == 0
    assert len(result.tables[0].rows) == 8
    assert {row[-1] for row in result.tables[0].rows} == {2}
    assert [verdict.what for verdict in result.verdicts][-1].startswith("decisions other")
    assert write_result(result, tmp_path / "out")


async def test_times_are_taken_at_a_real_server() -> None:
    index = MemoryIndex()
    await index.start()
    plan = SpeedPlan(exact_rounds=1, exact_requests=3, entries=300, decisions=5, misses=0)
    result = await measure_speed(plan, Words(), index)
    await index.close()
    assert [row[-1] for row in result.tables[0].rows] == [3] * 6
    assert [row[-1] for row in result.tables[1].rows] == [5] * 3
    assert all(verdict.value is not None for verdict in result.verdicts)


def test_gptcache_is_made_once(tmp_path: Path) -> None:
    home = tmp_path / "bench" / "gptcache-0.1.44"
    home.mkdir(parents=True)
    (home / "complete").touch()
    GptCache(tmp_path).prepare(silent)  # would take a minute, were anything installed
    assert str(tmp_path) not in str(GptCache(tmp_path).facts())


@pytest.fixture
def app() -> Iterator[typer.Typer]:
    app = typer.Typer()
    app.callback()(lambda: None)
    bench.register(app)
    yield app


def test_help_says_what_is_measured(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["bench", "recall", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "fow" in result.output
    assert "--stream" in result.output


def test_an_unknown_part_is_wrong_usage(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["bench", "recall", "--only", "luck"], env={"COLUMNS": "100"})
    assert result.exit_code == 2
    assert "'luck' is none of fow, stream, speed" in result.output

"""Quality and speed as they are measured, on the fake driver and in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stockpot.engine.driver import Batch
from stockpot.engine.fake_driver import FakeDriver
from stockpot.models.candidates import MAX_KL_MEAN
from stockpot.models.quality import MAX_TEXT_TOKENS, compare, quality_text, save_reference
from stockpot.models.speed import CAREFUL, CELLS_NEEDED, SKETCH, STREAMS, Effort, measure
from stockpot.models.trial import Job
from stockpot.models.workbench import LibraryWorkbench, run_apart
from stockpot.runtime import prepare_model
from stockpot.settings import Settings


class _Altered(FakeDriver):
    """Adds the same to the logits of one token, everywhere."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self._added = added

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch).copy()
        logits[:, ord("e")] += self._added
        return logits


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "reference.npy"
    save_reference(FakeDriver(), path)
    return path


def test_the_same_weights_do_not_differ(reference: Path) -> None:
    quality = compare(FakeDriver(), reference)
    assert quality.kl_mean == pytest.approx(0.0, abs=1e-6)
    assert quality.top1_agreement == 1.0
    assert len(np.load(reference)) == MAX_TEXT_TOKENS


def test_the_further_from_the_reference_the_worse(reference: Path) -> None:
    near, far = (compare(_Altered(added), reference) for added in (0.5, 3.0))
    assert near.kl_mean is not None
    assert near.kl_max is not None
    assert far.kl_mean is not None
    assert 0 < near.kl_mean < far.kl_mean
    assert near.kl_mean < near.kl_max
    assert far.top1_agreement < 1.0


def test_the_divergence_is_that_of_the_definition(reference: Path) -> None:
    driver = FakeDriver()
    text = np.array(driver.vocabulary.encode(quality_text(), special=False)[:MAX_TEXT_TOKENS], np.int32)
    places = np.arange(len(text), dtype=np.int32)
    logits = driver.decode(Batch(text, places, np.zeros_like(text), np.ones(len(text), np.bool_)))
    p = np.exp(logits.astype(np.float64))
    q = p.copy()
    q[:, ord("e")] *= np.exp(2.0)
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    expected = (p * np.log(p / q)).sum(axis=1)
    quality = compare(_Altered(2.0), reference)
    assert quality.kl_mean == pytest.approx(expected.mean(), rel=1e-3)
    assert quality.kl_max == pytest.approx(expected.max(), rel=1e-3)
    assert quality.top1_agreement == (p.argmax(axis=1) == q.argmax(axis=1)).mean()


@pytest.mark.parametrize("added", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_quality(reference: Path, added: float) -> None:
    with np.errstate(invalid="ignore"):
        quality = compare(_Altered(added), reference)
    assert quality.kl_mean is None
    assert quality.kl_max is None


@pytest.mark.parametrize("effort", [SKETCH, CAREFUL])
def test_speed_is_measured_and_the_context_left_empty(effort: Effort) -> None:
    driver = FakeDriver(cells=CELLS_NEEDED, max_sequences=STREAMS)
    speed = measure(driver, effort)
    assert speed.prefill_tokens_per_s > 0
    assert speed.decode_tokens_per_s > 0
    assert speed.decode_8_tokens_per_s > 0
    assert (speed.turn_s is not None) is effort.behind_context
    assert driver.used_cells() == 0


def _job(tmp_path: Path, source: Path, encoding: str) -> Job:
    return Job(
        source=source,
        target=tmp_path / "encoded.gguf",
        encoding=encoding,
        binding="ik",
        library="wheel",
        cache_dir=tmp_path / "cache",
        threads=1,
        effort=None,
        reference=None,
    )


def test_what_goes_wrong_in_a_trial_comes_back_as_a_sentence(tmp_path: Path) -> None:
    result = run_apart(_job(tmp_path, tmp_path / "none.gguf", "bread"), tmp_path)
    assert result.failure is not None
    assert "cannot write bread" in result.failure


def test_a_trial_that_dies_takes_nothing_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "path"
    package.mkdir()
    (package / "sitecustomize.py").write_text("import os; print('GGML_ASSERT(soup)', flush=True); os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(package))
    result = run_apart(_job(tmp_path, tmp_path / "none.gguf", "q8_0"), tmp_path)
    assert result.failure is not None
    assert "GGML_ASSERT(soup)" in result.failure


def test_a_trial_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "path"
    package.mkdir()
    (package / "sitecustomize.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(package))
    result = run_apart(_job(tmp_path, tmp_path / "none.gguf", "q8_0"), tmp_path, timeout_s=0.5)
    assert result.failure is not None
    assert "took longer" in result.failure


def test_the_real_library_encodes_and_is_measured(user_settings: Settings, tmp_path: Path) -> None:
    prepared = prepare_model(user_settings)
    choice = prepared.binding
    assert choice.library is not None
    bench = LibraryWorkbench(
        choice.name, user_settings.model.library, choice.library, user_settings.cache_dir
    )
    truth, coarse, reference = tmp_path / "f16.gguf", tmp_path / "q8_0.gguf", tmp_path / "reference.npy"
    exact = bench.attempt(
        prepared.located.path, truth, "f16", effort=None, reference=reference, write_reference=True
    )
    assert exact.failure is None
    rough = bench.attempt(prepared.located.path, coarse, "q8_0", effort=None, reference=reference)
    assert rough.failure is None
    assert rough.quality is not None
    assert rough.quality.kl_mean is not None
    # Eight bits a weight instead of sixteen: the answers are close, and measurably not the same.
    assert 0.0005 < rough.quality.kl_mean < MAX_KL_MEAN
    assert coarse.stat().st_size < truth.stat().st_size


def test_a_changed_library_or_processor_count_is_another_identity(tmp_path: Path) -> None:
    library = tmp_path / "libllama.so"
    library.write_bytes(b"one")
    (tmp_path / "libggml.so").write_bytes(b"kernels")

    def identity(threads: int = 2) -> str:
        return LibraryWorkbench("ik", "auto", library, tmp_path, threads).identity

    first = identity()
    assert first == identity()
    assert first != identity(threads=4)
    (tmp_path / "libggml.so").write_bytes(b"faster kernels")
    assert first != identity()

"""The libraries: struct layouts, what they know, and what happens with files and wishes that do not fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from stockpot.engine.bindings import choose_binding, ik, open_binding, upstream
from stockpot.engine.bindings.ik import IkBinding, wheel_library
from stockpot.engine.driver import Driver
from stockpot.engine.llamacpp import fingerprint, open_driver
from stockpot.errors import BindingUnavailable, ConfigurationError, ModelError, ModelNotFound
from stockpot.models.source import locate
from stockpot.settings import DEFAULT_MODEL, load_settings

needs_wheel = pytest.mark.skipif(wheel_library() is None, reason="ik-llama-cpp-python has no wheel here")
needs_upstream = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
GGML_TYPE_F16 = 1


@pytest.fixture(scope="module")
def wheel() -> IkBinding:
    library = wheel_library()
    assert library is not None
    return IkBinding(library, corrected=False)


@pytest.fixture(scope="module")
def model_path() -> Path:
    return locate(DEFAULT_MODEL, cache_dir=load_settings().cache_dir).path


def open_small(path: Path, cache_dir: Path, *, kv_cell_type: str = "f16", library: str = "wheel") -> Driver:
    return open_driver(
        path,
        name="m",
        binding="ik",
        library=library,
        cache_dir=cache_dir,
        cells=256,
        max_sequences=2,
        max_batch_tokens=32,
        kv_cell_type=kv_cell_type,
        threads=1,
    )


@needs_wheel
def test_ik_structs_read_back_the_defaults_its_header_documents(wheel: IkBinding) -> None:
    model = wheel.model_parameters()
    assert (model.n_gpu_layers, model.split_mode, model.type_k, model.type_v) == (0, 1, 1, 1)
    assert (model.n_seq_max, model.n_ubatch, model.fit) == (1, 512, False)
    assert (model.n_k_first, model.n_v_last) == (-1, -1)
    assert (model.progress_callback, model.kv_overrides) == (None, None)
    assert (model.vocab_only, model.use_mmap, model.dry_run, model.flash_attn) == (False, True, False, True)
    context = wheel.context_parameters()
    assert (context.seed, context.n_ctx, context.n_batch, context.n_ubatch) == (2**32 - 1, 512, 2048, 512)
    assert (context.n_seq_max, context.max_extra_alloc, context.rope_scaling_type) == (1, 256, -1)
    assert (context.yarn_beta_slow, context.defrag_thold) == (-1.0, -1.0)
    assert (context.type_k, context.type_v, context.n_v_last) == (GGML_TYPE_F16, GGML_TYPE_F16, -1)
    assert (context.logits_all, context.offload_kqv, context.flash_attn) == (False, True, True)
    assert (context.mla_attn, context.graph_reuse, context.min_experts) == (3, True, -1)
    assert (context.mtp_op_type, context.abort_callback, context.cuda_params) == (0, None, None)


@needs_upstream
def test_upstream_structs_read_back_the_defaults_its_header_documents() -> None:
    context = upstream.UpstreamBinding().context_parameters()
    assert (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max) == (512, 2048, 512, 1)
    assert (context.flash_attn_type, context.type_k, context.defrag_thold) == (-1, GGML_TYPE_F16, -1.0)
    assert (context.offload_kqv, context.kv_unified) == (True, False)


@needs_wheel
def test_a_library_says_which_architectures_it_knows(wheel: IkBinding) -> None:
    assert wheel.knows_architecture("llama")
    assert wheel.knows_architecture("qwen3")
    assert not wheel.knows_architecture("frobnicator")


@needs_wheel
def test_the_choice_says_which_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose_binding("llama", "auto", "auto", cache_dir=tmp_path)
    assert (choice.name, choice.version, choice.native) == ("ik", "0.1.5", False)
    assert "wheel" in choice.reason
    assert "stockpot engine build" in choice.reason
    with pytest.raises(BindingUnavailable, match="stockpot engine build"):
        choose_binding("llama", "ik", "native", cache_dir=tmp_path)
    with pytest.raises(BindingUnavailable, match="does not know the architecture frobnicator"):
        choose_binding("frobnicator", "ik", "auto", cache_dir=tmp_path)
    monkeypatch.setattr(upstream, "installed_version", lambda: None)
    with pytest.raises(BindingUnavailable, match=r"frobnicator.*pip install 'stockpot\[llama-cpp\]'"):
        choose_binding("frobnicator", "auto", "auto", cache_dir=tmp_path)
    with pytest.raises(BindingUnavailable, match="not installed"):
        choose_binding("llama", "llama-cpp", "auto", cache_dir=tmp_path)
    monkeypatch.setattr(ik, "wheel_library", lambda: None)
    with pytest.raises(BindingUnavailable, match="wheels are for Linux"):
        choose_binding("llama", "auto", "auto", cache_dir=tmp_path)
    with pytest.raises(BindingUnavailable, match="wheels are for Linux"):
        open_binding("ik", cache_dir=tmp_path)


@needs_upstream
def test_upstream_runs_what_ik_does_not_know(tmp_path: Path) -> None:
    choice = choose_binding("modern-bert", "auto", "auto", cache_dir=tmp_path)
    assert choice.name == "llama-cpp"
    assert "does not know" in choice.reason


@needs_wheel
def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "libllama.so"
    library.write_bytes(b"no library")
    with pytest.raises(BindingUnavailable, match=r"libllama\.so cannot be used"):
        IkBinding(library, corrected=False)


@pytest.fixture
def broken_models(tmp_path: Path, model_path: Path) -> Iterator[Path]:
    data = model_path.read_bytes()
    for name, content in (
        ("empty", b""),
        ("text", b"This is no model, it is a sentence.\n" * 100),
        ("magic", b"GGUF"),
        ("header", data[:1000]),
        ("metadata", data[:1_000_000]),
        ("tensors", data[: len(data) // 2]),
        ("last-byte", data[:-1]),
        ("counts", data[:8] + b"\xff" * 16 + data[24:100_000]),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(content)
    return tmp_path.glob("*.gguf")


@needs_wheel
def test_broken_model_files_are_a_sentence_not_a_crash(
    broken_models: Iterator[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in broken_models:
        with pytest.raises(ModelError, match=path.name):
            open_small(path, tmp_path)
    with pytest.raises(ModelNotFound, match=r"missing\.gguf"):
        open_small(tmp_path / "missing.gguf", tmp_path)
    out, error = capfd.readouterr()
    assert (out, error) == ("", "")


@needs_wheel
def test_the_library_reports_what_it_cannot_load(wheel: IkBinding, broken_models: Iterator[Path]) -> None:
    """Without our own check in front of it."""
    for path in broken_models:
        if path.stem != "counts":  # which the library would try to allocate
            with pytest.raises(ModelError, match=r"ik cannot load .*\.gguf: .+"):
                wheel.load_model(path)


@needs_wheel
def test_loading_is_silent_and_the_cell_type_must_fit(
    model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    driver = open_small(model_path, tmp_path)
    assert driver.facts.kv_bytes_per_token == 30 * 2 * 3 * 64 * 2
    assert "ik-0.1.5/f16/fa0" in driver.facts.layout
    driver.close()
    with pytest.raises(ConfigurationError, match="stockpot engine build"):
        open_small(model_path, tmp_path, kv_cell_type="q8_0")
    with pytest.raises(ConfigurationError, match="q3_x"):
        open_small(model_path, tmp_path, kv_cell_type="q3_x")
    out, error = capfd.readouterr()
    assert (out, error) == ("", "")


@needs_wheel
def test_quantizing_says_what_it_cannot_do(wheel: IkBinding, model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot write q3_x; it knows"):
        wheel.quantize(model_path, tmp_path / "x.gguf", "q3_x")
    with pytest.raises(ModelError, match="cannot write"):
        wheel.quantize(tmp_path / "missing.gguf", tmp_path / "x.gguf", "q8_0")


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"weights")
    b.write_bytes(b"weights")
    c.write_bytes(b"Weights")
    assert fingerprint((a,)) == fingerprint((b,)) != fingerprint((c,))

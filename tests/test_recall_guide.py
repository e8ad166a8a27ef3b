"""The examples of docs/recall.md, run as they stand before a scripted provider."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import httpx2
import pytest
from tests.test_readme import GUIDES, PUBLISHED, SECRETS, blocks, gateway, run

from stockpot.config_check import check
from stockpot.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "recall.md").read_text(encoding="utf-8")
BACKENDS = blocks("toml", GUIDES["README.md"])[0].replace(
    "[access]", '[access]\nadmin_key = "env:STOCKPOT_ADMIN_KEY"'
)
FEEDBACK = "chatcmpl-ID"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("secrets")
def test_all_toml_fits(tmp_path: Path) -> None:
    file = tmp_path / "stockpot.toml"
    shown = blocks("toml", GUIDE)
    assert len(shown) > 3
    for block in shown:
        file.write_text(f"{BACKENDS}\n{block}")
        findings = check(load_settings(file), referred=SECRETS)
        assert not findings.errors, block
        assert not findings.warnings, block


def test_all_settings_are_shown_or_named() -> None:
    from stockpot.settings_recall import RecallSettings, SemanticSettings

    names = {*RecallSettings.model_fields, *SemanticSettings.model_fields}
    missing = {name for name in names if not re.search(rf"\b{name}\b", GUIDE)}
    assert not missing, f"docs/recall.md does not speak of {missing}"


async def test_the_examples(tmp_path: Path) -> None:
    recall = next(block for block in blocks("toml", GUIDE) if tomllib.loads(block)["recall"].get("exact"))
    async with gateway(tmp_path, f"{BACKENDS}\n{recall}") as (address, environment):
        key = (await run("stockpot keys create --name ada", tmp_path, environment)).strip()
        environment = {**environment, "KEY": key}
        (example,) = blocks("python", GUIDE)
        (tmp_path / "example.py").write_text(example.replace(PUBLISHED, address))
        printed = await run("python -W error example.py", tmp_path, environment)
        assert re.search(r"^bypass None .*\nexact \d+ ", printed, re.MULTILINE), printed
        async with httpx2.AsyncClient(base_url=address) as client:
            body = {
                "model": "chat",
                "messages": [{"role": "user", "content": "How do I reset my password?"}],
                "temperature": 0,
            }
            kept = await client.post(
                "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}
            )
        assert kept.headers["x-stockpot-recall"] == "exact"
        shell = "\n".join(blocks("bash", GUIDE)).replace(PUBLISHED, address)
        shell = shell.replace(FEEDBACK, kept.json()["id"])
        shell = re.sub(r"^(stockpot recall .*)$", rf"\1 --url {address}", shell, flags=re.MULTILINE)
        printed = await run(shell, tmp_path, environment)
    assert "How do I reset" in printed or "looked up" in printed
    assert '"removed":true' in printed
    assert "taken out" in printed

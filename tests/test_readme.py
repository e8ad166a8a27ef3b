"""The examples of the README and of docs/gateway.md, run as they stand against servers of this checkout.

Those of one server run on the real model. Those of the gateway run in order, in one shell, before a scripted
provider; their first TOML block is the file it is started with, the others must fit beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx2
import jsonschema
import pytest
from tests.mock_upstream import MockUpstream
from typer.main import get_command

from stockpot.cli.main import build
from stockpot.config_check import check
from stockpot.config_watch import RESTART_SECTIONS
from stockpot.settings import load_settings
from stockpot.settings_gateway import ResilienceSettings

ROOT = Path(__file__).resolve().parent.parent
WHOLE = (ROOT / "README.md").read_text(encoding="utf-8")
PUBLISHED = "http://127.0.0.1:8000"
NEVER_S = 60.0
"""What has not happened by then never will."""

_GATEWAY = r"\n## In front of other servers\n.*?(?=\n## )"
_FOUND = re.search(_GATEWAY, WHOLE, flags=re.DOTALL)
assert _FOUND is not None
README = WHOLE.replace(_FOUND[0], "")
"""Without what is about the gateway."""
GUIDE = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")
GUIDES = {"README.md": _FOUND[0], "docs/gateway.md": GUIDE}
SECRETS = {"STOCKPOT_ADMIN_KEY": "an-admin-key", "ANTHROPIC_API_KEY": "a-provider's-key"}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """`stockpot serve` on a free port; its address."""
    command = [sys.executable, "-m", "stockpot", "serve", "--port", "0", "--config", "tests/empty.toml"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        seen: list[str] = []
        for line in process.stdout:
            seen.append(line)
            if found := re.search(r"url\s+(http://\S+)/v1", line):
                break
        else:
            pytest.fail(f"the server did not start: {''.join(seen)}")
        yield found[1]
        process.terminate()
        process.stdout.read()
        assert process.wait(timeout=60) == 0


def here(text: str, server: str) -> str:
    assert PUBLISHED in text
    return text.replace(PUBLISHED, server)


def test_the_curl_example(server: str) -> None:
    examples = [block for block in blocks("bash") if block.startswith("curl")]
    assert examples
    for example in examples:
        done = subprocess.run(
            ["bash", "-euc", here(example, server)], capture_output=True, text=True, check=True, timeout=120
        )
        assert '"content":"' in done.stdout or '"hit_ratio"' in done.stdout, done.stdout


def test_the_python_examples(server: str) -> None:
    examples = blocks("python")
    assert examples
    for example in examples:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", here(example, server)],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "cached" in done.stdout


def test_every_command_shown_exists_with_its_options() -> None:
    shown = re.findall(r"(?:`|^|\(|bin/)stockpot ([a-z-]+)((?: [^\n`#|)]+)?)", WHOLE + GUIDE, re.MULTILINE)
    assert len(shown) > 40
    for first, rest in shown:
        command: Any = cast(Any, get_command(build())).commands[first]
        words = rest.split()
        command = getattr(command, "commands", {}).get(words[0] if words else "", command)
        options = {"--help", *(option for parameter in command.params for option in parameter.opts)}
        for word in words:
            assert not word.startswith("-") or word in options, f"stockpot {first}{rest}: {word}"


def test_structured_output_on_the_real_model(server: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Plan a trip to Rome."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "trip", "schema": schema}},
        "max_tokens": 100,
        "seed": 3,
    }
    answer = httpx2.post(f"{server}/v1/chat/completions", json=body, timeout=120).json()
    content = answer["choices"][0]["message"]["content"]
    jsonschema.validate(json.loads(content), schema)
    again = httpx2.post(f"{server}/v1/chat/completions", json=body, timeout=120).json()
    assert again["choices"][0]["message"]["content"] == content, "the same seed, the same text"


@asynccontextmanager
async def gateway(folder: Path, config: str) -> AsyncGenerator[tuple[str, dict[str, str]]]:
    """`stockpot serve` in a folder with this stockpot.toml, its backends scripted; its address, and the
    environment in which commands find it."""
    environment = {
        **os.environ,
        **SECRETS,
        "STOCKPOT_DATA_DIR": str(folder / "data"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "200",
        "PYTHONUNBUFFERED": "1",
    }
    async with MockUpstream() as mock:
        (folder / "stockpot.toml").write_text(
            re.sub(r'url = "https?://[^"]+"', f'url = "{mock.url}"', config)
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stockpot", "serve", "--port", "0"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        seen: list[str] = []
        try:
            async with asyncio.timeout(NEVER_S):
                async for line in process.stdout:
                    seen.append(line.decode())
                    if found := re.search(r"url\s+(http://\S+)/v1", seen[-1]):
                        break
                else:
                    pytest.fail(f"the gateway did not start: {''.join(seen)}")
            yield found[1], environment
            process.terminate()
            async with asyncio.timeout(NEVER_S):
                await process.communicate()
            assert process.returncode == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


async def run(script: str, folder: Path, environment: dict[str, str]) -> str:
    """What a shell prints that is given this."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", script),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=environment,
    )  # fmt: skip
    async with asyncio.timeout(2 * NEVER_S):
        out, err = await process.communicate()
    assert process.returncode == 0, f"{out.decode()}\n{err.decode()}"
    return out.decode()


@pytest.mark.parametrize("guide", GUIDES)
async def test_the_gateway_examples(guide: str, tmp_path: Path) -> None:
    config = blocks("toml", GUIDES[guide])[0]
    async with gateway(tmp_path, config) as (address, environment):
        lines = [f'python() {{ {sys.executable} -W error "$@"; }}']
        for number, (language, block) in enumerate(
            re.findall(r"```(bash|python)\n(.*?)```", GUIDES[guide], flags=re.DOTALL)
        ):
            block = block.replace(PUBLISHED, address)
            if language == "python":
                (tmp_path / f"{number}.py").write_text(block)
                block = f"python {number}.py"
            lines += [block, "echo"]
        printed = await run("\n".join(lines), tmp_path, environment)
    assert '"error"' not in printed
    assert "Name three fruits." in printed, "the scripted provider repeats what it is asked"
    assert "stockpot.toml fits:" in printed
    assert '"backend":"gpu-' in printed
    assert '"requests":' in printed


@pytest.mark.parametrize("guide", GUIDES)
def test_all_toml_fits(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "stockpot.toml"
    first, *others = blocks("toml", GUIDES[guide])
    file.write_text(first)
    sections: list[dict[str, Any]] = [{}, *map(tomllib.loads, others)]
    for section in sections:
        findings = check(load_settings(file, **section), referred=SECRETS)
        assert not findings.errors, section
        assert not findings.warnings, section


def test_the_guide_shows_the_defaults_of_resilience() -> None:
    shown = next(tomllib.loads(block) for block in blocks("toml", GUIDE) if "[resilience]" in block)
    given = dict(shown["resilience"])
    assert given.pop("hedge_after_s"), "the one that is off by default"
    defaults = ResilienceSettings().model_dump()
    assert given == {name: defaults[name] for name in given}


def test_the_guide_names_what_needs_a_restart() -> None:
    sentence = re.search(r"a restart changes (.*?);", GUIDE.replace("\n", " "))
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == set(RESTART_SECTIONS)


async def test_the_guide_names_metrics_and_routes_that_exist(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, blocks("toml", GUIDE)[0]) as (address, _),
        httpx2.AsyncClient(base_url=address) as client,
    ):
        families = (await client.get("/metrics")).text
        document = (await client.get("/openapi.json")).json()
    table = GUIDE.partition("## Observability")[2].partition("```")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(named) > 20
    for name in named:
        assert f"# TYPE stockpot_gateway_{name.removesuffix('_total')}" in families, name
    existing = {re.sub(r"\{[^}]*\}", "ID", path) for path in document["paths"]}
    routes = re.findall(r"/(?:v1|admin)/[\w/]*\w", GUIDE.partition("## HTTP routes")[2])
    wanted = {re.sub("TASK", "ID", route) for route in routes} - {"/admin/cache"}
    assert len(wanted) > 10
    for route in wanted:
        assert route in existing, (route, existing)


def test_links_lead_somewhere() -> None:
    for name, text in {"README.md": WHOLE, "docs/gateway.md": GUIDE}.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
    headings = {re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-") for line in GUIDE.splitlines()
                if line.startswith("## ")}  # fmt: skip
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) == headings

"""The README's examples, run as they stand against a server of this checkout on the real model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import jsonschema
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PUBLISHED = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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


def test_every_command_the_readme_shows_exists() -> None:
    shown = {tuple(words) for words in re.findall(r"stockpot ([a-z-]+)(?: ([a-z-]+))?", README)}
    for first, second in sorted(shown):
        arguments = [word for word in (first, second) if word]
        done = subprocess.run(
            [sys.executable, "-m", "stockpot", *arguments, "--help"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"stockpot {' '.join(arguments)}: {done.stderr}"


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

"""`stockpot config` as a person types it: mistakes by their path, values with their source, no secrets."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from stockpot.cli import config
from stockpot.errors import ConfigurationError
from stockpot.settings import load_settings


def _run(*arguments: str, exit_code: int = 0) -> str:
    app = typer.Typer()
    config.register(app)
    app.callback()(lambda: None)
    result: Result = CliRunner().invoke(app, ["config", *arguments])
    if exit_code == 78:  # given by main, which knows the error
        assert isinstance(result.exception, ConfigurationError), result.output
        return result.output + str(result.exception)
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "stockpot.toml"


WRONG = """
[servr]
[server]
port = 70000
prt = 1
[backends.a]
kind = "opnai"
api_key = "env:NOT_SET_ANYWHERE"
headers = { x = "file:/nowhere/at/all" }
[backends."Bad Name"]
url = "http://x"
[routes.x]
targets = [{ model = "a", weigt = 1 }]
[routes.y]
targets = []
[guards.g]
rule = "block-list"
[cache]
secret = 12345
"""


def test_every_mistake_is_named_by_its_path(file: Path) -> None:
    file.write_text(WRONG, encoding="utf-8")
    output = _run("check", exit_code=78)
    lines = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
    said = dict(line.split(": ", 1) for line in lines)
    assert list(said) == sorted(said)
    assert set(said) == {
        "servr",
        "server.port",
        "server.prt",
        "backends.a.kind",
        "backends.a.api_key",
        "backends.a.headers.x",
        "backends.a.url",
        "backends.Bad Name",
        "routes.x.targets.0.weigt",
        "routes.y.targets",
        "guards.g",
        "cache.secret",
    }
    assert "did you mean 'server'?" in said["servr"]
    assert "did you mean 'port'?" in said["server.prt"]
    assert "did you mean 'openai'?" in said["backends.a.kind"]
    assert "did you mean 'weight'?" in said["routes.x.targets.0.weigt"]
    assert "NOT_SET_ANYWHERE is not set" in said["backends.a.api_key"]
    assert "/nowhere/at/all" in said["backends.a.headers.x"]
    assert "'words' or 'words_file'" in said["guards.g"]
    assert "12345" not in output
    assert f"{file.name} does not fit: 12 mistakes" in output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[server\n", "not valid TOML"),
        ("[engine]\nenabled = false\n", "nothing to serve"),
        (
            '[routes.a]\ntargets=[{model="b"}]\n[routes.b]\ntargets=[{model="a"}]\n',
            "in a circle: a -> b -> a",
        ),
        ('[routes.a]\ntargets=[{model="b", weight=0}]\n', "weight 0"),
        ('[routes.a]\ntargets=[{model="b"}]\ncascade={to="c", pattern="("}\n', "routes.a.cascade: "),
        (
            '[routes.a]\ntargets=[{model="b"}]\ncascade={to="c", classifier="no.such:thing"}\n',
            "cannot be loaded",
        ),
        ('[guards.g]\nrule="secrets"\nkinds=["tea"]\n', "guards.g.kinds names 'tea'"),
        ('[guards.g]\nrule="pattern"\npattern="("\non="output"\n', "no regular expression"),
        ('[guards.g]\nrule="block-list"\nwords_file="/nowhere"\n', "guards.g.words_file"),
        ('[accounts]\ndatabase="mysql://u:hunter2@h/d"\n', "not supported"),
        ('[allowances]\nredis_url="http://h"\n', "allowances.redis_url"),
        ('[cache.redis]\nurl="redis://h"\n', "needs cache.secret"),
        ('[cache]\nsecret="short"\n', "16 random bytes"),
        (
            '[recall.semantic]\nmode="on"\nverifier="no.such:thing"\n',
            "The verifier 'no.such:thing' of recall cannot be loaded",
        ),
        ('[recall.semantic]\nmode="shadow"\nverifier="json:__name__"\n', "is no function"),
        ('[recall]\nexact=true\nstore="redis://u:hunter2@h:port"\n', "recall.store does not fit"),
        ('[recall]\nstore="postgres://u:hunter2@h"\n', "recall: store: give redis://"),
    ],
)
def test_what_does_not_fit_together_is_an_error(file: Path, content: str, said: str) -> None:
    file.write_text(content, encoding="utf-8")
    output = _run("check", exit_code=78)
    assert said in output
    assert "hunter2" not in output


def test_several_guards_are_all_looked_at(file: Path) -> None:
    file.write_text(
        '[guards.g]\nrule="secrets"\nkinds=["tea"]\n[guards.h]\nrule="secrets"\nkinds=["milk"]\n',
        encoding="utf-8",
    )
    output = _run("check", exit_code=78)
    assert "guards.g.kinds" in output
    assert "guards.h.kinds" in output
    assert "2 mistakes" in output


GATEWAY = """
[engine]
enabled = false
[backends.a]
url = "http://a/v1"
models = ["Qwen-8b"]
"""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '[routes.r]\ntargets=[{model="qwen-8b"}]\n',
            "routes.r.targets.0.model is 'qwen-8b', which no backend",
        ),
        ('[routes.r]\ntargets=[{model="Qwen-8b"}]\nfallbacks=[{to="x"}]\n', "routes.r.fallbacks.0.to is 'x'"),
        (
            '[routes.r]\ntargets=[{model="Qwen-8b"}]\ncascade={to="Qwen-8b", on=["regex"]}\n',
            "routes.r.cascade checks no pattern",
        ),
        ('[guards.g]\nrule="secrets"\nmodels=["Qwen-8"]\n', "did you mean 'Qwen-8b'?"),
        ('[guards.g]\nrule="classifier"\njudge="x"\n', "guards.g.judge names 'x'"),
        ('[guards.g]\nrule="secrets"\nteams=["reserch"]\n[teams.research]\n', "did you mean 'research'?"),
        ('[server]\nhost="0.0.0.0"\n', 'Set access.keys = "required"'),
        ('[access]\nkeys="required"\n[accounts]\nenabled=false\n', "Nobody may call"),
        ("[teams.t.limits]\nusd_per_day=5\n", "No price is known for 'Qwen-8b' of backends.a"),
        ("[recall]\nttl_s=60\n", "nothing is kept: set recall.exact"),
        ('[recall]\nexact=true\nmodels=["qwen-8b"]\n', "did you mean 'Qwen-8b'?"),
        (
            '[recall]\nexact=true\nversions={"Qwen-8"="2"}\n',
            "recall.versions names 'Qwen-8', which is no model",
        ),
        (
            '[recall]\nexact=true\nscope="key"\n[accounts]\nenabled=false\n',
            'recall.scope is "key", and there can be no keys',
        ),
        ('[recall.semantic]\nmode="on"\n', "Set recall.sampled = true"),
        ('[recall.semantic]\nmode="on"\njudge="x"\n', "recall.semantic.judge names 'x'"),
        ('[recall.semantic]\nmode="on"\nembedding_model="x"\n', "recall.semantic.embedding_model names 'x'"),
        ('[recall.semantic]\nmode="on"\naudit_share=0\n', "recall.semantic.audit_share is 0"),
        (
            '[recall.semantic]\nmode="on"\nindex_url="postgresql://h/d"\n',
            "recall.semantic.index_url is shared by all nodes",
        ),
    ],
)
def test_what_is_probably_a_mistake_is_a_warning(file: Path, content: str, said: str) -> None:
    file.write_text(GATEWAY + content, encoding="utf-8")
    output = _run("check")
    assert any(line.startswith("warning: ") and said in line for line in output.splitlines()), output
    assert "fits:" in output


def test_backends_that_name_no_models_are_not_guessed_at(file: Path) -> None:
    file.write_text(
        GATEWAY + '[backends.b]\nurl="http://b/v1"\n[routes.r]\ntargets=[{model="other"}]\n', encoding="utf-8"
    )
    output = _run("check")
    assert "warning" not in output
    assert "note: Whether 'other' can be served shows when backends.b" in output


def test_recall_that_fits_is_not_remarked_on(file: Path) -> None:
    file.write_text(
        GATEWAY
        + """
[recall]
exact = true
sampled = true
store = "redis://h"
models = ["Qwen-8b", "r"]
versions = { "Qwen-8b" = "2" }
[recall.semantic]
mode = "on"
judge = "r"
verifier = "math:hypot"
index_url = "postgresql://h/d"
[routes.r]
targets = [{ model = "Qwen-8b" }]
""",
        encoding="utf-8",
    )
    assert "warning" not in _run("check")


def test_variables_that_set_nothing_are_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKPOT_SERVRE__PORT", "9000")
    monkeypatch.setenv("STOCKPOT_MY_KEY", "0123456789abcdef")
    file.write_text('[cache]\nsecret = "env:STOCKPOT_MY_KEY"\n', encoding="utf-8")
    output = _run("check")
    assert "STOCKPOT_SERVRE__PORT sets nothing" in output
    assert "did you mean 'STOCKPOT_SERVER'?" in output
    assert "STOCKPOT_MY_KEY" not in output


SHOWN = """
[cache]
secret = "env:A_SECRET"
[access]
admin_key = "written-in-the-file"
[allowances]
redis_url = "redis://app:hunter2@h:6379/0"
[recall]
exact = true
store = "redis://app:pass-of-the-store@h:6379/1"
versions = { "org/m.1" = "2" }
[recall.semantic]
index_url = "env:INDEX_URL"
[backends.a]
url = "http://a/v1"
api_key = "file:key.txt"
headers = { "x-team" = "another-secret" }
models = ["m", "n"]
[routes."o/m"]
targets = [{ model = "m", weight = 2 }, { model = "n" }]
[guards.g]
rule = "json-schema"
on = "output"
schema = { type = "object", required = ["a"] }
"""


@pytest.fixture
def shown(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INDEX_URL", "postgresql://app:pass-of-the-index@h/d")
    monkeypatch.setenv("A_SECRET", "0123456789abcdef-secret")
    monkeypatch.setenv("STOCKPOT_SERVER__PORT", "9000")
    monkeypatch.setenv("STOCKPOT_CACHE__REDIS__PASSWORD", "from-the-environment")
    (file.parent / "key.txt").write_text("key-in-a-file\n", encoding="utf-8")
    file.write_text(SHOWN, encoding="utf-8")
    return file


SECRETS = (
    "0123456789abcdef",
    "written-in-the-file",
    "hunter2",
    "another-secret",
    "from-the-environment",
    "key-in-a-file",
    "pass-of-the-store",
    "pass-of-the-index",
)


@pytest.mark.parametrize("arguments", [(), ("--defaults",), ("--format", "json", "--defaults")])
def test_secrets_are_never_shown(shown: Path, arguments: tuple[str, ...]) -> None:
    output = _run("show", *arguments)
    assert not [secret for secret in SECRETS if secret in output]
    assert "env:A_SECRET" in output
    assert "file:key.txt" in output
    assert "redis://app:********@h:6379/0" in output
    assert '"redis://********"' in output
    assert "env:INDEX_URL" in output


def test_values_have_their_sources(shown: Path) -> None:
    output = _run("show")
    assert "port = 9000  # STOCKPOT_SERVER__PORT" in output.splitlines()
    assert 'secret = "env:A_SECRET"  # file' in output.splitlines()
    assert 'password = "********"  # STOCKPOT_CACHE__REDIS__PASSWORD' in output.splitlines()
    assert "host" not in output
    told = json.loads(_run("show", "--format", "json", "--defaults"))
    assert told["settings"]["server"]["host"] == "127.0.0.1"
    assert told["sources"]["server.host"] == "default"
    assert told["sources"]["server.port"] == "STOCKPOT_SERVER__PORT"
    assert told["sources"]["backends.a.models.n"] == "file"


def test_what_is_shown_sets_the_same(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_settings(shown)
    for arguments in ((), ("--defaults",)):
        output = _run("show", *arguments)
        tomllib.loads(output)
        again = shown.parent / "again.toml"
        again.write_text(output, encoding="utf-8")
        after = load_settings(again)
        for section in ("server", "engine", "routes", "guards", "data_dir", "resilience"):
            assert getattr(after, section) == getattr(before, section)
        assert after.cache.secret == before.cache.secret
        assert after.backends["a"].models == before.backends["a"].models


def test_nothing_set_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOCKPOT_CACHE__DISK__CAPACITY_BYTES", raising=False)
    assert "Nothing is set" in _run("show")
    assert "host" in _run("show", "--defaults")
    assert "The environment fits" in _run("check")

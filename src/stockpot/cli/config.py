"""`stockpot config`: whether the settings fit, and what is in force."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from stockpot.config_check import Findings
    from stockpot.settings import Settings
    from stockpot.settings_problems import Problem

Config = Annotated[
    Path | None, typer.Option(help="Settings as TOML. [default: ./stockpot.toml where it exists]")
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(no_args_is_help=True, help="The settings: whether they fit, and what is in force.")

    @group.callback()
    def root() -> None:
        pass

    _add_check(group)
    _add_show(group)
    app.add_typer(group, name="config")


def _add_check(group: typer.Typer) -> None:
    @group.command()
    def check(*, config: Config = None) -> None:
        """Find all mistakes that can be found without a network, each with the path of its setting.

        Checked are names and values, secrets (whether their references lead to something), routes, guards,
        and the functions they name. Exit code 78 where something is wrong, 0 otherwise, whatever
        the warnings.
        """
        from stockpot.config_check import check as checked
        from stockpot.config_show import Sources
        from stockpot.errors import ConfigurationError
        from stockpot.settings import config_path

        file = config_path(config)
        try:
            settings = _loaded(config)
        except _Wrong as wrong:
            for problem in wrong.problems:
                typer.echo(f"error: {problem}", err=True)
            raise ConfigurationError(_conclusion(len(wrong.problems), file)) from None
        findings = checked(settings, Sources(file).variables())
        _print_findings(findings)
        if findings.errors:
            raise ConfigurationError(_conclusion(len(findings.errors), file))
        typer.echo(f"{_name(file)} fits: {_summary(settings)}.")


def _add_show(group: typer.Typer) -> None:
    @group.command()
    def show(
        *,
        format: Annotated[Literal["toml", "json"], typer.Option(help="How to print it.")] = "toml",
        defaults: Annotated[bool, typer.Option("--defaults", help="Also what nobody has set.")] = False,
        config: Config = None,
    ) -> None:
        """Print the settings in force, and where each came from: the file, the environment or the default.

        Secrets are shown as their reference (env:NAME, file:PATH), or as ********.
        """
        from stockpot.config_show import Sources, as_json, as_toml, values
        from stockpot.settings import config_path, load_settings

        settings = load_settings(config)
        shown = values(settings, Sources(config_path(config)))
        if not defaults:
            shown = [value for value in shown if value.source != "default"]
        if format == "json":
            typer.echo(as_json(shown))
        elif shown:
            typer.echo(as_toml(shown))
        else:
            typer.echo("# Nothing is set: all defaults (--defaults shows them).")


class _Wrong(Exception):
    """Settings that do not fit, taken apart."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__()
        self.problems = problems


def _loaded(config: Path | None) -> Settings:
    """Raises _Wrong for values that do not fit, ConfigurationError for a file that cannot be read."""
    from pydantic import ValidationError

    from stockpot.errors import ConfigurationError
    from stockpot.settings import Settings, load_settings
    from stockpot.settings_problems import problems

    try:
        return load_settings(config)
    except ConfigurationError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise _Wrong(problems(error.__cause__, Settings)) from None


def _print_findings(findings: Findings) -> None:
    for kind, sentences in (("error", findings.errors), ("warning", findings.warnings)):
        for sentence in sentences:
            typer.echo(f"{kind}: {sentence}", err=True)
    for sentence in findings.notes:
        typer.echo(f"note: {sentence}", err=True)


def _summary(settings: Settings) -> str:
    from stockpot.cli.cache_words import plural

    model = f"the model {settings.model.source}" if settings.engine.enabled else "no model of its own"
    parts = {
        "backend": settings.backends,
        "route": settings.routes,
        "team": settings.teams,
        "guard": settings.guards,
    }
    counted = [plural(len(sections), noun) for noun, sections in parts.items() if sections]
    return ", ".join([model, *counted])


def _conclusion(count: int, file: Path | None) -> str:
    from stockpot.cli.cache_words import plural

    return f"{_name(file)} does not fit: {plural(count, 'mistake')}, named above."


def _name(file: Path | None) -> str:
    return "The environment" if file is None else f"The configuration {file}"

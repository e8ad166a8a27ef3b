"""`stockpot keys`: virtual keys, in the database of these settings; running servers follow in 2 seconds."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stockpot.identity.key_admin import KeyAdmin
    from stockpot.identity.key_store import StoredKey

_Config = Annotated[
    Path | None, typer.Option(help="Settings as TOML. [default: ./stockpot.toml where it exists]")
]
_Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as 'stockpot keys list' shows it.")]
_Count = Annotated[int | None, typer.Option(min=0, show_default=False)]
_Usd = Annotated[float | None, typer.Option(min=0, show_default=False, help="US dollars.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Virtual keys: who may call, which models, how much. The commands work on the database of these"
        " settings; servers that use it follow within two seconds.",
    )
    _add_create(group)
    _add_list(group)
    _add_revoke(group)
    _add_rotate(group)
    app.add_typer(group, name="keys")


def _add_create(group: typer.Typer) -> None:
    @group.command()
    def create(
        *,
        name: Annotated[str, typer.Option(help="What it is for, or whose it is.")],
        team: Annotated[str, typer.Option(help="Whose limits (teams.NAME) it shares.")] = "",
        tag: Annotated[list[str] | None, typer.Option(help="A label for reports; may be repeated.")] = None,
        model: Annotated[
            list[str] | None, typer.Option(help="A model it may use; may be repeated. [default: all]")
        ] = None,
        tenant: Annotated[
            str, typer.Option(help="Whose caches it shares. [default: its team's, else its own]")
        ] = "",
        expires: Annotated[
            str | None, typer.Option(help="When it ends, such as 12h or 30d from now.")
        ] = None,
        requests_per_minute: _Count = None,
        tokens_per_minute: _Count = None,
        concurrency: _Count = None,
        tokens_per_day: _Count = None,
        tokens_per_month: _Count = None,
        usd_per_day: _Usd = None,
        usd_per_month: _Usd = None,
        admin: Annotated[
            bool, typer.Option("--admin", help="A key that administers the server and does nothing else.")
        ] = False,
        as_json: _Json = False,
        config: _Config = None,
    ) -> None:
        """Make a key and print it, this once: only its digest is kept.

        From the first key on, everybody needs one.
        """
        from stockpot.caller import Limits
        from stockpot.identity.key_admin import NewKey

        limits = Limits(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
            tokens_per_day=tokens_per_day,
            tokens_per_month=tokens_per_month,
            usd_per_day=usd_per_day,
            usd_per_month=usd_per_month,
        )
        wanted = NewKey(
            name=name,
            kind="admin" if admin else "user",
            team=team,
            tags=tuple(tag or ()),
            tenant=tenant,
            models=frozenset(model) if model else None,
            limits=limits,
            expires_s=None if expires is None else _seconds(expires, "--expires"),
        )
        with _keys(config) as keys:
            key, text = keys.create(wanted, actor=_actor())
            _print_new(keys, key, text, as_json=as_json)


def _add_list(group: typer.Typer) -> None:
    @group.command("list")
    def list_keys(as_json: _Json = False, config: _Config = None) -> None:
        """Show all keys, oldest first; what is secret of them is not kept anywhere."""
        from stockpot.identity.key_admin import shown

        with _keys(config) as keys:
            found = keys.list()
            states = {key.id: keys.state(key) for key in found}
        if as_json:
            typer.echo(json.dumps([{**shown(key), "state": states[key.id]} for key in found], indent=2))
        elif not found:
            typer.echo("There are no keys. Make one: stockpot keys create --name NAME")
        else:
            _print_table([(key, states[key.id]) for key in found])


def _add_revoke(group: typer.Typer) -> None:
    @group.command()
    def revoke(key_id: _Id, as_json: _Json = False, config: _Config = None) -> None:
        """End a key, for ever. Running servers refuse it within two seconds."""
        from stockpot.identity.key_admin import shown

        with _keys(config) as keys:
            key = keys.revoke(key_id, actor=_actor())
            if as_json:
                typer.echo(json.dumps({**shown(key), "state": keys.state(key)}, indent=2))
            else:
                typer.echo(f"The key {key.id} ({key.name}) is revoked.")


def _add_rotate(group: typer.Typer) -> None:
    @group.command()
    def rotate(
        key_id: _Id,
        grace: Annotated[
            str, typer.Option(help="How long the old one still holds; 0s for one that has leaked.")
        ] = "1h",
        as_json: _Json = False,
        config: _Config = None,
    ) -> None:
        """Give a key a new secret and print it, this once. Its id, limits and what was used of them stay."""
        grace_s = _seconds(grace, "--grace")
        with _keys(config) as keys:
            key, text = keys.rotate(key_id, grace_s=grace_s, actor=_actor())
            _print_new(keys, key, text, as_json=as_json)
        if not as_json:
            typer.echo(f"The old one holds for {grace} more.", err=True)


@contextmanager
def _keys(config: Path | None) -> Generator[KeyAdmin]:
    from stockpot.accounts.accounts import open_audit
    from stockpot.accounts.database import database_url, open_database
    from stockpot.clock import SystemClock
    from stockpot.errors import ConfigurationError
    from stockpot.identity.key_admin import KeyAdmin
    from stockpot.identity.sql_keys import SqlKeyStore
    from stockpot.settings import load_settings

    settings = load_settings(config)
    if not settings.accounts.enabled:
        raise ConfigurationError("accounts.enabled is false: there is no database to keep keys in.")
    clock = SystemClock()
    database = open_database(database_url(settings))
    try:
        yield KeyAdmin(SqlKeyStore(database), open_audit(database, settings, clock=clock), clock)
    finally:
        database.close()


def _actor() -> str:
    from stockpot.cli.cache_pins import login_name

    return f"{login_name()} (command line)"


def _seconds(text: str, option: str) -> float:
    from stockpot.identity.key_admin import duration_s

    try:
        return duration_s(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _print_new(keys: KeyAdmin, key: StoredKey, text: str, *, as_json: bool) -> None:
    """The key on stdout, alone, so that it can be piped; words about it on stderr."""
    from stockpot.identity.key_admin import shown

    if as_json:
        typer.echo(json.dumps({"key": text, **shown(key), "state": keys.state(key)}, indent=2))
        return
    typer.echo(text)
    typer.echo(f"The key {key.id} ({key.name}). It is shown this once: keep it in a safe place.", err=True)


def _print_table(found: list[tuple[StoredKey, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from stockpot.cli.cache_words import moment, visible
    from stockpot.identity.key_admin import shown

    table = Table("id", "name", "kind", "team", "tags", "models", "limits", "created", "state", box=None)
    table.header_style = "bold"
    for column in table.columns:
        column.overflow = "fold"
    table.columns[0].no_wrap = table.columns[8].no_wrap = True
    for key, state in found:
        limits = ", ".join(f"{name} {limit:,}" for name, limit in shown(key)["limits"].items())
        models = "all" if key.models is None else ", ".join(sorted(key.models))
        if state == "active" and key.expires_at is not None:
            state = f"until {moment(key.expires_at)[:10]}"
        words = (key.id, key.name, key.kind, key.team, ", ".join(key.tags), models, limits)
        table.add_row(*(visible(word) for word in words), moment(key.created_at)[:10], state)
    Console(highlight=False, markup=False).print(table)

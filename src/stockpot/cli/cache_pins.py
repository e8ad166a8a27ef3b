"""`stockpot cache pin`, `unpin` and `pins`: prefixes that are kept in RAM for somebody, for a time."""

from __future__ import annotations

import getpass
import json
from typing import Annotated

import typer

from stockpot.cli.admin_client import DEFAULT_URL, AdminClient, AdminKey, AsJson, Url, escaped
from stockpot.cli.cache_prompts import MessagesFile, Text, TextFile, prefix_of


def add(group: typer.Typer) -> None:
    """Add the commands."""
    _add_pin(group)
    _add_unpin(group)
    _add_pins(group)


def login_name() -> str:
    """Who runs the command, for the record; "operator" where the system does not say."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no entry for this user: containers
        return "operator"


def _add_pin(group: typer.Typer) -> None:
    @group.command()
    def pin(
        *,
        text: Text = None,
        file: TextFile = None,
        messages: MessagesFile = None,
        tenant: Annotated[
            str, typer.Option(help="Whose prompts; left out: nobody's, and what is declared shared.")
        ] = "",
        owner: Annotated[str | None, typer.Option(help="For whom. [default: your login name]")] = None,
        keep_for: Annotated[
            str, typer.Option("--for", help="How long, such as 90s, 5m, 2h or 1d; 30d at most.")
        ] = "1h",
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """Keep what is in RAM of a prefix, until it is unpinned or the time has passed.

        Nothing is computed: warm a prefix first that is not there. Pins end with the server.
        """
        from stockpot.cli.cache_words import plural, size, span, visible

        prefix = prefix_of(text, file, messages)
        if not prefix:
            raise typer.BadParameter("give one of --text, --file and --messages", param_hint="--text")
        order = {**prefix, "tenant": tenant, "owner": owner or login_name(), "for": keep_for}
        pinned = AdminClient(url, admin_key).post("pins", order)
        if as_json:
            typer.echo(json.dumps(pinned, indent=2))
            return
        ends = span(pinned["expires_s"] - pinned["now_s"])
        asked = pinned.get("prefix_tokens", pinned["tokens"])
        typer.echo(
            f"{pinned['pin']} keeps {plural(pinned['tokens'], 'token')}, {size(pinned['bytes'])}, for {ends}."
        )
        if pinned["tokens"] < asked:
            typer.echo(f"The prefix has {asked:,}: what follows is not in RAM and is not kept.")
        typer.echo(f"Give it back: stockpot cache unpin {visible(pinned['pin'])}")


def _add_unpin(group: typer.Typer) -> None:
    @group.command()
    def unpin(
        pin: Annotated[str, typer.Argument(help="The pin, as 'pin' and 'pins' name it.")],
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """Give a pin back: its prefix may be evicted again."""
        answer = AdminClient(url, admin_key).delete(f"pins/{escaped(pin)}")
        typer.echo(json.dumps(answer, indent=2) if as_json else f"{pin} is given back.")


def _add_pins(group: typer.Typer) -> None:
    @group.command()
    def pins(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
        """Show all pins, those that end first first."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text as Words

        from stockpot.cli.cache_words import size, span, visible

        answer = AdminClient(url, admin_key).get("pins")
        if as_json:
            typer.echo(json.dumps(answer["pins"], indent=2))
            return
        if not answer["pins"]:
            typer.echo("Nothing is pinned.")
            return
        table = Table("pin", "owner", "tokens", "size", "ends in", box=None, header_style="bold")
        for column in table.columns[2:]:
            column.justify = "right"
        for each in answer["pins"]:
            table.add_row(
                each["pin"],
                Words(visible(each["owner"])),
                f"{each['tokens']:,}",
                size(each["bytes"]),
                span(each["expires_s"] - answer["now_s"]),
            )
        Console(highlight=False, markup=False).print(table)

"""`stockpot recall`: what the kept answers of a running server are worth, and taking some of them out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockpot.cli.admin_client import DEFAULT_URL, AdminClient, AdminKey, AsJson, Url, escaped
from stockpot.cli.cache_words import plural, shortened, size, span, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_QUESTION_CHARACTERS = 60
_REASONS_SHOWN = 12

Number = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="How many, the latest first.")]


def register(app: typer.Typer) -> None:
    """Add the group `recall`."""
    group = typer.Typer(
        help="Answers that are kept: what they gave, how often wrong, and taking them out.",
        no_args_is_help=True,
    )
    _add_report(group)
    _add_entries(group)
    _add_show(group)
    _add_invalidate(group)
    _add_feedback(group)
    app.add_typer(group, name="recall")


def _client(url: str, key: str | None) -> AdminClient:
    return AdminClient(url, key, root="/admin/recall")


def _add_report(group: typer.Typer) -> None:
    @group.command()
    def report(*, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
        """Hits, errors with their bounds, what was saved, and the entries that were wrong most often."""
        figures = _client(url, admin_key).get("")
        if as_json:
            typer.echo(json.dumps(figures, indent=2))
            return
        _print_report(figures)


def _print_report(figures: dict[str, Any]) -> None:
    from rich.table import Table

    console, semantic = _console(), figures["semantic"]
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    rows = _rows(figures)
    if semantic is not None:
        rows += _semantic_rows(semantic, figures["would_be_hits"])
    for row in rows:
        table.add_row(*row)
    console.print(table)
    _print_counts(console, "Not given, because", figures["reasons"])
    _print_counts(console, "Not kept, because", figures["not_kept"])
    if semantic is not None:
        _print_counts(console, "Decided by meaning", semantic["decisions"])
        _print_worst(console, semantic["worst"])


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    hits, saved, store = figures["hits"], figures["saved"], figures["store"]
    feedback = figures["feedback"]
    return [
        ("since", f"{span(figures['now_s'] - figures['since'])} ago"),
        ("looked up", f"{plural(figures['lookups'], 'request')}; not looked up: {figures['bypassed']:,}"),
        (
            "given",
            f"{hits['exact'] + hits['semantic']:,} ({figures['hit_share']:.1%}): {hits['exact']:,} to the"
            f" same request, {hits['semantic']:,} by meaning",
        ),
        (
            "saved",
            f"{saved['prompt_tokens']:,} prompt and {saved['completion_tokens']:,} answer tokens,"
            f" ${saved['usd']:.6f}, {span(saved['seconds'])}",
        ),
        (
            "kept",
            f"{plural(store['entries'], 'answer')}, {size(store['size_bytes'])} of"
            f" {size(store['capacity_bytes'])}; evicted {store['evicted']:,}, expired {store['expired']:,},"
            f" lost {store['lost']:,}" + ("" if store["reachable"] else "; the store is OUT OF REACH"),
        ),
        ("feedback", f"{feedback['wrong']:,} wrong, {feedback['right']:,} right"),
    ]


def _semantic_rows(figures: dict[str, Any], would: int) -> list[tuple[str, str]]:
    rows = [("by meaning", f"{figures['mode']}, {figures['embedder']}, {figures['indexed']:,} indexed")]
    if figures["mode"] == "shadow":
        rows.append(("would have given", f"{would:,}"))
    confidence = f"{figures['confidence']:.0%}"
    rows.append(("accepted", f"{figures['max_error']:.2%} wrong, with {confidence} confidence"))
    if figures["given"]:
        rows.append(
            (
                "estimated",
                f"{figures['estimated_error']:.2%} wrong, at most {figures['estimated_error_upper']:.2%}, of"
                f" {figures['given']:,} given",
            )
        )
    audited = "none yet"
    if figures["audited"]:
        audited = (
            f"{figures['audited_wrong']:,} of {figures['audited']:,} wrong, {figures['audited_error']:.2%}"
            f" ({figures['audited_error_lower']:.2%} to {figures['audited_error_upper']:.2%})"
        )
    rows.append(("audited", audited))
    rows.append(
        (
            "learnt from",
            f"{plural(figures['observations'], 'comparison')}; could not be told to agree, and count as"
            f" different: {figures['undecided']:,}; not compared: {figures['not_compared']:,}",
        )
    )
    return rows


def _print_counts(console: Console, title: str, counts: dict[str, int]) -> None:
    if counts:
        most = sorted(counts.items(), key=lambda each: -each[1])[:_REASONS_SHOWN]
        console.print(f"{title}: {', '.join(f'{reason} {count:,}' for reason, count in most)}")


def _print_worst(console: Console, worst: list[dict[str, Any]]) -> None:
    from rich.text import Text

    if worst:
        table = _table("entry", "wrong", "right", "question", title="Wrong most often")
        for each in worst:
            question = Text(shortened(visible(each["question"]), _QUESTION_CHARACTERS))
            table.add_row(each["id"], f"{each['wrong']:,}", f"{each['right']:,}", question)
        console.print(table)


def _add_entries(group: typer.Typer) -> None:
    @group.command()
    def entries(
        *,
        limit: Number = 20,
        tenant: Annotated[str | None, typer.Option(help="Of this tenant alone. [default: all]")] = None,
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """The answers that are kept."""
        found = _client(url, admin_key).get("/entries", limit=limit, tenant=tenant)["entries"]
        if as_json:
            typer.echo(json.dumps(found, indent=2))
            return
        if not found:
            typer.echo("No answers are kept." if tenant is None else f"No answers of {tenant!r} are kept.")
            return
        from rich.text import Text

        table = _table("entry", "age", "model", "tenant", "tokens", "size", "question")
        for each in found:
            table.add_row(
                each["id"],
                span(each["age_s"]),
                Text(visible(each["model"])),
                Text(visible(each["tenant"])),
                f"{each['prompt_tokens']:,}+{each['completion_tokens']:,}",
                size(each["size_bytes"]),
                Text(shortened(visible(each["question"]), _QUESTION_CHARACTERS)),
            )
        _console().print(table)


def _add_show(group: typer.Typer) -> None:
    @group.command()
    def show(
        *,
        id: Annotated[str, typer.Argument(help="Of the entry (header x-stockpot-recall-entry).")],
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """One entry, with its question and answer."""
        entry = _client(url, admin_key).get(f"/entries/{escaped(id)}")
        if as_json:
            typer.echo(json.dumps(entry, indent=2))
            return
        for name, value in entry.items():
            if name not in ("question", "context", "answer"):
                typer.echo(f"{name}: {visible(', '.join(value) if name == 'tags' else str(value))}")
        for name in ("context", "question", "answer"):
            if entry[name]:
                typer.echo("\n".join(("", f"{name}:", *map(visible, entry[name].split("\n")))))


def _add_invalidate(group: typer.Typer) -> None:
    @group.command()
    def invalidate(
        *,
        id: Annotated[str | None, typer.Option(help="One entry.")] = None,
        tag: Annotated[str | None, typer.Option(help="What was asked with this tag.")] = None,
        model: Annotated[str | None, typer.Option(help="What this model answered.")] = None,
        tenant: Annotated[str | None, typer.Option(help="What this tenant has.")] = None,
        writer: Annotated[str | None, typer.Option(help="What this key caused, and its evidence.")] = None,
        everything: Annotated[bool, typer.Option("--all", help="All of it.")] = False,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before --all.")] = False,
        url: Url = DEFAULT_URL,
        admin_key: AdminKey = None,
        as_json: AsJson = False,
    ) -> None:
        """Take answers out, for all servers that share the store: those that fit all that is given."""
        named = {"id": id, "tag": tag, "model": model, "tenant": tenant, "writer": writer}
        order: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if bool(order) == everything:
            raise typer.BadParameter("give at least one of them, or --all alone", param_hint="--tag ...")
        if everything and not yes:
            typer.confirm(f"Take out all answers {url} and its peers keep?", abort=True, err=True)
        done = _client(url, admin_key).post("/invalidate", order or {"everything": True})
        if as_json:
            typer.echo(json.dumps(done, indent=2))
            return
        typer.echo(f"{plural(done['removed'], 'answer')} taken out.")


def _add_feedback(group: typer.Typer) -> None:
    @group.command()
    def feedback(
        *,
        id: Annotated[str, typer.Argument(help="Of a request (chatcmpl-...), or of an entry.")],
        verdict: Annotated[str, typer.Argument(help="right or wrong.")],
        url: Url = DEFAULT_URL,
        api_key: Annotated[
            str | None,
            typer.Option(
                "--api-key", envvar="STOCKPOT_API_KEY", show_default=False, help="The key it was asked with."
            ),
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Say that an answer was right or wrong; a wrong one is taken out, and counts as evidence."""
        if verdict not in ("right", "wrong"):
            raise typer.BadParameter(f"{verdict!r} is neither right nor wrong", param_hint="VERDICT")
        is_entry = len(id) == 32 and set(id) <= set("0123456789abcdef")
        body = {"entry" if is_entry else "request_id": id, "verdict": verdict}
        done = AdminClient(url, api_key, root="/v1/feedback", key_hint="--api-key").post("", body)
        if as_json:
            typer.echo(json.dumps(done, indent=2))
            return
        words = "taken out" if done["removed"] else "kept"
        learnt = ", and counts as evidence" if done["learnt"] else ""
        typer.echo(f"The answer {done['entry']} is {words}{learnt}.")


def _table(*columns: str, title: str | None = None) -> Table:
    """Its first column are ids, which are whole: they are what commands take."""
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1))
    table.columns[0].no_wrap, table.columns[0].min_width = True, 32
    return table


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)

"""A report on the terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stockpot.doctor.finding import Finding
from stockpot.doctor.outputs import words
from stockpot.doctor.report import CauseTotal, Report

_EXAMPLES = 5
_PATCH_LINES = 16
_WRONG = 5


def print_report(report: Report, console: Console) -> None:
    """Totals, causes, and for the worst of them an example with its patch."""
    console.print(_totals(report))
    if not report.causes:
        console.print(
            "No break was found: what could be cached was." if report.pairs else "Nothing to compare."
        )
    else:
        console.print(_causes(report))
        for total in report.causes[:_EXAMPLES]:
            console.print(_example(total))
    for why, lines in report.skipped:
        console.print(f"Left out: {lines:,} lines, {escape(why)}.", highlight=False)
    for wrong in report.wrong[:_WRONG]:
        console.print(f"  {escape(words.shown(wrong, 160))}", highlight=False, style="dim")


def _totals(report: Report) -> RenderableType:
    told = (
        "as recorded"
        if not report.predicted
        else f"{report.predicted:,} of {report.pairs:,} predicted by rules"
    )
    counted = "by the model's tokenizer" if report.exact else "estimated where none was recorded"
    lines = [
        f"{report.requests:,} requests in {report.conversations:,} conversations;"
        f" {report.prompt_tokens:,} prompt tokens ({counted})",
        f"read from a cache: {words.share(report.hit_ratio)} ({told});"
        f" possible: {words.share(report.possible_ratio)}",
    ]
    return Text("\n".join(lines))


def _causes(report: Report) -> Table:
    factor, per = words.period(report)
    table = Table(title=f"Why prompts were not cached ({per})", title_justify="left")
    table.add_column("cause", no_wrap=True)
    for name in ("breaks", "tokens lost", "money", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    for total in report.causes:
        where = ", ".join(group.path or "elsewhere" for group in total.groups[:2])
        time = None if total.seconds_lost is None else total.seconds_lost * factor
        table.add_row(
            words.sentence(total),
            words.count(total.count * factor),
            words.count(total.tokens_lost * factor),
            words.money(total.usd_lost * factor),
            words.seconds(time),
            escape(words.shown(where, 80)),
        )
    return table


def _example(total: CauseTotal) -> Panel:
    finding = total.groups[0].examples[0]
    body: list[RenderableType] = [_break(finding), Text(finding.advice)]
    if finding.patch:
        body.append(_patch(finding.patch))
    return Panel(Group(*body), title=words.sentence(total), title_align="left")


def _break(finding: Finding) -> Text:
    before, earlier, later = words.excerpt(finding.excerpt)
    place = finding.place
    text = Text(
        f"{finding.pair.later.place}, {place.path}, character {place.character}, token {place.token:,}\n"
    )
    if earlier or later:
        text.append(before, style="dim")
        text.append(earlier or "(nothing)", style="red")
        text.append("\n")
        text.append(before, style="dim")
        text.append(later or "(nothing)", style="green")
        text.append("\n")
    return text


def _patch(patch: str) -> Text:
    text = Text()
    lines = patch.splitlines()
    for line in lines[:_PATCH_LINES]:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        text.append(words.shown(line, 160) + "\n", style=style)
    return text

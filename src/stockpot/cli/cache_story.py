"""Why a request was found in the cache as far as it was, told to a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stockpot.cli.cache_words import moment, plural, size, span, visible

_BAR_CELLS = 64

# Tier -> (how its part of the bar looks, style, words).
_TIERS: Mapping[str, tuple[str, str, str]] = {
    "context": ("█", "green", "shared with a request that was running"),
    "ram": ("▓", "cyan", "brought back from RAM"),
    "disk": ("▒", "blue", "brought back from disk"),
    "redis": ("░", "magenta", "brought back from Redis"),
}
_COMPUTED = ("·", "yellow")

_CAUSES: Mapping[str, str] = {
    "never seen": "never seen here before",
    "not marked": "behind the last boundary, and this server caches only what is marked (cache.automatic)",
    "evicted: capacity": "was here, and was evicted because the tier was full",
    "evicted: quota": "was here, and was evicted because its tenant had its share of RAM",
    "evicted: pressure": "was here, and was evicted because the machine ran short of memory",
    "evicted: replaced": "was here, and was replaced by other tokens that continue the same prefix",
    "invalidated": "was here, and was invalidated",
    "expired": "was here, and was too old",
    "other scope": "is here, of another tenant, and not declared shared",
    "other model": "is here, computed by other weights",
    "slower than recomputing": "is in a tier behind RAM, and loading would have taken longer than computing",
    "tier too slow": "is in a tier that did not answer in time to be worth the wait",
    "tier down": "is perhaps in a tier that is not asked at the moment, after failures",
    "tier timeout": "is perhaps in a tier that did not answer in time",
    "tier error": "is perhaps in a tier that failed",
}
_DECISIONS: Mapping[str, str] = {
    "nothing": "has nothing of it",
    "load": "loaded",
    "recompute": "not loaded: computing is faster",
    "failed": "could not be loaded",
    "abandoned": "given up: took too long",
}


@dataclass(frozen=True, slots=True)
class _Part:
    """Positions [start, end) of the prompt, and what became of them."""

    start: int
    end: int
    mark: str
    style: str
    words: str


def story_of(figures: Mapping[str, Any]) -> RenderableType:
    """The explanation of one request as `CacheAdmin.explain` gives it."""
    parts = list(_parts(figures))
    told: list[RenderableType] = [
        _title(figures),
        Text(),
        _bar(parts, figures["prompt_tokens"]),
        _table(parts),
    ]
    if figures.get("divergence"):
        told += [Text(), *_divergence(figures["divergence"], figures["at_s"])]
    if figures.get("tiers"):
        told += [Text(), Text("The tiers behind RAM were asked:", style="bold"), _decisions(figures["tiers"])]
    return Group(*told)


def cause_words(cause: str) -> str:
    """A gap's cause as the end of a sentence."""
    if cause.startswith("refused: "):
        return f"was in a tier that could not give it: {cause.removeprefix('refused: ')}"
    return _CAUSES.get(cause, cause)


def _title(figures: Mapping[str, Any]) -> Text:
    prompt, found = figures["prompt_tokens"], figures["found_tokens"]
    title = Text()
    title.append(visible(figures["request"]), style="bold")
    if figures["client_request"]:
        title.append(f" (its client calls it {visible(figures['client_request'])})")
    if figures["tenant"]:
        title.append(f", of the tenant {visible(figures['tenant'])}")
    title.append(f", {moment(figures['at_s'])}")
    if "now_s" in figures:
        title.append(f", {span(figures['now_s'] - figures['at_s'])} ago")
    share = f" ({found / prompt:.1%})" if prompt else ""
    title.append(f"\nOf {plural(prompt, 'prompt token')} {found:,} were found{share}, ")
    title.append(f"{prompt - found:,} had to be computed.")
    if figures["waited_s"] > 0:
        title.append(f" It waited {span(figures['waited_s'])} for the tiers behind RAM.")
    if figures.get("preemptions"):
        title.append(f" It was put aside {plural(figures['preemptions'], 'time')} to make room.")
    return title


def _parts(figures: Mapping[str, Any]) -> Iterator[_Part]:
    """All of the prompt, in order."""
    at, prompt = 0, figures["prompt_tokens"]
    for found in figures["found"]:
        mark, style, words = _TIERS.get(found["tier"], ("▒", "blue", f"brought back from {found['tier']}"))
        yield _Part(found["start"], found["end"], mark, style, words)
        at = max(at, found["end"])
    for gap in sorted(figures["gaps"], key=lambda gap: gap["start"]):
        words = f"computed: {cause_words(gap['cause'])}"
        if gap["detail"]:
            words += f" ({visible(gap['detail'])})"
        if gap["at_s"] is not None:
            words += f", {span(figures['at_s'] - gap['at_s'])} before"
        yield _Part(gap["start"], gap["end"], *_COMPUTED, words)
        at = max(at, gap["end"])
    if at < prompt:
        last = at == prompt - 1
        words = "the last token is always computed" if last else "no cause is known, or too many to keep"
        yield _Part(at, prompt, *_COMPUTED, f"computed: {words}" if not last else words)


def _bar(parts: list[_Part], prompt: int) -> Text:
    """The prompt from left to right, each cell in the look of what most of it is."""
    bar = Text("  ")
    for cell in range(_BAR_CELLS):
        position = (cell + 0.5) * prompt / _BAR_CELLS
        part = next((each for each in parts if each.start <= position < each.end), None)
        mark, style = (part.mark, part.style) if part is not None else _COMPUTED
        bar.append(mark, style=style)
    return bar


def _table(parts: list[_Part]) -> Table:
    table = Table(
        "", "positions", "tokens", "what became of them", box=None, header_style="dim", padding=(0, 1)
    )
    table.columns[1].justify = table.columns[2].justify = "right"
    for part in parts:
        table.add_row(
            Text(part.mark, style=part.style),
            f"{part.start:,} to {part.end - 1:,}" if part.end - part.start > 1 else f"{part.start:,}",
            f"{part.end - part.start:,}",
            Text(part.words),
        )
    return table


def _divergence(figures: Mapping[str, Any], at_s: float) -> Iterator[RenderableType]:
    request = visible(figures["request"]) or "an earlier request"
    yield Text.assemble(
        ("The first token that differs", "bold"),
        f" stands at position {figures['position']:,}. Up to there the prompt is that of {request},"
        f" last used {span(at_s - figures['used_s'])} before:",
    )
    table = Table.grid(padding=(0, 2))
    for name, side, style in (("here", "ours", "bold green"), ("there", "theirs", "bold red")):
        token = figures["our_token" if side == "ours" else "their_token"]
        text = Text(f"…{visible(figures['before'])}", style="dim")
        text.append(f"[{visible(figures[side])}]", style=style)
        text.append(f"{visible(figures[f'{side}_after'])}…")
        table.add_row(Text(f"  {name}", style="dim"), text, Text(f"token {token}", style="dim"))
    yield table


def _decisions(tiers: list[Mapping[str, Any]]) -> Table:
    table = Table(
        "tier",
        "has",
        "loading, estimated",
        "computing, estimated",
        "decision",
        "took",
        box=None,
        header_style="dim",
        padding=(0, 1),
    )
    for each in tiers:
        located = each["located_tokens"]
        decision = _DECISIONS.get(each["decision"], each["decision"])
        if each["decision"] == "load" and each["loaded_tokens"] != located:
            decision += f", {plural(each['loaded_tokens'], 'token')} of it"
        why = ": ".join(visible(part) for part in (each["cause"], each["detail"]) if part)
        table.add_row(
            f"  {visible(each['tier'])}",
            f"{plural(located, 'token')}, {size(each['located_bytes'])}" if located else "nothing",
            span(each["load_s"]) if located else "-",
            span(each["compute_s"]) if located else "-",
            Text(f"{decision} ({why})" if why else decision),
            f"{span(each['locate_s'])} to look"
            + (f", {span(each['took_s'])} to read" if each["took_s"] else ""),
        )
    return table

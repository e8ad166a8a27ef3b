"""A report as one HTML page: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

from html import escape

from stockpot.doctor.finding import Finding
from stockpot.doctor.outputs import words
from stockpot.doctor.report import CauseTotal, Report

_STYLE = """
:root{--bg:#fff;--fg:#1a1c1f;--dim:#667;--line:#dde;--bar:#c2410c;--hit:#15803d;--lost:#e5e7eb;--card:#f8f9fb;
--red:#b91c1c;--green:#15803d}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e6e8eb;--dim:#9aa3af;--line:#2b3038;--bar:#fb923c;
--hit:#4ade80;--lost:#2b3038;--card:#1b1f25;--red:#f87171;--green:#4ade80}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1000px;margin:0 auto;padding:2rem 1.2rem}h1{font-size:1.5rem;margin:0 0 .2rem}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem}.dim{color:var(--dim)}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}.tile{flex:1 1 150px;background:var(--card);
border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}.tile b{display:block;font-size:1.35rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.45rem .6rem;
border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.scroll{overflow-x:auto}svg{display:block;max-width:100%}svg text{fill:var(--fg);font-size:13px}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:.7rem 0;padding:.6rem
1rem} summary{cursor:pointer;font-weight:600}pre{overflow-x:auto;background:var(--bg);border:1px solid
var(--line); border-radius:8px;padding:.7rem;font:12.5px/1.5 ui-monospace,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
.old{color:var(--red)}.new{color:var(--green)}
"""
_ROW, _LABEL, _WIDTH = 26, 150, 940
_PATCH_LINES = 60


def report_page(report: Report, title: str = "Prompt cache report") -> str:
    """The page. All that comes from prompts is escaped."""
    factor, per = words.period(report)
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            # Whatever a prompt holds: nothing of it can run or load.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
            " style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>{_summary(report)}{_tiles(report, factor, per)}{_hit_bar(report)}",
            _causes(report, factor, per),
            "".join(_details(total) for total in report.causes),
            _left_out(report),
            "</main></body></html>\n",
        )
    )


def _summary(report: Report) -> str:
    counted = "by the model's tokenizer" if report.exact else "estimated where none was recorded"
    predicted = (
        ""
        if not report.predicted
        else f"; {report.predicted:,} of {report.pairs:,} predicted by provider rules"
    )
    return (
        f'<p class="dim">{report.requests:,} requests, {report.conversations:,} conversations. Tokens:'
        f" {counted}. Cached: as recorded{predicted}.</p>"
    )


def _tiles(report: Report, factor: float, per: str) -> str:
    seconds = [each.seconds_lost for each in report.causes if each.seconds_lost is not None]
    tiles = [
        (words.share(report.hit_ratio), "read from a cache"),
        (words.share(report.possible_ratio), "possible"),
        (words.count(report.tokens_lost * factor), f"tokens lost {per}"),
        (words.money(report.usd_lost * factor), f"lost {per}"),
    ]
    if seconds:
        tiles.append((words.seconds(sum(seconds) * factor), f"of prefill lost {per}"))
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span class="dim">{escape(name)}</span></div>'
            for value, name in tiles
        )
        + "</div>"
    )


def _hit_bar(report: Report) -> str:
    width = _WIDTH
    hit, possible = width * report.hit_ratio, width * max(report.hit_ratio, report.possible_ratio)
    label = (
        f"read from a cache: {words.share(report.hit_ratio)}, possible: {words.share(report.possible_ratio)}"
    )
    return (
        f'<svg viewBox="0 0 {width} 40" role="img" aria-label="{label}">'
        f'<rect width="{width}" height="16" rx="8" fill="var(--lost)"/>'
        f'<rect width="{possible:.1f}" height="16" rx="8" fill="var(--bar)" opacity=".55"/>'
        f'<rect width="{hit:.1f}" height="16" rx="8" fill="var(--hit)"/>'
        f'<text x="0" y="34">green: read from a cache; orange: could have been</text></svg>'
    )


def _causes(report: Report, factor: float, per: str) -> str:
    if not report.causes:
        return "<p>No break was found: what could be cached was.</p>"
    most = max(total.tokens_lost for total in report.causes) or 1
    bars = "".join(
        f'<text x="0" y="{_ROW * row + 15}">{escape(words.sentence(total))}</text>'
        f'<rect x="{_LABEL}" y="{_ROW * row + 3}" height="15" rx="3" fill="var(--bar)"'
        f' width="{max(2.0, (_WIDTH - _LABEL - 110) * total.tokens_lost / most):.1f}"/>'
        f'<text x="{_LABEL + 8 + (_WIDTH - _LABEL - 110) * total.tokens_lost / most:.1f}"'
        f' y="{_ROW * row + 15}">{words.count(total.tokens_lost * factor)}</text>'
        for row, total in enumerate(report.causes)
    )
    rows = "".join(_row(total, factor) for total in report.causes)
    heads = "".join(f'<th class="n">{name}</th>' for name in ("breaks", "tokens lost", "money", "time"))
    return (
        f"<h2>Why prompts were not cached ({escape(per)})</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_ROW * len(report.causes) + 4}" role="img"'
        f' aria-label="tokens lost by cause">{bars}</svg>'
        f'<div class="scroll"><table><thead><tr><th>cause</th>{heads}<th>where</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(total: CauseTotal, factor: float) -> str:
    where = words.shown(", ".join(group.path or "elsewhere" for group in total.groups[:3]), 120)
    cells = "".join(f'<td class="n">{escape(cell)}</td>' for cell in _cells(total, factor))
    return f"<tr><td>{escape(words.sentence(total))}</td>{cells}<td>{escape(where)}</td></tr>"


def _cells(total: CauseTotal, factor: float) -> tuple[str, ...]:
    time = None if total.seconds_lost is None else total.seconds_lost * factor
    return (
        words.count(total.count * factor),
        words.count(total.tokens_lost * factor),
        words.money(total.usd_lost * factor),
        words.seconds(time),
    )


def _details(total: CauseTotal) -> str:
    examples = "".join(_example(each) for group in total.groups[:5] for each in group.examples[:2])
    return (
        f"<details><summary>{escape(words.sentence(total))}: {total.count:,} breaks,"
        f" {total.tokens_lost:,} tokens</summary><p>{escape(total.advice)}</p>{examples}</details>"
    )


def _example(finding: Finding) -> str:
    before, earlier, later = (escape(each) for each in words.excerpt(finding.excerpt))
    place = finding.place
    where = (
        f"{finding.pair.later.place}, {place.path}, character {place.character:,}, token {place.token:,};"
        f" {finding.tokens_lost:,} tokens lost"
    )
    shown = f'<p class="dim">{escape(words.shown(where, 300))}</p>'
    if earlier or later:
        shown += (
            f'<pre>{before}<span class="old">{earlier or "(nothing)"}</span>\n'
            f'{before}<span class="new">{later or "(nothing)"}</span></pre>'
        )
    if finding.patch:
        lines = (_patch_line(line) for line in finding.patch.splitlines()[:_PATCH_LINES])
        shown += "<pre>" + "\n".join(lines) + "</pre>"
    return shown


def _patch_line(line: str) -> str:
    text = escape(words.shown(line, 300))
    kind = {"+": "new", "-": "old"}.get(line[:1])
    return text if kind is None else f'<span class="{kind}">{text}</span>'


def _left_out(report: Report) -> str:
    if not report.skipped:
        return ""
    items = "".join(f"<li>{lines:,} lines: {escape(why)}</li>" for why, lines in report.skipped)
    return f"<h2>Left out</h2><ul>{items}</ul>"

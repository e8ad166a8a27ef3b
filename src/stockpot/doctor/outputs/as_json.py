"""A report as JSON."""

from __future__ import annotations

from typing import Any

from stockpot.doctor.finding import Finding
from stockpot.doctor.report import CauseTotal, Report


def report_json(report: Report) -> dict[str, Any]:
    """All figures as they are, not multiplied; `per_day` is what makes them those of a day."""
    return {
        "requests": report.requests,
        "conversations": report.conversations,
        "pairs": report.pairs,
        "predicted": report.predicted,
        "prompt_tokens": report.prompt_tokens,
        "cacheable_tokens": report.cacheable_tokens,
        "cached_tokens": report.cached_tokens,
        "hit_ratio": report.hit_ratio,
        "possible_ratio": report.possible_ratio,
        "tokens_lost": report.tokens_lost,
        "usd_lost": report.usd_lost,
        "span_s": report.span_s,
        "per_day": report.per_day,
        "exact": report.exact,
        "causes": [_cause(total) for total in report.causes],
        "skipped": dict(report.skipped),
        "wrong": list(report.wrong),
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    """One break."""
    later = finding.pair.later
    return {
        "cause": finding.cause,
        "file": later.file,
        "line": later.line,
        "request": later.request,
        "earlier": {"file": finding.pair.earlier.file, "line": finding.pair.earlier.line},
        "relation": finding.pair.relation,
        "conversation": finding.pair.conversation,
        "turn": finding.pair.turn,
        "path": finding.place.path,
        "character": finding.place.character,
        "token": finding.place.token,
        "tokens_lost": finding.tokens_lost,
        "before": finding.excerpt.before,
        "earlier_text": finding.excerpt.earlier,
        "later_text": finding.excerpt.later,
        "patch": finding.patch,
    }


def _cause(total: CauseTotal) -> dict[str, Any]:
    return {
        "cause": total.cause,
        "count": total.count,
        "tokens_lost": total.tokens_lost,
        "usd_lost": total.usd_lost,
        "seconds_lost": total.seconds_lost,
        "advice": total.advice,
        "groups": [
            {
                "path": group.path,
                "count": group.count,
                "tokens_lost": group.tokens_lost,
                "usd_lost": group.usd_lost,
                "examples": [finding_json(each) for each in group.examples],
            }
            for group in total.groups
        ],
    }

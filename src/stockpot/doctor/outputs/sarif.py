"""A report as SARIF 2.1.0 (OASIS), which code hosts and editors show beside the lines it is about."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, get_args

from stockpot import __version__
from stockpot.doctor.advice import ADVICE
from stockpot.doctor.finding import Cause
from stockpot.doctor.report import Report

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def report_sarif(report: Report) -> dict[str, Any]:
    """A rule for each cause, a result for each break (of the first thousand), at the line of its request."""
    causes: tuple[Cause, ...] = get_args(Cause)
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "stockpot doctor",
                        "version": __version__,
                        "rules": [
                            {
                                "id": cause,
                                "shortDescription": {"text": cause.replace("_", " ")},
                                "help": {"text": ADVICE[cause]},
                                "defaultConfiguration": {"level": "warning"},
                            }
                            for cause in causes
                        ],
                    }
                },
                "results": [
                    {
                        "ruleId": cause,
                        "ruleIndex": causes.index(cause),
                        "level": "warning",
                        "message": {
                            "text": f"{cause.replace('_', ' ')} at {path or 'the request'}: {tokens:,} prompt"
                            f" tokens could not be read from a cache. {ADVICE[cause]}"
                        },
                        "locations": [
                            {
                                "physicalLocation": {
                                    "artifactLocation": {"uri": PurePath(file).as_posix()},
                                    "region": {"startLine": line},
                                },
                                "logicalLocations": [{"fullyQualifiedName": path}],
                            }
                        ],
                    }
                    for cause, file, line, path, tokens in report.places
                ],
            }
        ],
    }

"""What a request's headers allow of answers that are kept: never more than the operator does.

`Cache-Control` as RFC 9111 (5.2.1) defines it for requests: `no-cache` has the answer made anew, and kept;
`no-store` has it not kept (one that is there may still be given); `only-if-cached` forbids making one;
`max-age=N` refuses older ones. What it does not name is ignored, as the RFC demands. Our own headers:
`x-stockpot-recall: exact` (none by meaning), `x-stockpot-max-error: 0.005` (stricter than the operator),
`x-stockpot-recall-tags: a,b` (labels for invalidation).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from stockpot.errors import RequestError
from stockpot.requests import AS_ALLOWED, RecallControl

CACHE_CONTROL = "cache-control"
_KIND, _MAX_ERROR, _TAGS = "x-stockpot-recall", "x-stockpot-max-error", "x-stockpot-recall-tags"
_TAGS_MAX = 16
_TAG_LENGTH_MAX = 128
_LONGEST_AGE_S = 2.0**31
"""What a larger number of seconds counts as (RFC 9111, 1.2.2)."""
_SHARE = re.compile(r"0(\.[0-9]{1,9})?|1(\.0{1,9})?")


def recall_control(headers: Mapping[str, str]) -> RecallControl:
    """Raises RequestError for a value that does not say what it is for."""
    if not headers or headers.keys().isdisjoint((CACHE_CONTROL, _KIND, _MAX_ERROR, _TAGS)):
        return AS_ALLOWED
    directives = _directives(headers.get(CACHE_CONTROL, ""))
    return RecallControl(
        read="no-cache" not in directives,
        store="no-store" not in directives,
        only="only-if-cached" in directives,
        semantic=_semantic(headers.get(_KIND)),
        max_age_s=_max_age_s(directives),
        max_error=_max_error(headers.get(_MAX_ERROR)),
        tags=_labels(headers.get(_TAGS)),
    )


def _directives(value: str) -> dict[str, str]:
    """Names in lower case, with what stands behind `=` (without its quotes)."""
    found: dict[str, str] = {}
    for directive in value.split(","):
        name, _, argument = directive.partition("=")
        if name := name.strip().lower():
            found.setdefault(name, argument.strip().strip('"'))
    return found


def _max_age_s(directives: Mapping[str, str]) -> float | None:
    value = directives.get("max-age")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise _invalid(CACHE_CONTROL, f"max-age={value}", "max-age=N, a whole number of seconds")
    return min(float(value), _LONGEST_AGE_S)


def _semantic(value: str | None) -> bool:
    if value is None:
        return True
    if value.strip().lower() in ("exact", "semantic"):
        return value.strip().lower() == "semantic"
    raise _invalid(_KIND, value, "exact (the same request alone) or semantic")


def _max_error(value: str | None) -> float | None:
    if value is None:
        return None
    if not _SHARE.fullmatch(value.strip()):
        raise _invalid(_MAX_ERROR, value, "a share from 0 to 1, as 0.005")
    return float(value)


def _labels(value: str | None) -> frozenset[str]:
    if value is None:
        return frozenset()
    labels = frozenset(label for label in map(str.strip, value.split(",")) if label)
    sound = all(len(label) <= _TAG_LENGTH_MAX and label.isascii() and label.isprintable() for label in labels)
    if len(labels) > _TAGS_MAX or not sound:
        raise _invalid(
            _TAGS,
            value,
            f"at most {_TAGS_MAX} tags of at most {_TAG_LENGTH_MAX} characters, separated by commas",
        )
    return labels


def _invalid(header: str, value: str, wanted: str) -> RequestError:
    return RequestError(
        f"The header '{header}' is {value[:80]!r}; send {wanted}.", param=header, code="invalid_header"
    )

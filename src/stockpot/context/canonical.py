"""One form of JSON for one value (RFC 8785, JSON Canonicalization Scheme): equal values, equal bytes."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, cast

from stockpot.errors import StockpotError

_DECIMAL_BELOW = 1e21
_DECIMAL_FROM = 1e-6
"""Between these numbers are written without an exponent (ECMAScript, Number::toString)."""


class NotCanonical(StockpotError):
    """A value that has no form in JSON: NaN, an object that is none of JSON's, a key that is no text."""


def canonical_json(value: object, *, nfc: bool = False) -> str:
    """Keys in order, no white space, numbers in their shortest form (1.0 is 1), text as it is or in normal
    form C (`nfc`). Raises NotCanonical."""
    return "".join(_written(value, nfc, "$"))


def canonical_text(text: str, *, nfc: bool = False) -> str:
    """Line ends are \\n; in normal form C if asked for. Nothing else is touched: white space has meaning."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", text) if nfc else text


def in_order(value: Any, *, nfc: bool = False) -> Any:
    """The same value with all keys in order: however it is written out, it is written the same."""
    return json.loads(canonical_json(value, nfc=nfc))


def _written(value: object, nfc: bool, path: str) -> list[str]:
    match value:
        case None | True | False:
            return [json.dumps(value)]
        case str():
            return [_text(value, nfc)]
        case int():
            return [str(value)]
        case float():
            return [_number(value, path)]
        case Mapping():
            return _object(cast("Mapping[object, object]", value), nfc, path)
        case Sequence() if not isinstance(value, bytes | bytearray | memoryview):
            pieces = ["["]
            for place, each in enumerate(cast("Sequence[object]", value)):
                pieces += ["," if place else "", *_written(each, nfc, f"{path}[{place}]")]
            return [*pieces, "]"]
        case _:
            raise NotCanonical(
                f"{path} is a {type(value).__name__}, which JSON has not; give a text, a number, true, false,"
                " null, a list or an object."
            )


def _object(value: Mapping[object, object], nfc: bool, path: str) -> list[str]:
    keys: dict[str, object] = {}
    for key, each in value.items():
        if not isinstance(key, str):
            raise NotCanonical(f"{path} has the key {key!r:.60}, which is no text; give a text.")
        name = canonical_text(key, nfc=nfc) if nfc else key
        if name in keys:
            raise NotCanonical(f"{path} has the key {name!r:.60} twice, in two normal forms; keep one.")
        keys[name] = each
    pieces = ["{"]
    # By UTF-16 code units, as the scheme has it.
    for place, key in enumerate(sorted(keys, key=lambda one: one.encode("utf-16-be", "surrogatepass"))):
        pieces += [
            "," if place else "",
            _text(key, nfc=False),
            ":",
            *_written(keys[key], nfc, f"{path}.{key}"),
        ]
    return [*pieces, "}"]


def _text(text: str, nfc: bool) -> str:
    return json.dumps(unicodedata.normalize("NFC", text) if nfc else text, ensure_ascii=False)


def _number(value: float, path: str) -> str:
    if not math.isfinite(value):
        raise NotCanonical(f"{path} is {value}, which JSON has not; give a number or null.")
    if value == 0:
        return "0"
    if not _DECIMAL_FROM <= abs(value) < _DECIMAL_BELOW:
        mantissa, _, exponent = repr(value).partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent):+d}"
    written = format(Decimal(repr(value)), "f")
    return written.rstrip("0").rstrip(".") if "." in written else written

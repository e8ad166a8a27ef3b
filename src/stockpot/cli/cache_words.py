"""Sizes, times and texts of a cache as people read them."""

from __future__ import annotations

from datetime import datetime


def size(size_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:,.0f} {unit}" if unit == "B" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.2f} GiB"


def span(seconds: float) -> str:
    """A time, with as much precision as matters."""
    seconds = max(0.0, seconds)
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 1.95 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def moment(unix_s: float) -> str:
    """A time of day here, and the day."""
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def visible(text: str) -> str:
    """A text of somebody's prompt, safe for a terminal: line ends as ⏎, control characters spelled out."""
    return "".join("⏎" if each == "\n" else each if each.isprintable() else repr(each)[1:-1] for each in text)


def shortened(text: str, characters: int, *, end: bool = False) -> str:
    """The beginning of a text, or with `end` its end."""
    if len(text) <= characters:
        return text
    return "…" + text[1 - characters :] if end else text[: characters - 1] + "…"


def plural(count: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"

"""Days and months of UTC as numbers, and when the next one begins."""

from __future__ import annotations

from datetime import UTC, datetime

DAY_S = 86_400


def day_of(unix_s: float) -> int:
    """Days since 1970-01-01."""
    return int(unix_s // DAY_S)


def month_of(unix_s: float) -> int:
    """Months since January of the year 0."""
    at = datetime.fromtimestamp(unix_s, UTC)
    return at.year * 12 + at.month - 1


def day_left_s(unix_s: float) -> float:
    """Seconds until the next day begins."""
    return (day_of(unix_s) + 1) * DAY_S - unix_s


def month_left_s(unix_s: float) -> float:
    """Seconds until the next month begins."""
    year, month = divmod(month_of(unix_s) + 1, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp() - unix_s

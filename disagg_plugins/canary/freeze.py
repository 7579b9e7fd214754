"""Times at which nothing is promoted: windows of a week, and spans of days (pure).

Both are read off the clock on the wall of a named zone, so a window moves with daylight saving
time: an hour that comes twice is frozen twice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from disagg_plugins.errors import ConfigError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60


def zone_named(name: str) -> tzinfo:
    """Return a time zone.

    Raises:
        ConfigError: It is unknown, or this machine has no data of time zones.
    """
    if name == "UTC":  # known without data
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        fix = "write one as Europe/Berlin; if it is right, install the package tzdata"
        raise ConfigError(f"{name!r} is no time zone known here", key="zone", fix=fix) from None


@dataclass(frozen=True, slots=True)
class WeeklyFreeze:
    """A window that comes back each week.

    Args:
        days: On which it begins; 0 is Monday.
        begin_min: Minutes after midnight.
        end_min: Minutes after midnight, not included; up to ``begin_min`` it is on the next day.
        zone: Whose clock is read.
    """

    days: Collection[int]
    begin_min: int
    end_min: int
    zone: tzinfo

    def covers(self, wall_s: float) -> bool:
        """Return whether a time lies in it.

        Args:
            wall_s: Seconds since 1970.
        """
        local = datetime.fromtimestamp(wall_s, self.zone)
        minute = local.hour * 60 + local.minute
        today, yesterday = local.weekday() in self.days, (local.weekday() - 1) % 7 in self.days
        if self.begin_min < self.end_min:
            return today and self.begin_min <= minute < self.end_min
        return (today and minute >= self.begin_min) or (yesterday and minute < self.end_min)

    def words(self) -> str:
        """Return it as ``fri, sat from 18:00 to 08:00 (Europe/Berlin)``."""
        days = ", ".join(DAYS[day] for day in sorted(self.days))
        return f"{days} from {_clock(self.begin_min)} to {_clock(self.end_min)} ({self.zone})"


@dataclass(frozen=True, slots=True)
class DateFreeze:
    """Whole days, both included."""

    first: date
    last: date
    zone: tzinfo

    def covers(self, wall_s: float) -> bool:
        """Return whether a time, in seconds since 1970, lies in it."""
        return self.first <= datetime.fromtimestamp(wall_s, self.zone).date() <= self.last

    def words(self) -> str:
        """Return it as ``2026-12-20 to 2027-01-02 (UTC)``."""
        return f"{self.first} to {self.last} ({self.zone})"


Freeze = WeeklyFreeze | DateFreeze


def minutes(text: str) -> int:
    """Return a time of day in minutes after midnight; ``24:00`` is the end of the day.

    Raises:
        ValueError: It is none.
    """
    hours, colon, rest = text.partition(":")
    plain = all(part.isascii() and part.isdigit() and len(part) == 2 for part in (hours, rest))
    found = int(hours) * 60 + int(rest) if colon and plain and int(rest) < 60 else DAY_MINUTES + 1
    if found > DAY_MINUTES:
        raise ValueError(f"{text!r} is no time of day: write it as 18:00")
    return found


def _clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"

"""When nothing is promoted: by the week, by the date, by the clock of a named zone."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from disagg_plugins.canary.freeze import DateFreeze, WeeklyFreeze, minutes, zone_named
from disagg_plugins.errors import ConfigError

BERLIN = zone_named("Europe/Berlin")


def at(text: str, zone=UTC) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


@pytest.mark.parametrize(
    ("time", "frozen"),
    [
        ("2026-11-27T17:59", False),  # a Friday
        ("2026-11-27T18:00", True),
        ("2026-11-28T07:59", True),
        ("2026-11-28T08:00", False),
        ("2026-11-28T19:00", False),  # Saturday is not named
        ("2026-11-26T19:00", False),
    ],
)
def test_a_window_over_midnight_belongs_to_the_day_it_begins_on(time, frozen):
    window = WeeklyFreeze({4}, minutes("18:00"), minutes("08:00"), UTC)
    assert window.covers(at(time)) is frozen


@pytest.mark.parametrize(
    ("time", "frozen"),
    [("2026-11-27T08:59", False), ("2026-11-27T09:00", True), ("2026-11-27T10:00", False)],
)
def test_a_window_within_a_day_ends_before_its_end(time, frozen):
    window = WeeklyFreeze({4}, minutes("09:00"), minutes("10:00"), UTC)
    assert window.covers(at(time)) is frozen


def test_a_whole_day_and_a_window_that_ends_where_it_begins_last_24_hours():
    day = WeeklyFreeze({6}, 0, minutes("24:00"), UTC)
    assert [day.covers(at(f"2026-11-{n}T23:59")) for n in (28, 29, 30)] == [False, True, False]
    around = WeeklyFreeze({6}, minutes("12:00"), minutes("12:00"), UTC)
    hours = ("29T11:59", "29T12:00", "30T11:59", "30T12:00")
    assert [around.covers(at(f"2026-11-{h}")) for h in hours] == [False, True, True, False]


def test_a_window_follows_the_clock_of_its_zone_through_the_year():
    window = WeeklyFreeze(range(7), minutes("18:00"), minutes("19:00"), BERLIN)
    assert window.covers(at("2026-07-01T16:30"))
    assert not window.covers(at("2026-12-01T16:30"))
    assert window.covers(at("2026-12-01T17:30"))


def test_an_hour_that_comes_twice_is_frozen_twice():
    window = WeeklyFreeze({6}, minutes("02:00"), minutes("03:00"), BERLIN)
    assert window.covers(at("2026-10-25T00:30"))
    assert window.covers(at("2026-10-25T01:30"))
    assert not window.covers(at("2026-10-25T02:30"))


def test_dates_include_both_ends_in_their_zone():
    span = DateFreeze(date(2026, 12, 20), date(2027, 1, 2), BERLIN)
    assert not span.covers(at("2026-12-19T23:59", BERLIN))
    assert span.covers(at("2026-12-20T00:00", BERLIN))
    assert span.covers(at("2027-01-02T23:59", BERLIN))
    assert not span.covers(at("2027-01-03T00:00", BERLIN))


def test_freezes_are_told_in_words():
    assert "mon, fri from 18:00 to 08:00 (Europe/Berlin)" == (
        WeeklyFreeze({4, 0}, 1080, 480, BERLIN).words()
    )
    assert DateFreeze(date(2026, 12, 20), date(2027, 1, 2), UTC).words() == (
        "2026-12-20 to 2027-01-02 (UTC)"
    )


@pytest.mark.parametrize("text", ["", "9:00", "24:01", "12:60", "12", "ab:cd", "-1:00", "12:00:00"])
def test_no_time_of_day(text):
    with pytest.raises(ValueError, match="write it as 18:00"):
        minutes(text)


@pytest.mark.parametrize("name", ["Berlin", "", "../../etc/passwd", "/etc/localtime", "Europe"])
def test_an_unknown_zone_is_an_error_that_says_how_to_write_one(name):
    with pytest.raises(ConfigError, match="Europe/Berlin"):
        zone_named(name)

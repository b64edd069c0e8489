"""Checks of the data on planted weeks: 100 events of 20 users on every open day, nothing on Saturdays."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import pytest

from pipeline.contracts.config import Gate
from pipeline.gate import data
from pipeline.gate.data import DAY, Day, Input

GATE = Gate()
NIGHT = datetime.date(2011, 3, 4)  # a Friday
LAST = data.day_number(NIGHT)
BEFORE = LAST - 1


def is_saturday(day: int) -> bool:
    return data.date_of(day).weekday() == 5


def weeks(last: int, num_days: int = 70, **of_last: Any) -> dict[int, Day]:
    """Days up to last, which is as of_last says."""
    days = {day: Day(100, 20, 1, day) for day in range(last - num_days + 1, last + 1) if not is_saturday(day)}
    return days | ({last: replace(days[last], **of_last)} if of_last else {})


def made(days: dict[int, Day], **changes: Any) -> Input:
    rows = sum(day.events for day in days.values())
    base = Input(rows, rows, 0, min(days) * DAY, max(days) * DAY + DAY // 2, 50, days)
    return replace(base, **changes)


LIVE = made(weeks(BEFORE))


def judged(
    tonight: Input, live: Input | None = LIVE, night: datetime.date = NIGHT, before: int = BEFORE, **settings: Any
) -> dict[str, str]:
    gate = Gate(**settings)
    measured = data.measure_data(tonight, live, night, data.date_of(before), gate)
    return {check.name: check.verdict for check in data.check_data(tonight, live, measured, [], gate)}


def test_an_ordinary_night_passes_every_check() -> None:
    found = judged(made(weeks(LAST)))
    assert set(found) == {
        "volume", "events per user", "freshness", "future", "lost history", "repeated events", "copied days",
        "catalogue", "quarantined",
    }  # fmt: skip
    assert set(found.values()) == {"pass"}


@pytest.mark.parametrize(
    ("events", "users", "expected"),
    [(71, 20, "pass"), (69, 14, "warn"), (51, 11, "warn"), (50, 10, "block"), (10, 2, "block")],
)
def test_half_of_a_nights_data_blocks(events: int, users: int, expected: str) -> None:
    assert judged(made(weeks(LAST, events=events, users=users)))["volume"] == expected


def test_lost_rows_show_in_events_per_user_where_the_volume_hides_them() -> None:
    busy = judged(made(weeks(LAST, events=130, users=41)))
    assert (busy["volume"], busy["events per user"]) == ("pass", "block")
    assert judged(made(weeks(LAST, events=65, users=20)))["events per user"] == "pass"


def test_a_closed_day_is_usual_where_that_weekday_always_was() -> None:
    saturday = LAST + 1
    tonight = made(weeks(LAST))
    found = judged(tonight, tonight, data.date_of(saturday), LAST)
    assert (found["volume"], found["freshness"]) == ("skip", "pass")


def test_a_silent_day_warns_and_a_silent_week_blocks_by_age() -> None:
    for silent, expected in ((1, "pass"), (5, "block")):
        night = data.date_of(BEFORE + silent)
        found = judged(LIVE, LIVE, night)
        assert (found["volume"], found["freshness"]) == ("warn", expected)
    quiet = judged(LIVE, LIVE, data.date_of(BEFORE + 5), quiet_days=["03-04..03-09"])
    assert (quiet["volume"], quiet["freshness"]) == ("skip", "pass")


def test_a_week_is_compared_with_weeks_and_not_with_what_is_in_it() -> None:
    live = made(weeks(LAST - 7))
    days = weeks(LAST)
    halved = {day: replace(d, events=50, users=10) if day > LAST - 7 else d for day, d in days.items()}
    assert judged(made(days), live, before=LAST - 7)["volume"] == "pass"
    assert judged(made(halved), live, before=LAST - 7)["volume"] == "block"


def test_with_too_little_history_nothing_is_usual() -> None:
    assert judged(made(weeks(LAST, 21, events=1)), made(weeks(BEFORE, 20)))["volume"] == "skip"
    assert judged(made(weeks(LAST, 22, events=1)), made(weeks(BEFORE, 21)))["volume"] == "block"


@pytest.mark.parametrize(("hours", "expected"), [(14, "pass"), (14.01, "block"), (9000, "block")])
def test_timestamps_after_the_farthest_time_zone_are_of_the_future(hours: float, expected: str) -> None:
    newest = (LAST + 1) * DAY + int(hours * 3600)
    assert judged(made(weeks(LAST), newest=newest))["future"] == expected


@pytest.mark.parametrize(("days", "expected"), [(5, "pass"), (5.01, "block"), (9e9, "block")])
def test_old_data_blocks(days: float, expected: str) -> None:
    assert judged(made(weeks(LAST), newest=int((LAST + 1 - days) * DAY)))["freshness"] == expected


def test_quiet_days_may_pass_the_turn_of_the_year_or_be_of_one_year() -> None:
    quiet = data.is_quiet(Gate(quiet_days=("12-24..01-02", "2011-04-29", "05-01")))
    wanted = {"2010-12-24", "2010-12-31", "2011-01-02", "2011-04-29", "2012-05-01"}
    others = {"2010-12-23", "2011-01-03", "2012-04-29", "2011-05-02"}
    asked = {day: quiet(data.day_number(datetime.date.fromisoformat(day))) for day in wanted | others}
    assert {day for day, is_quiet in asked.items() if is_quiet} == wanted


def test_events_that_were_there_before_must_not_vanish_but_a_window_may_slide() -> None:
    days = weeks(LAST)
    slid = {day: counts for day, counts in days.items() if day > min(days)}
    assert judged(made(slid))["lost history"] == "pass"
    half = {day: replace(counts, events=counts.events // 2) for day, counts in days.items()}
    assert judged(made(half))["lost history"] == "block"
    one_gone = {day: counts for day, counts in days.items() if day not in (BEFORE, BEFORE - 1, BEFORE - 2, BEFORE - 3)}
    assert judged(made(one_gone))["lost history"] == "block"
    truncated = {day: counts for day, counts in days.items() if day > LAST - 30}
    assert judged(made(truncated))["lost history"] == "block"


@pytest.mark.parametrize(("repeats", "expected"), [(6, "pass"), (7, "block")])
def test_repeats_are_measured_against_what_is_usual(repeats: int, expected: str) -> None:
    assert judged(made(weeks(LAST, repeats=repeats)))["repeated events"] == expected  # usual: 1 %, allowed: 5 % more


def test_yesterdays_file_appended_once_more_is_all_repeats_and_a_copy() -> None:
    days = weeks(LAST)
    days[BEFORE] = Day(200, 20, 101, 2 * BEFORE)
    found = judged(made(days))
    assert found["copied days"] == "block"
    assert found["repeated events"] == "block"


def test_a_day_under_another_date_is_known_again_also_where_that_day_had_events() -> None:
    days = weeks(LAST, digest=BEFORE - 3)
    assert judged(made(days))["copied days"] == "block"
    days = weeks(LAST)
    days[BEFORE] = Day(200, 40, 1, BEFORE + BEFORE - 3)
    assert judged(made(days))["copied days"] == "block"
    few = weeks(LAST, events=19, users=19, digest=BEFORE - 3)
    assert judged(made(few))["copied days"] == "pass"


def test_two_new_days_that_are_one_are_found_without_a_live_twin() -> None:
    live = made(weeks(LAST - 7))
    copied = data.check_copied_days(weeks(LAST, digest=LAST - 2), live.days)
    assert (copied.verdict, copied.value) == ("block", 1)
    assert "2011-03-04 is 2011-03-02 again" in copied.reason


@pytest.mark.parametrize(("bad", "expected"), [(0, "pass"), (2, "warn"), (3, "block")])
def test_bad_rows_are_counted_among_the_new_ones(bad: int, expected: str) -> None:
    live = replace(LIVE, read=100_000, bad=900)
    assert judged(made(weeks(LAST), read=100_250, bad=900 + bad), live)["quarantined"] == expected


@pytest.mark.parametrize(("items", "expected"), [(45, "pass"), (44, "block")])
def test_a_catalogue_that_shrinks_blocks(items: int, expected: str) -> None:
    assert judged(made(weeks(LAST), present=items))["catalogue"] == expected


def test_without_a_clock_nights_are_compared_by_their_summaries() -> None:
    live, gate = replace(LIVE, days=None), GATE
    for rows, expected in ((100, "pass"), (50, "block")):
        tonight = replace(live, rows=live.rows + rows, read=live.read + rows)
        measured = data.measure_data(tonight, live, NIGHT, None, gate)
        history = [{"volume": volume} for volume in (None, 90, 100, 110)]
        found = {c.name: c.verdict for c in data.check_data(tonight, live, measured, history, gate)}
        assert found["volume"] == expected
        assert {found[name] for name in ("freshness", "future", "copied days", "repeated events")} == {"skip"}
        assert data.check_volume(measured, history[:3], gate)[0].verdict == "skip"


def test_a_first_release_is_asked_only_what_needs_no_other() -> None:
    found = judged(made(weeks(LAST)), None)
    assert found == {"volume": "skip", "freshness": "pass", "future": "pass", "quarantined": "pass"}
